"""Ranks on this machine. Each test starts a driver process that calls `run_local_ranks`, and small scripts as ranks."""

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

_TIMEOUT = 60

_DRIVER = """
import json, os, sys
from pathlib import Path
from launcher.errors import RankError
from launcher.local_ranks import Grace, run_local_ranks
logs, num_ranks, script = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
try:
    code = run_local_ranks(
        [], num_ranks=num_ranks, log_directory=logs, environ=os.environ, num_cores=6,
        say=lambda text: print("said:", text, flush=True), command=(sys.executable, "-c", script),
        grace=Grace(own_end=4.0, terminated=0.3, stopped=2.0),
    )
    print(json.dumps({"code": code}), flush=True)
except RankError as error:
    print(json.dumps({"error": str(error), "code": error.exit_code}), flush=True)
"""

# What a rank script begins with. `mark` leaves a file that the test waits for.
_PREAMBLE = """
import json, os, signal, sys, time
from pathlib import Path
from launcher import rank_process
rank, here = int(os.environ["RANK"]), Path(os.environ["TEST_DIRECTORY"])
def mark(name, content=""):
    partial = here / f".{name}-{rank}"
    partial.write_text(content)
    partial.rename(here / f"{name}-{rank}")
def fail(message, code=1, at=None):
    path = rank_process.failure_file(os.environ)
    record = {"at": at or time.time(), "message": message, "exit_code": code, "traceback": ""}
    path.write_text(json.dumps(record))
    sys.exit(code)
def meet(num_ranks):
    # One that starts late is not one that lives on after the others.
    mark("here")
    while not all((here / f"here-{other}").exists() for other in range(num_ranks)):
        time.sleep(0.01)
def hang():
    while True:
        time.sleep(60)
"""
_ENTER = "rank_process.enter(os.environ)\n"


