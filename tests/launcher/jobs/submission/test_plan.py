"""What is looked at before anything starts."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from launcher.config import resolved_toml
from launcher.errors import ConfigError
from launcher.jobs import host_choice
from launcher.jobs.job_record import BackendName
from launcher.jobs.preview import starter_command
from launcher.jobs.submission.plan import LaunchPlan, default_backend, plan_launch, seconds_of, working_directory
from tests.launcher.jobs.fake_slurm import FakeSlurm


def plan_of(
    file: Path,
    *settings: str,
    backend: BackendName = "slurm",
    hostfile: Path | None = None,
    path: str = "/usr/bin:/bin",
) -> LaunchPlan:
    return plan_launch([file], settings, backend=backend, environ={"PATH": path}, hostfile=hostfile)


def problems_of(
    file: Path, *settings: str, backend: BackendName = "slurm", hostfile: Path | None = None
) -> Sequence[str]:
    with pytest.raises(ConfigError) as refused:
        plan_of(file, *settings, backend=backend, hostfile=hostfile)
    assert all(problem in str(refused.value) for problem in refused.value.problems)
    return refused.value.problems


def test_ranks_of_a_host(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        host_choice, "num_usable_gpus", lambda environ: 8
    )  # the login node's, which tell nothing of others
    assert plan_of(tiny, "launch.nodes=2").num_ranks == 2
    assert plan_of(tiny, "launch.nodes=2", "slurm.gpus=2").num_ranks == 4
    assert plan_of(tiny, "launch.nodes=2", "slurm.gpus=4", "launch.ranks_per_node=2").num_ranks == 4
    assert plan_of(tiny, "train.global_batch_size=8", backend="local").num_ranks == 8
    assert plan_of(tiny, "run.device=cpu", backend="local").num_ranks == 1
    # What was found is part of the configuration from now on.
    assert plan_of(tiny, "slurm.gpus=2").config.launch.ranks_per_node == 2


def test_spare_hosts(tiny: Path) -> None:
    plan = plan_of(tiny, "launch.nodes=2", "slurm.nodes=3")
    assert (plan.nodes_asked, plan.num_ranks) == (3, 2)
    assert plan_of(tiny, "slurm.nodes=3", backend="local").nodes_asked == 1


def test_all_problems_at_once(tiny: Path) -> None:
    problems = problems_of(
        tiny,
        "launch.nodes=3",
        "slurm.nodes=2",
        "slurm.gpus=1",
        "launch.ranks_per_node=2",
        "slurm.time=2",
        "data.path=nowhere",
        "data.tokenizer.path=no.json",
        "slurm.container.runtime=apptainer",
        "slurm.container.image=/images/none.sif",
        "slurm.template=none.j2",
    )
    said = "\n".join(problems)
    assert "--ranks" not in said, "an option of mega train"
    for words in (
        "train.global_batch_size",
        "(3 hosts with 2 ranks each)",
        " ranks in all (launch.nodes times launch.ranks_per_node)",
        "--set slurm.nodes=2: slurm.nodes = 2: fewer than launch.nodes = 3, which train; raise it, or leave it out",
        "--set launch.ranks_per_node=2: launch.ranks_per_node = 2: a GPU serves one rank, and slurm.gpus = 1",
        'defaults: slurm.signal_seconds = 120: must be less than slurm.time = "2", which is 120 s',
        '--set data.path=nowhere: data.path = "nowhere": no such file or folder',
        'data.tokenizer.path = "no.json": no such file or folder',
        'slurm.container.image = "/images/none.sif": no such file',
        "slurm.template = none.j2: cannot be read: No such file or directory",
    ):
        assert words in said
    assert len(problems) == 8


def test_single_keys_first(tiny: Path) -> None:
    (problem,) = problems_of(tiny, "launch.nodez=3")
    assert "did you mean launch.nodes?" in problem


def test_what_concerns_slurm_alone_is_looked_at_for_slurm_alone(tiny: Path) -> None:
    plan_of(tiny, "slurm.time=1", "slurm.template=none.j2", backend="local")


def test_mounts_that_are_not_here_are_doubts(tiny: Path) -> None:
    settings = (
        "slurm.container.runtime=pyxis",
        "slurm.container.image=docker://a/b",
        'slurm.container.mounts=["/nowhere:/data", "/tmp"]',
    )
    (doubt,) = plan_of(tiny, *settings).doubts
    assert "/nowhere is not there" in doubt
    assert "every host of the job must have it" in doubt


def test_gpus_that_nobody_asks_for_are_doubtful(tiny: Path) -> None:
    (doubt,) = plan_of(tiny, "run.device=cuda").doubts
    assert 'run.device = "cuda", and slurm.gpus is not set: unless the partition gives GPUs' in doubt
    assert plan_of(tiny, "run.device=cuda", "slurm.gpus=1").doubts == ()
    assert plan_of(tiny, "run.device=cuda", 'slurm.extra_lines=["#SBATCH --gres=gpu:1"]').doubts == ()
    assert plan_of(tiny, "run.device=cuda", backend="local").doubts == ()


@pytest.mark.parametrize("image", ["docker://a/b:c", "oras://a/b"])
def test_apptainer_is_given_a_file(tiny: Path, image: str) -> None:
    settings = ("slurm.container.runtime=apptainer", f"slurm.container.image={image}")
    (problem,) = problems_of(tiny, *settings)
    assert f'slurm.container.image = "{image}": every host would fetch it' in problem
    assert f"apptainer pull image.sif {image}" in problem


@pytest.mark.parametrize(("time", "is_doubtful"), [("3", True), ("0:3:29", True), ("0:3:30", False), ("1:0:0", False)])
def test_a_time_limit_that_leaves_no_time_is_doubtful(tiny: Path, time: str, is_doubtful: bool) -> None:
    doubts = plan_of(tiny, f"slurm.time={time}").doubts
    assert bool(doubts) is is_doubtful
    if is_doubtful:
        assert f'slurm.time = "{time}" leaves the run' in doubts[0]
        assert "set the time to 210 s or more" in doubts[0]


@pytest.mark.parametrize("image", ["nvcr.io#nvidia/pytorch:25.01", "docker://a/b:c", "a/b"])
def test_images_of_a_registry_are_not_looked_for(tiny: Path, image: str) -> None:
    plan_of(tiny, "slurm.container.runtime=pyxis", f"slurm.container.image={image}")


def test_what_srun_says_is_told(tiny: Path, fake_slurm: FakeSlurm) -> None:
    fake_slurm.program(
        "srun", '[ "$*" = --help ] && echo "  --help"; case "$*" in *--foo*) echo "$1 $2"; exit 2;; esac'
    )
    with pytest.raises(ConfigError) as refused:
        plan_of(tiny, 'slurm.srun_options=["--foo"]', path=f"{fake_slurm.folder}:/usr/bin:/bin")
    assert refused.value.problems == (
        '--set slurm.srun_options=["--foo"]: slurm.srun_options = ["--foo"]: srun refuses it: --test-only --foo',
    )
    fake_slurm.program(
        "srun", """[ "$*" = --help ] && echo "  --help" && exit; echo "srun: unrecognized option '--foo'" >&2; exit 2"""
    )
    (doubt,) = plan_of(tiny, 'slurm.srun_options=["--foo"]', path=f"{fake_slurm.folder}:/usr/bin:/bin").doubts
    assert doubt.startswith("slurm.srun_options: srun knows no --foo here")


def test_this_machine_is_one_host(tiny: Path) -> None:
    (problem,) = problems_of(tiny, "launch.nodes=2", backend="local")
    assert "launch.nodes = 2: --on local is this machine alone" in problem


def test_hosts_of_a_hostfile(tiny: Path, tmp_path: Path) -> None:
    hosts = tmp_path / "hosts"
    hosts.write_text("n1\nn2\n")
    mpirun = tmp_path / "bin" / "mpirun"
    mpirun.parent.mkdir()
    mpirun.write_text("#!/bin/sh\n")
    mpirun.chmod(0o755)
    plan = plan_of(tiny, "launch.ranks_per_node=1", backend="mpi", hostfile=hosts, path=str(mpirun.parent))
    assert [host.name for host in plan.hosts] == ["n1", "n2"]
    assert plan.config.launch.nodes == 2
    assert plan_of(tiny, "launch.nodes=1", backend="mpi", hostfile=hosts, path=str(mpirun.parent)).num_ranks == 1
    settings = ("launch.nodes=4", "launch.ranks_per_node=1")
    assert "the hostfile lists 2" in problems_of(tiny, *settings, backend="mpi", hostfile=hosts)[-1]
    assert "without --hostfile is this machine alone" in problems_of(tiny, *settings, backend="mpi")[-1]


def _mpi(tiny: Path, hosts: str) -> Path:
    """Writes the hostfile, and a mpirun to find, in one folder."""
    folder = tiny.parent / "mpi"
    folder.mkdir(exist_ok=True)
    (folder / "mpirun").write_text("#!/bin/sh\n")
    (folder / "mpirun").chmod(0o755)
    (folder / "hosts").write_text(hosts)
    return folder


def test_slots_are_the_ranks_of_a_host_where_nobody_says(tiny: Path) -> None:
    folder = _mpi(tiny, "n1 slots=2\nn2:2\n")

    def plan(*settings: str) -> LaunchPlan:
        return plan_of(tiny, *settings, backend="mpi", hostfile=folder / "hosts", path=str(folder))

    assert (plan().ranks_per_host, plan().num_ranks) == (2, 4)
    assert plan("launch.ranks_per_node=1").num_ranks == 2  # not all of them


@pytest.mark.parametrize(
    ("hosts", "settings", "said"),
    [
        ("n1 slots=2\nn2 slots=4\n", (), "hosts have different numbers of slots (n1: 2, n2: 4)"),
        (
            "n1 slots=2\nn2\n",
            (),
            "(n1: 2, n2: not said), and each runs as many ranks as the others; set launch.ranks_per",
        ),
        (
            "n1 slots=1\nn2:2\n",
            ("launch.ranks_per_node=2",),
            "= 2: more than the hostfile allows (n1 slots=1); lower it",
        ),
    ],
)
def test_slots_that_do_not_fit(tiny: Path, hosts: str, settings: tuple[str, ...], said: str) -> None:
    folder = _mpi(tiny, hosts)
    problems = problems_of(tiny, *settings, backend="torchrun", hostfile=folder / "hosts")
    assert said in problems[-1]


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (("parallel.tp=2", "launch.nodes=4", "launch.min_nodes=3"), "on 3 hosts, so it never goes on with fewer than "),
        (("parallel.tp=2", "launch.nodes=4", "launch.min_nodes=3"), "launch.nodes = 4; it could on 2"),
        (("parallel.tp=4", "model.num_kv_heads=4", "launch.nodes=4", "launch.min_nodes=1"), "on 1 to 3 hosts"),
        (("parallel.tp=4", "model.num_kv_heads=4", "launch.nodes=4", "launch.min_nodes=1"), "no smaller number works"),
        (("parallel.tp=2", "launch.nodes=4", "launch.min_nodes=2"), None),
        (("parallel.tp=2", "launch.nodes=4"), None),
    ],
)
def test_fewer_hosts_that_no_layout_allows_are_doubtful(
    tiny: Path, settings: tuple[str, ...], said: str | None
) -> None:
    doubts = plan_of(tiny, *settings).doubts
    assert [said is not None and said in doubt for doubt in doubts] == ([] if said is None else [True])


def test_the_home_is_named_in_full(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither a program that srun starts nor SLURM knows `~`."""
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "x.sif").touch()
    settings = ("slurm.container.image=~/x.sif", 'slurm.container.mounts=["~/data:/data:ro", "~", "/a/"]')
    mounts = f"{tmp_path}/data:/data:ro,{tmp_path}:{tmp_path},/a/:/a/"
    for runtime, image in (("apptainer", f" {tmp_path}/x.sif "), ("pyxis", f" --container-image={tmp_path}/x.sif ")):
        plan = plan_of(tiny, *settings, f"slurm.container.runtime={runtime}")
        command = starter_command(plan, working_directory=Path("/work"), environ={})
        assert image in command
        assert mounts in command
        assert "~" not in resolved_toml(plan.config)  # what the job's start reads
    (problem,) = problems_of(tiny, "slurm.container.runtime=pyxis", "slurm.container.image=~/none.sqsh")
    assert f'slurm.container.image = "{tmp_path}/none.sqsh": no such file' in problem


@pytest.mark.parametrize(
    ("time", "seconds"),
    [("90", 5400), ("1:30", 90), ("2:00:05", 7205), ("1-0", 86_400), ("1-12:30", 131_400), ("2-00:00:01", 172_801)],
)
def test_time_limits(time: str, seconds: int) -> None:
    assert seconds_of(time) == seconds


def test_where_a_job_starts_when_nobody_says() -> None:
    assert default_backend({}, has_sbatch=True) == ("slurm", "there is sbatch here")
    assert default_backend({"SLURM_JOB_ID": "7"}, has_sbatch=True) == ("local", "this is within job 7 of SLURM")
    assert default_backend({}, has_sbatch=False) == ("local", "there is no sbatch here")


def test_the_working_directory_by_the_users_name_for_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    monkeypatch.chdir(tmp_path / "link")
    monkeypatch.setenv("PWD", str(tmp_path / "link"))
    assert working_directory() == tmp_path / "link"
    monkeypatch.setenv("PWD", str(tmp_path))  # of somebody who has not told the shell
    assert working_directory() == tmp_path / "real"
    monkeypatch.delenv("PWD")
    assert working_directory() == tmp_path / "real"
