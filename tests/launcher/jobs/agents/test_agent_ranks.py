"""The ranks of real agents: their places, what they print, how they end, and how they are told to."""

import json
import os
import signal
from pathlib import Path

import pytest

from launcher.jobs.agents import head as head_module
from launcher.jobs.agents.agent_ranks import rank_environ
from launcher.jobs.agents.head import RankEnded, StopHeard
from launcher.jobs.agents.ports import FIRST_PORT, NUM_PORTS
from launcher.jobs.agents.protocol import (
    CHOSEN,
    HEAD,
    TOKEN,
    Start,
)
from tests.launcher.jobs.fake_agent import in_time
from tests.launcher.jobs.real_agents import ENTER, Job, ends, is_running, order_of, python, until


@pytest.fixture
def job(tmp_path: Path) -> Job:
    return Job(tmp_path)


def test_each_rank_knows_its_place(job: Job) -> None:
    async def test() -> None:
        async with job.head("n1", "n2") as attempt:
            command = python("mark('environ', json.dumps({**os.environ, 'cwd': os.getcwd()}))")
            await job.start(attempt, command, ranks_per_host=2, environ={"OWN": "1"}, working_directory=job.here)
            assert [end.code for end in await ends(attempt, 4)] == [0, 0, 0, 0]
            await attempt.release()
            assert [await job.agent_ends(host) for host in job.agents] == [(0, "")] * 2
        places = [json.loads((job.here / f"environ-{rank}").read_text()) for rank in range(4)]
        for rank, place in enumerate(places):
            assert (place["RANK"], place["WORLD_SIZE"]) == (str(rank), "4")
            assert (place["LOCAL_RANK"], place["LOCAL_WORLD_SIZE"]) == (str(rank % 2), "2")
            assert place["MEGA_HOST_NAME"] == f"n{rank // 2 + 1}"
            assert place["MEGA_ATTEMPT"] == "1"
            assert place["MEGA_FAILURE_FILE"] == str(job.logs / f"rank-{rank}.failure.json")
            assert place["MEGA_SUPERVISOR_PID"] == str(job.agents[place["MEGA_HOST_NAME"]].pid)
            assert (place["OWN"], place["cwd"]) == ("1", str(job.here))
            assert int(place["OMP_NUM_THREADS"]) >= 1
            assert not {HEAD, TOKEN} & place.keys()
        assert len({(place["MASTER_ADDR"], place["MASTER_PORT"]) for place in places}) == 1
        assert FIRST_PORT <= int(places[0]["MASTER_PORT"]) < FIRST_PORT + NUM_PORTS

    in_time(test)


