"""What stop signals do while the loop runs. The process under test is one of its own."""

from __future__ import annotations

import json
import signal
import subprocess
import sys

import pytest

_SCRIPT = """
import json, os, signal, sys
from megamodel.train.stop import StopRequest
def before(number, frame):
    raise SystemExit(75)
for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
    signal.signal(number, before)
def send(names):
    for name in names:
        os.kill(os.getpid(), getattr(signal, name))
during, after, fails = json.loads(sys.argv[1])
try:
    with StopRequest() as stop:
        assert not stop.requested
        send(during)
        print(stop.signal_name, flush=True)
        if fails:
            raise OSError("the disk is full")
except OSError:
    pass
send(after)
"""


def end(during: list[str], after: list[str] | None = None, *, fails: bool = False) -> tuple[int, str]:
    """Exit code and output after these signals inside of the `with`, and behind it."""
    arguments = json.dumps([during, after or [], fails])
    done = subprocess.run([sys.executable, "-c", _SCRIPT, arguments], capture_output=True, text=True, timeout=60)
    assert done.stderr == ""
    return done.returncode, done.stdout.strip()


@pytest.mark.parametrize(
    "signals",
    [["SIGUSR1", "SIGTERM"], ["SIGTERM", "SIGTERM"], ["SIGINT", "SIGTERM", "SIGUSR1"], ["SIGUSR1", "SIGINT"]],
)
def test_the_first_signal_is_noted_and_later_ones_change_nothing(signals: list[str]) -> None:
    assert end(signals) == (0, signals[0])


@pytest.mark.parametrize("signals", [["SIGINT", "SIGINT"], ["SIGTERM", "SIGINT", "SIGINT"]])
def test_a_second_ctrl_c_kills_the_process_at_once(signals: list[str]) -> None:
    assert end(signals) == (-signal.SIGINT, "")  # which shells call 130


def test_what_handled_signals_before_does_so_again() -> None:
    assert end([], ["SIGTERM"]) == (75, "None")


def test_after_a_failure_no_signal_ends_as_if_all_were_saved() -> None:
    assert end(["SIGUSR1"], ["SIGTERM"], fails=True) == (-signal.SIGTERM, "SIGUSR1")