class Driver:
    def __init__(self, directory: Path, num_ranks: int, script: str, environ: dict[str, str]) -> None:
        self.logs = directory / "logs"
        self.logs.mkdir()
        self._directory = directory
        self.process = subprocess.Popen(
            [sys.executable, "-c", _DRIVER, str(self.logs), str(num_ranks), _PREAMBLE + textwrap.dedent(script)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={**os.environ, "TEST_DIRECTORY": str(directory), **environ},
            start_new_session=True,
        )
        self.output = ""

    def result(self) -> dict:
        self.output, _ = self.process.communicate(timeout=_TIMEOUT)
        return json.loads(self.output[self.output.rindex("{") :])

    def wait_for(self, *names: str) -> None:
        for name in names:
            wait_until(lambda name=name: (self._directory / name).exists() or self.process.poll() is not None)
            assert (self._directory / name).exists(), f"the driver ended before {name} was there"

    def read(self, name: str) -> str:
        return (self._directory / name).read_text()


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + _TIMEOUT
    while not condition():
        assert time.monotonic() < deadline, "this took too long"
        time.sleep(0.01)


Start = Callable[..., Driver]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    drivers = []

    def start(num_ranks: int, script: str, **environ: str) -> Driver:
        drivers.append(Driver(tmp_path, num_ranks, script, environ))
        return drivers[-1]

    yield start
    for driver in drivers:
        if driver.process.poll() is None:
            driver.process.kill()
        driver.process.communicate()


def is_running(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state != "Z"


def test_each_rank_knows_its_place_and_only_rank_0_speaks_here(start: Start) -> None:
    driver = start(
        3,
        _ENTER
        + """
mark("environ", json.dumps(dict(os.environ)))
print("words of rank", rank, flush=True)
print("errors of rank", rank, file=sys.stderr, flush=True)
""",
        OMP_NUM_THREADS="",
    )
    assert driver.result() == {"code": 0}
    places = [json.loads(driver.read(f"environ-{rank}")) for rank in range(3)]
    for rank, place in enumerate(places):
        assert (place["RANK"], place["LOCAL_RANK"], place["WORLD_SIZE"]) == (str(rank), str(rank), "3")
        assert place["MASTER_ADDR"] == "127.0.0.1"
        assert place["OMP_NUM_THREADS"] == "2"  # six cores, three ranks
    assert len({place["MASTER_PORT"] for place in places}) == 1
    assert "words of rank 0" in driver.output
    assert "errors of rank 0" in driver.output
    assert "rank 1" not in driver.output
    assert (driver.logs / "rank-1.log").read_text() == "words of rank 1\nerrors of rank 1\n"
    assert not (driver.logs / "rank-0.log").exists()


def test_threads_that_the_user_chose_stay(start: Start) -> None:
    driver = start(2, _ENTER + "mark('threads', os.environ['OMP_NUM_THREADS'])", OMP_NUM_THREADS="5")
    assert driver.result() == {"code": 0}
    assert driver.read("threads-1") == "5"


def test_a_failing_rank_ends_the_others_and_its_reason_is_told(start: Start) -> None:
    driver = start(
        2,
        _ENTER
        + """
if rank == 1:
    fail("data/x.jsonl: the corpus is empty", 3)
signal.signal(signal.SIGTERM, signal.SIG_IGN)
hang()
""",
    )
    log = driver.logs / "rank-1.log"
    assert driver.result() == {"error": f"rank 1 of 2: data/x.jsonl: the corpus is empty (its log: {log})", "code": 3}


def test_the_first_cause_is_not_the_loss_of_a_peer(start: Start) -> None:
    driver = start(
        3,
        _ENTER
        + """
meet(3)
if rank == 2:
    fail("the disk is full", at=200.0)
fail("rank 0 of 3 lost the others in a barrier (Connection closed by peer)", at=100.0)
""",
    )
    assert driver.result()["error"].startswith("rank 2 of 3: the disk is full")


def test_the_earliest_failure_is_the_first_cause(start: Start) -> None:
    driver = start(2, _ENTER + "meet(2)\nfail(f'reason of rank {rank}', at=100.0 - rank)")
    assert driver.result()["error"].startswith("rank 1 of 2: reason of rank 1")


def test_a_rank_killed_by_a_signal_is_named(start: Start) -> None:
    driver = start(
        2,
        _ENTER
        + """
meet(2)
if rank == 1:
    os.kill(os.getpid(), signal.SIGKILL)
fail("rank 0 of 2 lost the others in an all-reduce")
""",
    )
    result = driver.result()
    assert result["code"] == 1
    assert result["error"].startswith(
        "rank 1 of 2 was killed by SIGKILL; the kernel does this when memory runs out (its log: "
    )
    assert "the same command continues from the last checkpoint" in result["error"]


def test_a_rank_that_left_no_reason_is_told_by_its_last_line(start: Start) -> None:
    driver = start(
        2, _ENTER + "if rank == 1:\n    print('Segments are at fault\\n', flush=True)\n    os._exit(5)\nhang()"
    )
    log = driver.logs / "rank-1.log"
    assert driver.result()["error"] == f"rank 1 of 2 ended with exit code 5: Segments are at fault (its log: {log})"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
def test_a_stop_signal_reaches_every_rank_once(start: Start, number: signal.Signals) -> None:
    driver = start(
        2,
        _ENTER
        + """
arrived = []
for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
    signal.signal(number, lambda number, frame: arrived.append(signal.Signals(number).name))
mark("ready")
while not arrived:
    time.sleep(0.01)
while not (here / "go").exists():
    time.sleep(0.01)
mark("arrived", json.dumps(arrived))
sys.exit(75)
""",
    )
    driver.wait_for("ready-0", "ready-1")
    driver.process.send_signal(number)
    if number != signal.SIGINT:  # a second Ctrl-C means something else
        driver.process.send_signal(number)
    (driver.logs.parent / "go").touch()
    assert driver.result() == {"code": 75}
    assert [json.loads(driver.read(f"arrived-{rank}")) for rank in (0, 1)] == [[number.name], [number.name]]


def test_a_hang_up_counts_as_sigterm(start: Start) -> None:
    driver = start(1, _ENTER + "signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))\nmark('ready')\nhang()")
    driver.wait_for("ready-0")
    driver.process.send_signal(signal.SIGHUP)
    assert driver.result() == {"code": 75}


def test_a_stop_signal_before_a_rank_can_handle_it_is_not_lost(start: Start) -> None:
    script = """
mark("born")
while not (here / "go").exists():
    time.sleep(0.01)
rank_process.enter(os.environ)
hang()
"""
    driver = start(2, script)
    driver.wait_for("born-0", "born-1")
    driver.process.send_signal(signal.SIGTERM)
    driver.process.send_signal(signal.SIGCONT)
    (driver.logs.parent / "go").touch()
    assert driver.result() == {"code": 75}


def test_a_second_ctrl_c_ends_at_once(start: Start) -> None:
    driver = start(2, _ENTER + "signal.signal(signal.SIGINT, lambda *_: mark('told'))\nmark('ready')\nhang()")
    driver.wait_for("ready-0", "ready-1")
    driver.process.send_signal(signal.SIGINT)
    driver.wait_for("told-0", "told-1")
    driver.process.send_signal(signal.SIGINT)
    result = driver.result()
    assert result["code"] == 130
    assert "ended before a checkpoint was saved; the same command continues" in result["error"]
    assert "said: Stopping after this step and saving; Ctrl-C again ends at once." in driver.output
    assert "said: Ending at once. The last complete checkpoint stays." in driver.output


def test_ranks_that_do_not_follow_one_that_has_stopped_are_ended(start: Start) -> None:
    driver = start(2, _ENTER + "if rank == 1:\n    sys.exit(75)\nhang()")
    assert driver.result() == {"code": 75}


def test_ranks_that_miss_one_that_has_stopped_have_stopped_too(start: Start) -> None:
    driver = start(
        2,
        _ENTER
        + "meet(2)\nif rank == 1:\n    sys.exit(75)\nfail('rank 0 of 2 lost the others in an all-reduce (Connection closed)')",
    )
    assert driver.result() == {"code": 75}


def test_a_rank_that_fails_beside_one_that_has_stopped_is_a_failure(start: Start) -> None:
    driver = start(2, _ENTER + "meet(2)\nif rank == 1:\n    sys.exit(75)\nfail('the disk is full')")
    assert driver.result() == {"error": "rank 0 of 2: the disk is full", "code": 1}


def test_a_rank_that_is_done_waits_for_nobody(start: Start) -> None:
    driver = start(
        2, _ENTER + "if rank == 0:\n    while not (here / 'done-1').exists():\n        time.sleep(0.01)\nmark('done')"
    )
    assert driver.result() == {"code": 0}


def test_ranks_die_with_their_launcher(start: Start) -> None:
    driver = start(2, _ENTER + "mark('pid', str(os.getpid()))\nhang()")
    driver.wait_for("pid-0", "pid-1")
    pids = [int(driver.read(f"pid-{rank}")) for rank in (0, 1)]
    assert all(map(is_running, pids))
    driver.process.kill()
    wait_until(lambda: not any(map(is_running, pids)))


def test_what_a_rank_has_started_ends_with_it(start: Start) -> None:
    driver = start(
        1, _ENTER + "import subprocess\nmark('pid', str(subprocess.Popen(['sleep', '600']).pid))\nos._exit(0)"
    )
    assert driver.result() == {"code": 0}
    pid = int(driver.read("pid-0"))
    wait_until(lambda: not is_running(pid))


def test_a_rank_leaves_without_tearing_its_libraries_down(start: Start) -> None:
    script = """
import atexit
atexit.register(os.abort)
sys.stdout.write("last words")
rank_process.leave(os.environ, 0)
"""
    driver = start(2, _ENTER + script)
    assert driver.result() == {"code": 0}
    assert (driver.logs / "rank-1.log").read_text() == "last words"
