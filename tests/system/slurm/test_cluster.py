"""SLURM on the made-up hosts: its jobs are where it says, MPI finds its ranks, a host dies and comes back."""

import os
import subprocess
import sys
import tempfile
import time

import psutil
import pytest

from tests.requirements import requires
from tests.system.fabric.hosts import run_command
from tests.system.slurm.cluster import MPI_ENVIRONMENT, CommandError, SlurmOfHosts

pytestmark = [requires("netns"), requires("slurm")]

HOSTS = ["h0", "h1", "h2", "h3"]
_SECONDS = 90.0
ON_ALL = "--nodelist=h[0-3]"
"""Not only their number: on a busy machine SLURM may take the spare one for one that is late to answer."""
_MPI_PROGRAM = """
from mpi4py import MPI
import socket
world = MPI.COMM_WORLD
seen = world.allgather((socket.gethostname(), MPI.Get_processor_name()))
print(seen if world.rank == 0 else world.size, flush=True)
"""


def test_a_step_runs_on_all_hosts(slurm: SlurmOfHosts) -> None:
    done = slurm.run("srun", "--immediate=30", ON_ALL, "hostname", timeout=60.0)
    assert sorted(done.stdout.split()) == HOSTS


def test_a_batch_job_runs_steps(slurm: SlurmOfHosts) -> None:
    job_id = slurm.submit("srun", "--label", "hostname", options=[ON_ALL])
    job = slurm.wait_for(job_id, "COMPLETED", _SECONDS)
    assert (job["BatchHost"], job["NodeList"], job["ExitCode"]) == ("h0", "h[0-3]", "0:0")
    assert sorted(slurm.output(job_id).splitlines()) == [f"{number}: {name}" for number, name in enumerate(HOSTS)]


def test_processes_of_a_job_are_on_their_host(slurm: SlurmOfHosts) -> None:
    job_id = slurm.submit("srun", "sleep", "1000", options=["--nodelist=h0,h1"])
    deadline = time.monotonic() + _SECONDS
    while not all(sleeping(slurm, host) for host in ("h0", "h1")):
        assert time.monotonic() < deadline, slurm.logs()
        time.sleep(0.1)
    assert not sleeping(slurm, "h2")
    slurm.run("scancel", str(job_id))
    slurm.wait_for(job_id, "CANCELLED", _SECONDS)


def test_a_job_gives_way_and_is_told_where_the_settings_say_so() -> None:
    with SlurmOfHosts(num_hosts=1, settings=["SlurmctldParameters=preempt_send_user_signal"]) as slurm:
        script = "trap 'echo told; scontrol requeue $SLURM_JOB_ID; exit 0' USR1; echo start $SLURM_RESTART_COUNT; "
        script += "while true; do sleep 0.1; done"
        low = slurm.submit("sh", "-c", script, options=["--exclusive", "--signal=B:USR1@10"])
        slurm.wait_for(low, "RUNNING", _SECONDS)
        deadline = time.monotonic() + _SECONDS
        while "start" not in slurm.output(low):
            assert time.monotonic() < deadline, slurm.logs()
            time.sleep(0.1)
        high = slurm.submit("true", options=["--exclusive", "--partition=high"])
        slurm.wait_for(high, "COMPLETED", _SECONDS)
        assert slurm.wait_for(low, "RUNNING", _SECONDS)["Restarts"] == "1"
        deadline = time.monotonic() + _SECONDS
        while not slurm.output(low).endswith("start 1\n"):
            assert time.monotonic() < deadline, slurm.output(low)
            time.sleep(0.1)
        assert slurm.output(low).split("\n")[:2] == ["start", "told"]


def sleeping(slurm: SlurmOfHosts, host: str) -> int:
    return sum(process.name() == "sleep" for process in slurm.processes(host))


