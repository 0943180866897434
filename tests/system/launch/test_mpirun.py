"""mpirun over two hosts: `mega train` directly, and `mega launch --on mpi`, train as two ranks of one host do."""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from megamodel.train.run_directory import RunDirectory
from tests.megamodel.train.jobs import write_corpus
from tests.requirements import mpirun, require
from tests.system.launch.hosts import LaunchHosts
from tests.system.runs import Run
from tests.system.test_kill import CONFIG

STEPS = 12
_SECONDS = 240.0


@pytest.fixture(scope="module")
def hosts() -> Iterator[LaunchHosts]:
    require("netns")
    require("mpi")
    with LaunchHosts(2) as made:
        yield made


@pytest.fixture(scope="module")
def on_one_host(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """`mega train --ranks 2`."""
    root = tmp_path_factory.mktemp("mpirun")
    write_corpus(root / "corpus")
    (root / "run.toml").write_text(CONFIG.format(root=root, steps=STEPS))
    run = Run(root=root, name="whole", config=root / "run.toml", ranks=2)
    run.finish()
    assert [step for step, *_ in run.figures()] == list(range(1, STEPS + 1))
    return run


def environ(hosts: LaunchHosts, directory: Path) -> dict[str, str]:
    """Of mpirun (Open MPI 4 and 5): how to come to other hosts, and by which network."""
    shell = str(hosts.write_remote_shell(directory / "remote-shell"))
    as_root = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    # Hosts of one machine would be taken for one host.
    network = {"OMPI_MCA_pml": "ob1", "OMPI_MCA_btl": "self,tcp", "OMPI_MCA_btl_tcp_if_include": "eth0"}
    network |= {"OMPI_MCA_oob_tcp_if_include": "eth0", "PRTE_MCA_prte_if_include": "eth0"}
    return {"OMPI_MCA_plm_rsh_agent": shell, "PRTE_MCA_plm_ssh_agent": shell, **network, **as_root}


def settings(run: Run, name: str) -> list[str]:
    given = (f"run.directory={run.root}/runs", f"run.name={name}")
    return [str(run.config), *(word for setting in given for word in ("--set", setting))]


def figures(run: Run, name: str) -> list[tuple[int, float, float]]:
    lines = RunDirectory(run.root / "runs" / name).read_metrics()
    return [(line["step"], line["loss"], line["grad_norm"]) for line in lines if "loss" in line]


def nothing_is_left(hosts: LaunchHosts) -> bool:
    return not any(psutil.wait_procs(hosts.processes(host), timeout=60.0)[1] for host in hosts.names)


def direct(hosts: LaunchHosts) -> list[str]:
    """mpirun of a rank on each host."""
    program = mpirun()
    assert program is not None
    where = ["--host", ",".join(f"{name}:1" for name in hosts.names), "--map-by", "ppr:1:node", "--bind-to", "none"]
    return [program, "-n", "2", *where, sys.executable, "-m", "launcher", "train"]


@pytest.mark.slow
def test_mega_train_under_mpirun(hosts: LaunchHosts, on_one_host: Run) -> None:
    root, output = on_one_host.root, on_one_host.root / "direct.out"
    command = [*direct(hosts), *settings(on_one_host, "direct")]
    process = hosts.start("h0", command, output=output, cwd=root, environ=environ(hosts, root))
    assert process.wait(timeout=_SECONDS) == 0, output.read_text()[-3000:]
    assert figures(on_one_host, "direct") == on_one_host.figures()
    assert nothing_is_left(hosts)
    # Rank 0 alone speaks.
    assert output.read_text().count("Finished: 12 steps") == 1


@pytest.mark.slow
def test_a_signal_that_mpirun_passes_on_saves_and_the_same_command_continues(
    hosts: LaunchHosts, on_one_host: Run
) -> None:
    root, output = on_one_host.root, on_one_host.root / "stopped.out"
    command = [*direct(hosts), *settings(on_one_host, "stopped")]
    process = hosts.start("h0", command, output=output, cwd=root, environ=environ(hosts, root))
    deadline = time.monotonic() + _SECONDS
    while not figures(on_one_host, "stopped"):
        assert process.poll() is None, output.read_text()[-3000:]
        assert time.monotonic() < deadline
        time.sleep(0.02)  # files have no event to wait for
    (rank,) = (each for each in hosts.processes("h0", "launcher", "train") if each.name() not in ("mpirun", "prterun"))
    starter = psutil.Process(rank.ppid())
    starter.send_signal(signal.SIGUSR1)
    assert process.wait(timeout=_SECONDS) == 75, output.read_text()[-3000:]
    assert nothing_is_left(hosts)
    assert figures(on_one_host, "stopped")[-1][0] < STEPS
    again = hosts.start("h0", command, output=output, cwd=root, environ=environ(hosts, root))
    assert again.wait(timeout=_SECONDS) == 0, output.read_text()[-3000:]
    assert figures(on_one_host, "stopped") == on_one_host.figures()


@pytest.mark.slow
def test_mega_launch_on_mpi(hosts: LaunchHosts, on_one_host: Run) -> None:
    root, output = on_one_host.root, on_one_host.root / "launched.out"
    hostfile = root / "hosts"
    hostfile.write_text("".join(f"{name}\n" for name in hosts.names))
    options = ["--on", "mpi", "--hostfile", str(hostfile), "--set", "launch.preflight.fabric=false"]
    command = [sys.executable, "-m", "launcher", "launch", *settings(on_one_host, "launched"), *options]
    process = hosts.start("h0", command, output=output, cwd=root, environ=environ(hosts, root))
    assert process.wait(timeout=_SECONDS) == 0, output.read_text()[-3000:]
    assert figures(on_one_host, "launched") == on_one_host.figures()
    assert nothing_is_left(hosts)
    assert "2 ranks on h0, h1" in output.read_text()
