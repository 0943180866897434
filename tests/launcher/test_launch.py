"""`mega launch`: a wrong configuration reaches no queue, a right one once."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from launcher.config import load_run_config
from launcher.jobs.job_record import JobFolder, SupervisorState
from launcher.jobs.slurm.script import template_text
from launcher.run_lock import locked_run
from launcher.verbs import launch as verb
from tests.launcher.conftest import Mega, job_record
from tests.launcher.jobs.fake_slurm import FakeSlurm

_TOO_LARGE = 'cat > /dev/null; echo "allocation failure: Requested node configuration is not available" >&2; exit 1'


def state(name: str, **changes: object) -> SupervisorState:
    return SupervisorState(**{"state": name, "host": "n1", "pid": 1, "updated": 0.0, **changes})  # type: ignore[arg-type]


def test_a_job_is_queued_once_it_is_known_to_be_right(
    mega: Mega, tiny: Path, queue: FakeSlurm, folder: JobFolder
) -> None:
    ended = mega(
        "launch", tiny, "--on", "slurm", "--nodes", "2", "--set", "slurm.nodes=3", "--set", "slurm.time=1:00:00"
    )
    assert ended.code == 0, ended.err
    assert "Job 7 is queued: 2 ranks on 2 hosts and 1 spare. Run folder: runs/tiny" in ended.out
    for command in ("mega status tiny", "mega logs tiny --follow", "mega cancel tiny"):
        assert command in ended.out
    assert queue.calls() == ["sbatch --test-only", f"sbatch --parsable {folder.script.relative_to(tiny.parent)}"]
    assert "#SBATCH --nodes=3\n" in folder.script.read_text()
    kept = folder.read_record()
    assert kept is not None
    assert (kept.backend, kept.job_id, kept.nodes) == ("slurm", "7", 3)
    # What the user's file becomes later changes nothing of it.
    config = load_run_config([folder.config], num_ranks=2).config
    assert (config.launch.nodes, config.launch.ranks_per_node, config.slurm.time) == (2, 1, "1:00:00")


def test_for_programs(mega: Mega, tiny: Path, queue: FakeSlurm) -> None:
    assert mega("launch", tiny, "--on", "slurm", "--json").json == {
        "job_id": "7",
        "run_dir": "runs/tiny",
        "backend": "slurm",
        "nodes": 1,
        "ranks": 1,
    }


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (["train.stepz=4"], "did you mean train.steps?"),
        (["parallel.tp=3"], "parallel.tp"),
        (["data.path=nowhere"], "no such file or folder"),
        (["launch.nodes=2", "slurm.nodes=1"], "fewer than launch.nodes = 2"),
        (["slurm.template=none.j2"], "none.j2: cannot be read"),
        (['slurm.constraint="a\\nb"'], "line break"),
    ],
)
def test_a_wrong_configuration_never_reaches_the_queue(
    mega: Mega, tiny: Path, queue: FakeSlurm, settings: list[str], said: str
) -> None:
    sets = [word for setting in settings for word in ("--set", setting)]
    for options in ([], ["--dry-run"]):
        ended = mega("launch", tiny, "--on", "slurm", "--json", *sets, *options)
        assert ended.code == 2
        assert said in ended.json["error"]
    assert queue.calls("sbatch") == []
    assert not Path("runs").exists()


def test_a_package_that_is_missing(mega: Mega, tiny: Path, queue: FakeSlurm, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    wants = ("--set", "export.format=hf")
    ended = mega("launch", tiny, "--on", "slurm", *wants)
    assert ended.code == 2
    assert "install the extra `hf`" in ended.err
    assert queue.calls() == []
    container = ("--set", "slurm.container.runtime=pyxis", "--set", "slurm.container.image=docker://a/b")
    assert mega("launch", tiny, "--on", "slurm", *wants, *container).code == 0


def test_another_model_than_that_of_the_checkpoints(
    mega: Mega, tiny: Path, queue: FakeSlurm, folder: JobFolder
) -> None:
    root = folder.root.parent
    (root / "checkpoints" / "step-00000002").mkdir(parents=True)
    assert mega("config", "show", tiny).code == 0
    (root / "config.toml").write_text(tiny.read_text().replace("seq_len = 64", "seq_len = 32"))
    ended = mega("launch", tiny, "--on", "slurm")
    assert ended.code == 2
    assert "data.seq_len = 64, but was 32" in ended.err
    assert queue.calls() == []


def test_what_slurm_complains_of_is_told(mega: Mega, tiny: Path, queue: FakeSlurm) -> None:
    queue.program("sbatch", 'cat > "$FAKE/script"; echo "sbatch: error: invalid partition specified: nope" >&2; exit 1')
    ended = mega("launch", tiny, "--on", "slurm", "--set", "slurm.partition=nope")
    assert ended.code == 2
    refusal = "SLURM would not take this job: invalid partition specified: nope; it is asked for launch.nodes = 1"
    assert ended.err.startswith(f"error: {refusal}")
    assert 'slurm.partition = "nope"' in ended.err
    assert queue.calls() == ["sbatch --test-only"]
    assert "#SBATCH --partition=nope" in (queue.folder / "script").read_text()
    assert not Path("runs").exists()


def test_what_does_not_fit_now_may_fit_later(mega: Mega, tiny: Path, queue: FakeSlurm) -> None:
    """sbatch --test-only says the same of more hosts than there are, and than there are now."""
    queue.program("sbatch", f'case "$1" in --test-only) {_TOO_LARGE};; *) echo 7;; esac')
    ended = mega("launch", tiny, "--on", "slurm", "--set", "slurm.partition=low")
    assert ended.code == 2
    assert "would not take this job: allocation failure: Requested node configuration is not available" in ended.err
    assert queue.calls("sinfo")[0].startswith("sinfo --noheader --Node --partition=low --states=down,drain")
    queue.program("sinfo", r'printf "n1\nn1\nn2\n"')
    assert mega("launch", tiny, "--on", "slurm", "--set", "slurm.partition=low").code == 0
    shown = mega("launch", tiny, "--on", "slurm", "--dry-run", "--set", "run.name=b").out
    assert "perhaps for now: 2 of the cluster's hosts are out of service" in shown


def test_a_refusal_of_sbatch_itself_leaves_nothing(mega: Mega, tiny: Path, queue: FakeSlurm, folder: JobFolder) -> None:
    queue.program(
        "sbatch",
        'case "$1" in --test-only) cat > /dev/null;; *) echo "sbatch: error: QOSMaxSubmitJobPerUserLimit" >&2; exit 1;; esac',
    )
    ended = mega("launch", tiny, "--on", "slurm")
    assert ended.code == 2
    assert "SLURM did not take this job: QOSMaxSubmitJobPerUserLimit" in ended.err
    assert not folder.root.parent.exists()
    folder.write_record(job_record())
    assert mega("launch", tiny, "--on", "slurm").code == 2
    kept = folder.read_record()
    assert kept is not None
    assert kept.job_id == "5"


def test_no_sbatch(mega: Mega, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    ended = mega("launch", tiny, "--on", "slurm")
    assert ended.code == 2
    assert "--on slurm needs sbatch on PATH" in ended.err
    shown = mega("launch", tiny, "--on", "slurm", "--dry-run")
    assert shown.code == 0
    assert "not asked: there is no sbatch here" in shown.out


def test_a_dry_run_shows_all_and_queues_nothing(mega: Mega, tiny: Path, queue: FakeSlurm) -> None:
    arguments = ("launch", tiny, "--on", "slurm", "--nodes", "2", "--set", "slurm.nodes=3", "--dry-run")
    shown = mega(*arguments)
    assert shown.code == 0
    for words in (
        "#SBATCH --nodes=3",
        "SLURM says: Job 7 to start at noon",
        "srun --nodes=2 '--nodelist=HOST[1-2]'",
        "MASTER_ADDR, MASTER_PORT",
        "NCCL_SOCKET_IFNAME",
        "the one that leads to rank 0's host",
        "Nothing was started",
    ):
        assert words in shown.out
    data = mega(*arguments, "--json").json
    assert (data["nodes"], data["spare_nodes"], data["ranks"], data["layout"]["dp_shard"]) == (2, 1, 2, 2)
    assert data["script"].startswith("#!/bin/bash")
    assert data["starter"].startswith("srun ")
    assert data["environment"]["MEGA_PREFLIGHT"]["value"] == "runs/tiny/logs/attempt-1/preflight.json"
    assert {call.split()[1] for call in queue.calls()} == {"--test-only"}
    assert not Path("runs").exists()


def test_a_dry_run_shows_the_container(mega: Mega, tiny: Path, queue: FakeSlurm, tmp_path: Path) -> None:
    def starter(*settings: str) -> str:
        words = [word for setting in settings for word in ("--set", setting)]
        return str(mega("launch", tiny, "--on", "slurm", "--dry-run", "--json", *words).json["starter"])

    assert "--container-name=mega-JOB " in starter(
        "slurm.container.runtime=pyxis", "slurm.container.image=docker://a/b"
    )
    image = tmp_path / "x.sif"
    image.touch()
    apptainer = ("slurm.container.runtime=apptainer", f"slurm.container.image={image}")
    assert "apptainer exec --nv --bind" in starter(*apptainer)
    assert "apptainer exec --bind" in starter(*apptainer, "run.device=cpu")


def test_a_dry_run_tells_of_networks_that_are_not_here(mega: Mega, tiny: Path, queue: FakeSlurm) -> None:
    wants = ("--nodes", "2", "--set", "launch.network=infiniband")
    shown = mega("launch", tiny, "--on", "slurm", "--dry-run", *wants).out
    assert "each host chooses by what it has" in shown


def test_without_a_cluster_a_dry_run_shows_all_the_same(mega: Mega, tiny: Path, queue: FakeSlurm) -> None:
    """Programs of SLURM may be where no cluster is."""
    queue.program(
        "sbatch", 'cat > /dev/null; echo "sbatch: fatal: Could not establish a configuration source" >&2; exit 1'
    )
    shown = mega("launch", tiny, "--on", "slurm", "--dry-run")
    assert shown.code == 0, shown.out + shown.err
    assert "not asked: no SLURM cluster answers here (" in shown.out
    refused = mega("launch", tiny, "--on", "slurm")
    assert refused.code == 1
    assert "no SLURM cluster answers here" in refused.err
    assert not Path("runs").exists()


def test_dry_runs_elsewhere(mega: Mega, tiny: Path) -> None:
    shown = mega("launch", tiny, "--on", "local", "--dry-run", "--set", "launch.ranks_per_node=2")
    assert shown.code == 0
    assert "-m launcher agent" in shown.out
    assert not Path("runs").exists()


def test_the_template(mega: Mega) -> None:
    assert mega("launch", "--show-template").out == template_text()
    assert mega("launch", "--show-template", "--json").json == {"template": template_text()}


def test_where_it_runs_when_nobody_says(
    mega: Mega, tiny: Path, queue: FakeSlurm, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "--on slurm: there is sbatch here\n" in mega("launch", tiny).out
    monkeypatch.setenv("SLURM_JOB_ID", "9")
    shown = mega("launch", tiny, "--dry-run", "--set", "run.name=b").out
    assert "--on local: this is within job 9 of SLURM\n" in shown


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "CONFIG.toml is missing"),
        (["{tiny}", "--on", "slrum"], "--on slrum: must be local, torchrun, slurm or mpi"),
        (["{tiny}", "--on", "slurm", "--hostfile", "h"], "--hostfile means nothing with --on slurm, only with mpi and torchrun"),
        (["{tiny}", "--on", "local", "--forget-excluded"], "--forget-excluded means nothing with --on local, only with slurm"),
        (["{tiny}", "--on", "local", "--wait"], "--wait means nothing with --on local, only with slurm"),
        (["{tiny}", "--on", "local", "--node-rank", "1", "--rendezvous", "h:1"], "--rendezvous means nothing"),
        (["{tiny}", "--on", "mpi", "--hostfile", "nowhere"], "nowhere: the list of hosts cannot be read"),
    ],
)  # fmt: skip
def test_options_that_make_no_sense(mega: Mega, tiny: Path, arguments: list[str], said: str) -> None:
    ended = mega("launch", *(word.format(tiny=tiny) for word in arguments))
    assert ended.code == 2
    assert said in ended.err


@pytest.mark.parametrize("job_state", ["PENDING", "RUNNING"])
def test_a_run_that_is_queued_already(
    mega: Mega, tiny: Path, queue: FakeSlurm, folder: JobFolder, job_state: str
) -> None:
    folder.write_record(job_record())
    queue.program("squeue", f'echo "5|{job_state}|None"')
    ended = mega("launch", tiny, "--on", "slurm")
    assert ended.code == 1
    assert f"run tiny is job 5 in SLURM's queue already ({job_state})" in ended.err
    assert "`mega cancel runs/tiny` ends it" in ended.err
    assert queue.calls("sbatch") == []
    assert mega("launch", tiny, "--on", "local").code == 1


def test_a_run_that_trains_already(mega: Mega, tiny: Path, queue: FakeSlurm, folder: JobFolder) -> None:
    with locked_run(folder.root.parent, say=print):
        for backend in ("slurm", "local"):
            ended = mega("launch", tiny, "--on", backend)
            assert ended.code == 1
            assert f"run tiny is being trained by pid {os.getpid()} on" in ended.err
    assert queue.calls("sbatch") == []


def test_two_at_a_time(mega: Mega, tiny: Path, queue: FakeSlurm, folder: JobFolder) -> None:
    with locked_run(folder.root, say=print):
        ended = mega("launch", tiny, "--on", "slurm")
    assert ended.code == 1
    assert "another `mega launch` of this run is under way" in ended.err
    assert queue.calls() == ["sbatch --test-only"]


def test_a_job_that_is_just_ending_is_waited_for(mega: Mega, tiny: Path, queue: FakeSlurm, folder: JobFolder) -> None:
    folder.write_record(job_record())
    folder.write_state(state("failed", excluded_hosts={"n3": "its link is slow"}))
    folder.ask_to_cancel()
    queue.program("squeue", 'echo "5|COMPLETING|None"')
    with locked_run(folder.root.parent, say=print):
        ended = mega("launch", tiny, "--on", "slurm")
    assert ended.code == 0, ended.err
    assert queue.calls("sbatch")[-1].startswith("sbatch --parsable --dependency=afterany:5 ")
    # What was bad is not asked for; what the earlier job has left is not taken for this one's.
    assert "not asked for: n3, which an earlier job of this run has left out (its link is slow)" in ended.out
    assert "--forget-excluded asks for all hosts again" in ended.out
    assert "#SBATCH --exclude=n3\n" in folder.script.read_text()
    assert folder.read_state() is None
    assert not folder.is_cancelled()


def test_bad_hosts_stay_out_over_launches_until_they_are_forgotten(
    mega: Mega, tiny: Path, queue: FakeSlurm, folder: JobFolder
) -> None:
    folder.write_record(job_record())
    folder.write_state(state("failed", excluded_hosts={"n3": "its link is slow"}))
    for _ in range(2):
        assert mega("launch", tiny, "--on", "slurm").code == 0
        assert "#SBATCH --exclude=n3\n" in folder.script.read_text()
        shown = mega("status", "tiny", "--json").json
        assert (shown["excluded_hosts"], shown["excluded_because"]) == (["n3"], {"n3": "its link is slow"})
    folder.write_state(state("failed", excluded_hosts={"n4": "its disk"}))
    assert mega("launch", tiny, "--on", "slurm").code == 0
    assert "#SBATCH --exclude=n3,n4\n" in folder.script.read_text()
    assert mega("launch", tiny, "--on", "slurm", "--forget-excluded").code == 0
    assert "--exclude" not in folder.script.read_text()
    assert mega("launch", tiny, "--on", "slurm").code == 0
    assert "--exclude" not in folder.script.read_text()
    assert mega("status", "tiny", "--json").json["excluded_hosts"] == []


def test_waiting_for_the_end(
    mega: Mega, tiny: Path, queue: FakeSlurm, folder: JobFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    ends = iter(
        [
            state("running"),
            state("finished"),
            state("failed", cause="out of memory"),
            state("failed", cause="cancelled"),
        ]
    )

    def look(seconds: float) -> None:
        folder.write_state(next(ends))

    monkeypatch.setattr(verb, "time", SimpleNamespace(sleep=look))
    ended = mega("launch", tiny, "--on", "slurm", "--wait", "--json")
    assert ended.code == 0
    assert (ended.json["job_id"], ended.json["state"]) == ("7", "finished")
    ended = mega("launch", tiny, "--on", "slurm", "--wait")
    assert ended.code == 1
    assert "error: job 7: out of memory" in ended.err

    def look_and_cancel(seconds: float) -> None:
        folder.ask_to_cancel()
        look(seconds)

    monkeypatch.setattr(verb, "time", SimpleNamespace(sleep=look_and_cancel))
    assert mega("launch", tiny, "--on", "slurm", "--wait").code == 75


@pytest.mark.slow
def test_a_run_on_this_machine(mega_process: Mega, tiny: Path, folder: JobFolder) -> None:
    ended = mega_process("launch", tiny, "--on", "local", "--json", "--set", "launch.ranks_per_node=2")
    assert ended.code == 0, ended.err
    assert (ended.json["finished"], ended.json["steps"], ended.json["run_dir"]) == (True, 4, "runs/tiny")
    assert "[0] step 4/4" in ended.err
    assert "  mega launch runs/tiny/config.toml --set train.steps=8 --on local    # train on" in ended.err
    kept, after = folder.read_record(), folder.read_state()
    assert kept is not None
    assert (kept.backend, kept.job_id) == ("local", None)
    assert after is not None
    assert after.state == "finished"
    # `mega train` can read what was launched.
    again = mega_process("launch", tiny, "--on", "local", "--json", "--set", "launch.ranks_per_node=2")
    assert (again.code, again.json["finished"]) == (0, True)
    assert "changed since" not in again.err


@pytest.mark.slow
def test_ctrl_c_saves_and_the_same_command_continues(tiny: Path, folder: JobFolder) -> None:
    arguments = ["launch", str(tiny), "--on", "local", "--json", "--set", "train.steps=100000"]
    command = [sys.executable, "-m", "launcher", *arguments]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
    ) as process:
        deadline = time.monotonic() + 120
        while len([*folder.root.parent.glob("checkpoints/step-*")]) < 2:
            assert time.monotonic() < deadline
            assert process.poll() is None
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        out, _ = process.communicate(timeout=120)
    assert process.returncode == 75
    answer = json.loads(out)
    assert not answer["finished"]
    assert answer["steps"] > 0