@requires("mpi")
def test_mpi_finds_its_ranks(slurm: SlurmOfHosts) -> None:
    program = [sys.executable, "-c", _MPI_PROGRAM]
    done = slurm.run("srun", "--immediate=30", "--mpi=pmix", ON_ALL, *program, env=MPI_ENVIRONMENT, timeout=90.0)
    assert sorted(done.stdout.splitlines()) == ["4", "4", "4", str([(name, name) for name in HOSTS])]


def test_a_command_has_a_limit_and_its_failure_says_what_it_printed(slurm: SlurmOfHosts) -> None:
    with pytest.raises(CommandError, match=r"took more than 0\.5 s"):
        slurm.run("sleep", "1000", timeout=0.5)
    with pytest.raises(CommandError, match="Invalid job id specified"):
        slurm.job(99_999)


def test_a_link_and_its_rate(slurm: SlurmOfHosts) -> None:
    def time_of_a_megabyte() -> float:
        receive = "import socket; s = socket.create_server(('', 7000)); print(flush=True); c = s.accept()[0]\n"
        receive += "while c.recv(1 << 16): pass"
        send = "import socket, time; c = socket.create_connection(('h2', 7000)); t = time.monotonic()\n"
        send += "c.sendall(bytes(1_000_000)); c.shutdown(1); c.recv(1); print(time.monotonic() - t)"
        sink = slurm.popen(sys.executable, "-c", receive, host="h2", stdout=subprocess.PIPE)
        assert sink.stdout is not None
        assert sink.stdout.readline()
        return float(slurm.run(sys.executable, "-c", send, host="h3").stdout)

    free = min(time_of_a_megabyte() for _ in range(3))
    slurm.set_rate("h2", 4.0)
    try:
        shaped = time_of_a_megabyte()
    finally:
        slurm.set_rate("h2")
    assert shaped > 1.5
    assert free < shaped / 2
    slurm.link_down("h2")
    try:
        with pytest.raises(CommandError, match="took more than"):
            slurm.run(sys.executable, "-c", "import socket; socket.create_connection(('h2', 7001))", timeout=1.0)
    finally:
        slurm.link_up("h2")
    with pytest.raises(CommandError, match="ConnectionRefused"):
        slurm.run(sys.executable, "-c", "import socket; socket.create_connection(('h2', 7001))")


@pytest.mark.slow
def test_a_dead_host_is_noticed_and_comes_back(slurm: SlurmOfHosts) -> None:
    slurm.kill_host("h3")
    assert slurm.processes("h3") == []
    assert "NOT_RESPONDING" in slurm.wait_for_node("h3", "DOWN", _SECONDS)["State"]
    slurm.revive_host("h3")
    slurm.wait_for_node("h3", "IDLE", _SECONDS)
    assert slurm.run("srun", "--immediate=30", "--nodelist=h3", "hostname").stdout.split() == ["h3"]


def test_nothing_runs_on_where_the_maker_is_killed() -> None:
    program = """
from tests.system.slurm.cluster import SlurmOfHosts
import signal
with SlurmOfHosts(num_hosts=1) as slurm:
    processes = [process.pid for host in slurm.fabric.all_hosts for process in slurm.processes(host.name)]
    print(slurm.fabric.switches, slurm.directory, *processes, flush=True)
    signal.pause()
"""
    with tempfile.TemporaryDirectory() as place:
        environment = {**os.environ, "TMPDIR": place}
        with subprocess.Popen(
            [sys.executable, "-c", program], stdout=subprocess.PIPE, text=True, env=environment
        ) as maker:
            assert maker.stdout is not None
            switches, directory, *numbers = maker.stdout.readline().split()
            assert len(numbers) >= 3
            maker.kill()
        deadline = time.monotonic() + _SECONDS
        while switches in run_command("ip", "netns", "list").split() or naming(directory):
            assert time.monotonic() < deadline, f"it is still there: {naming(directory)}"
            time.sleep(0.1)


def naming(directory: str) -> list[list[str]]:
    """Command lines of processes that name the directory of a cluster."""
    lines = [process.info["cmdline"] or [] for process in psutil.process_iter(["cmdline"])]
    return [line for line in lines if any(directory in word for word in line)]
