"""Programs that start agents: how they end, and what they complain of."""

import asyncio
import os
import signal
import time
from pathlib import Path

import pytest

from launcher.errors import RunError
from launcher.jobs.backends.starter import Starter, hosts_in_words, last_words

_TIMEOUT = 30


def _start(tmp_path: Path, script: str) -> Starter:
    return Starter.start(["sh", "-c", script], environ=os.environ, output=tmp_path / "agents.log")


def _is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


async def _file(path: Path) -> str:
    deadline = time.monotonic() + _TIMEOUT
    while not path.exists() or not path.read_text().endswith("\n"):
        assert time.monotonic() < deadline
        await asyncio.sleep(0.01)
    return path.read_text()


def test_its_exit_code_and_its_output_are_kept(tmp_path: Path) -> None:
    async def run() -> int:
        starter = _start(tmp_path, "echo out; echo err >&2; exit 7")
        code = await asyncio.wait_for(starter.wait(), _TIMEOUT)
        await starter.end()
        await starter.end()
        return code

    assert asyncio.run(run()) == 7
    assert (tmp_path / "agents.log").read_text() == "out\nerr\n"


def test_a_signal_is_a_negative_code(tmp_path: Path) -> None:
    assert asyncio.run(asyncio.wait_for(_start(tmp_path, "kill -9 $$").wait(), _TIMEOUT)) == -signal.SIGKILL


def test_it_is_asked_to_end(tmp_path: Path) -> None:
    async def run() -> int:
        starter = _start(tmp_path, f"trap 'exit 3' TERM; echo ready > {tmp_path}/ready; while :; do sleep 0.05; done")
        await _file(tmp_path / "ready")
        await asyncio.wait_for(starter.end(), _TIMEOUT)
        return await starter.wait()

    assert asyncio.run(run()) == 3


def test_one_that_does_not_listen_is_killed_with_its_children(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("launcher.jobs.backends.starter._END_SECONDS", 0.2)

    async def run() -> tuple[int, int]:
        starter = _start(tmp_path, f"trap '' TERM; sleep 600 & echo $! > {tmp_path}/pid; wait; sleep 600")
        pid = int(await _file(tmp_path / "pid"))
        await asyncio.wait_for(starter.end(), _TIMEOUT)
        return pid, await starter.wait()

    pid, code = asyncio.run(run())
    assert code == -signal.SIGKILL
    deadline = time.monotonic() + _TIMEOUT
    while _is_running(pid):
        assert time.monotonic() < deadline


def test_what_it_leaves_in_its_group_ends_with_it(tmp_path: Path) -> None:
    async def run() -> int:
        starter = _start(tmp_path, f"sleep 600 & echo $! > {tmp_path}/pid")
        await asyncio.wait_for(starter.wait(), _TIMEOUT)
        return int(await _file(tmp_path / "pid"))

    pid = asyncio.run(run())
    deadline = time.monotonic() + _TIMEOUT
    while _is_running(pid):
        assert time.monotonic() < deadline


def test_a_program_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"no-such-mpirun cannot be started: .*No such file"):
        Starter.start(["no-such-mpirun"], environ={}, output=tmp_path / "agents.log")


_OPEN_MPI = """\
ssh: connect to host n3 port 22: No route to host
------------------------------------------------------------
A daemon failed to report back after being spawned. This could
  Local host:    n0
  Remote host:   n3
------------------------------------------------------------

"""


@pytest.mark.parametrize(
    ("text", "words", "hosts"),
    [
        (_OPEN_MPI, "ssh: connect to host n3 port 22: No route to host", ("n3",)),
        (
            "starting\nsrun: error: Task launch failed on node n1: timed out\n",
            "srun: error: Task launch failed",
            ("n1",),
        ),
        ("one\ntwo\n----\n", "two", ()),
        ("srun: unrecognized option '--x'\nTry \"srun --help\" for more information\n", "srun: unrecognized", ()),
        ("error: n30 and a.n3 and n0-ib are down\n", "error: n30", ()),
        ("error on n0, n1, n2, n3\n", "error on", ()),
        ("", "", ()),
    ],
)
def test_what_it_complains_of(tmp_path: Path, text: str, words: str, hosts: tuple[str, ...]) -> None:
    output = tmp_path / "agents.log"
    output.write_text(text)
    assert last_words(output).startswith(words)
    assert hosts_in_words(output, ["n0", "n1", "n2", "n3"]) == hosts


def test_nothing_was_said_where_there_is_no_file(tmp_path: Path) -> None:
    assert last_words(tmp_path / "missing") == ""
    assert hosts_in_words(tmp_path / "missing", ["n0"]) == ()