def test_what_ranks_print_comes_before_their_end_and_into_their_logs(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(head_module, "_FOLD_S", 3600.0)  # one rank may be far behind the other
    script = """
    print("one of all", flush=True)
    print(f"mine {rank}", file=sys.stderr, flush=True)
    sys.stdout.write(f"no end of line {rank}")
    """

    async def test() -> None:
        async with job.head("n1") as attempt:
            await job.start(attempt, python(script), ranks_per_host=2)
            assert [end.last_line for end in await ends(attempt, 2)] == ["no end of line 0", "no end of line 1"]
            await attempt.release()
            assert await job.agent_ends("n1") == (0, "")
        assert sorted(job.lines) == [
            "[0-1] one of all",
            "[0] mine 0",
            "[0] no end of line 0",
            "[1] mine 1",
            "[1] no end of line 1",
        ]
        for rank in (0, 1):
            text = (job.logs / f"rank-{rank}.log").read_text()
            assert text == f"one of all\nmine {rank}\nno end of line {rank}"

    in_time(test)


def test_every_way_to_end_is_told(job: Job) -> None:
    script = """
    if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    if rank == 2:
        record = {"at": 1.5, "message": "the disk is full", "exit_code": 4, "traceback": "Traceback"}
        rank_process.failure_file(os.environ).write_text(json.dumps(record))
        sys.exit(4)
    if rank == 3:
        rank_process.failure_file(os.environ).write_text("{")
        sys.exit("the words of its end")
    """

    async def test() -> None:
        async with job.head("n1") as attempt:
            await job.start(attempt, python(script), ranks_per_host=4)
            found = await ends(attempt, 4)
            assert [end.code for end in found] == [0, -9, 4, 1]
            assert [end.record.message if end.record else None for end in found] == [
                None,
                None,
                "the disk is full",
                None,
            ]
            assert found[3].last_line == "the words of its end"
            assert {end.host for end in found} == {"n1"}
            assert not any(end.ended_by_us for end in found)

    in_time(test)


@pytest.mark.parametrize("command", ["/nowhere/python", "."])
def test_a_command_that_cannot_be_executed_is_the_end_of_its_rank(job: Job, command: str) -> None:
    async def test() -> None:
        async with job.head("n1", "n2") as attempt:
            await job.start(attempt, (command, "x"), working_directory=job.here)
            for end in await ends(attempt, 2):
                assert end.code == 127
                assert end.record is not None
                assert end.record.message.startswith(f"{command} cannot be started in {job.here} ({command}: ")
                assert end.record.message.endswith("): do all hosts see it?")
                assert end.last_line == end.record.message
            await attempt.release()
            assert (await job.agent_ends("n1"))[0] == 0

    in_time(test)


def test_a_folder_that_a_host_does_not_see_is_named(job: Job) -> None:
    async def test() -> None:
        async with job.head("n1") as attempt:
            await job.start(attempt, ("true",), working_directory=Path("/nowhere"))
            (end,) = await ends(attempt, 1)
            assert end.record is not None
            assert end.record.message == (
                "true cannot be started in /nowhere (/nowhere: No such file or directory): do all hosts see it?"
            )

    in_time(test)


def test_what_a_rank_has_started_ends_with_it(job: Job) -> None:
    script = "mark('pid', str(subprocess.Popen(['sleep', '600']).pid))\nos._exit(0)"

    async def test() -> None:
        async with job.head("n1") as attempt:
            await job.start(attempt, python(script))
            await ends(attempt, 1)
            pid = int((job.here / "pid-0").read_text())
            await until(lambda: not is_running(pid))

    in_time(test)


def test_who_keeps_a_ranks_output_open_does_not_hide_its_end(job: Job) -> None:
    """Such as a process with a session of its own, which nobody ends."""
    script = """
    other = subprocess.Popen(["sleep", "600"], start_new_session=True)
    mark("pid", str(other.pid))
    print("last words", flush=True)
    os._exit(3)
    """

    async def test() -> None:
        async with job.head("n1") as attempt:
            await job.start(attempt, python(script))
            try:
                (end,) = await ends(attempt, 1)
                assert (end.code, end.last_line) == (3, "last words")
            finally:
                os.kill(int((job.here / "pid-0").read_text()), signal.SIGKILL)

    in_time(test)


_COUNTS_SIGNALS = (
    ENTER
    + """
arrived = []
for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
    signal.signal(number, lambda number, frame: (arrived.append(signal.Signals(number).name), mark(arrived[-1])))
mark("ready")
while "SIGUSR2" not in arrived:
    time.sleep(0.01)
mark("arrived", json.dumps(arrived))
sys.exit(75)
"""
)


def test_a_stop_signal_reaches_every_rank_once_however_it_comes(job: Job) -> None:
    async def test() -> None:
        async with job.head("n1", "n2") as attempt:
            await job.start(attempt, python(_COUNTS_SIGNALS), ranks_per_host=2)
            await job.wait_for(*(f"ready-{rank}" for rank in range(4)))
            attempt.signal(signal.SIGTERM)
            attempt.signal(signal.SIGTERM)
            attempt.signal(signal.SIGUSR1)
            attempt.signal(signal.SIGUSR2)
            assert [end.code for end in await ends(attempt, 4)] == [75] * 4
            for rank in range(4):
                arrived = json.loads((job.here / f"arrived-{rank}").read_text())
                assert sorted(arrived) == ["SIGTERM", "SIGUSR1", "SIGUSR2"]

    in_time(test)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_a_stop_signal_to_the_agent_is_one_to_its_ranks(job: Job, number: signal.Signals) -> None:
    async def test() -> None:
        async with job.head("n1") as attempt:
            await job.start(attempt, python(_COUNTS_SIGNALS))
            await job.wait_for("ready-0")
            job.agents["n1"].send_signal(number)
            await job.wait_for(f"{number.name}-0")
            job.agents["n1"].send_signal(number)
            attempt.signal(signal.SIGUSR2)
            assert await attempt.next_event() == StopHeard(host="n1")
            while isinstance(end := await attempt.next_event(), StopHeard):
                pass
            assert isinstance(end, RankEnded)
            assert (end.code, end.ended_by_us) == (75, False)
            assert sorted(json.loads((job.here / "arrived-0").read_text())) == sorted([number.name, "SIGUSR2"])
            await attempt.release()
            assert (await job.agent_ends("n1"))[0] == 0

    in_time(test)


def test_a_stop_signal_before_a_rank_can_handle_it_is_not_lost(job: Job) -> None:
    script = "mark('born')\nwait_for('go')\nrank_process.enter(os.environ)\nhang()"

    async def test() -> None:
        async with job.head("n1") as attempt:
            await job.start(attempt, python(script))
            await job.wait_for("born-0")
            attempt.signal(signal.SIGTERM)
            attempt.signal(signal.SIGCONT)
            (job.here / "go").touch()
            assert [end.code for end in await ends(attempt, 1)] == [75]

    in_time(test)


def test_ranks_that_are_ended_are_asked_first_and_killed_then(job: Job) -> None:
    script = (
        ENTER
        + """
if rank == 1:
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
if rank == 2:
    sys.exit(5)
mark("ready")
hang()
"""
    )

    async def test() -> None:
        async with job.head("n1") as attempt:
            await job.start(attempt, python(script), ranks_per_host=3)
            await job.wait_for("ready-0", "ready-1")
            (first,) = await ends(attempt, 1)
            await attempt.end_ranks(5.0)
            asked, killed = await ends(attempt, 2)
            assert (first.code, first.ended_by_us) == (5, False)
            assert (asked.code, asked.ended_by_us) == (75, True)
            assert (killed.code, killed.ended_by_us) == (-9, True)

    in_time(test)


def test_a_full_log_keeps_its_end(job: Job) -> None:
    script = "for number in range(100_000):\n    print('x' * 9)\nprint('the cause')"

    async def test() -> None:
        async with job.head("n1") as attempt:
            await job.start(attempt, python(script), max_log_bytes=1000)
            (end,) = await ends(attempt, 1)
            assert end.last_line == "the cause"
            await attempt.release()
            assert await job.agent_ends("n1") == (0, "")
        text = (job.logs / "rank-0.log").read_text()
        assert text.startswith("xxxxxxxxx\n" * 100 + "\n(mega: this log is full, 1,000 bytes (launch.max_rank_log_mb)")
        assert text.endswith("xxxxxxxxx\nthe cause\n")
        assert len(text) < 70_000

    in_time(test)


def test_ranks_do_not_claim_their_agents_place_in_mpi(job: Job) -> None:
    mpi = {"PMIX_RANK": "1", "OMPI_COMM_WORLD_RANK": "1", "PMI_RANK": "1", "OMPI_MCA_btl": "tcp", "SLURM_PROCID": "1"}
    several = rank_environ(mpi, order_of(job, ("x",), (0, 1)), host="n1", num_cores=2)
    assert {name for name in mpi if name in several} == {"OMPI_MCA_btl", "SLURM_PROCID"}
    assert mpi.keys() <= rank_environ(mpi, order_of(job, ("x",), (0,)), host="n1", num_cores=2).keys()


def test_ranks_share_the_cores_unless_the_user_says_otherwise(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 16)

    def threads(ranks: tuple[int, ...], ranks_on_host: int, num_cores: int, **environ: str) -> str:
        order = order_of(job, ("x",), ranks)
        order = Start(**{**vars(order), "ranks_on_host": ranks_on_host})
        return rank_environ(environ, order, host="n1", num_cores=num_cores)["OMP_NUM_THREADS"]

    assert threads((0, 1, 2, 3), 4, 16) == "4"
    assert threads((0,), 4, 16) == "4"  # one agent a rank, all on the same cores
    assert threads((0,), 4, 4) == "4"  # one agent a rank, each on cores of its own
    assert threads((0, 1, 2, 3), 4, 2) == "1"
    assert threads((0, 1), 2, 16, OMP_NUM_THREADS="3") == "3"


def test_a_rank_knows_whether_its_host_or_the_user_has_set_its_threads(job: Job) -> None:
    order = order_of(job, ("x",))
    assert rank_environ({"OMP_NUM_THREADS": ""}, order, host="n1", num_cores=2)[CHOSEN] == "OMP_NUM_THREADS"
    inherited = {"OMP_NUM_THREADS": "3", CHOSEN: "OMP_NUM_THREADS"}
    assert CHOSEN not in rank_environ(inherited, order, host="n1", num_cores=2)
