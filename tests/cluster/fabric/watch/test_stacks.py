"""Stacks are taken from processes that must go on: none of them may come to harm."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from cluster.fabric.watch.stacks import stack_file

_RANK = """
import ctypes, json, sys, threading
from pathlib import Path
from cluster.fabric.watch.stacks import StackFile
file = StackFile(Path(sys.argv[1]), 3)
def deep(n):
    return [deep(n - 1) if n else [x for x in (y for y in range(5))] for _ in range(2)]
def busy():
    while True:
        deep(6)
        json.dumps({"a": [1, 2, {"b": 3}] * 50})
def main_waits():
    if sys.argv[2] == "held":
        print(file.signal, flush=True)
        ctypes.PyDLL(None).usleep(60_000_000)
    for _ in range(2):
        threading.Thread(target=busy, name="busy", daemon=True).start()
    print(file.signal, flush=True)
    for line in sys.stdin:
        file.write()
        print("written", flush=True)
main_waits()
"""


@contextmanager
def _rank(directory: Path, state: str) -> Iterator[tuple[subprocess.Popen[str], int]]:
    """A process with two busy threads, or one that holds the interpreter; and the signal that it listens to."""
    command = [sys.executable, "-c", _RANK, str(directory), state]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            yield process, int(process.stdout.readline())
        finally:
            process.kill()


def test_a_busy_process_survives_its_own_writing_and_the_signal(tmp_path: Path) -> None:
    with _rank(tmp_path, "busy") as (process, number):
        assert process.stdin is not None
        assert process.stdout is not None
        for _ in range(300):
            os.kill(process.pid, number)
            process.stdin.write("write\n")
            process.stdin.flush()
            assert process.stdout.readline() == "written\n", process.wait(timeout=10)
    text = stack_file(tmp_path, 3).read_text()
    assert "in busy" in text
    assert "in main_waits" in text


def test_a_process_whose_interpreter_is_held_says_where(tmp_path: Path) -> None:
    with _rank(tmp_path, "held") as (process, number):
        deadline = time.monotonic() + 20
        while "in main_waits" not in stack_file(tmp_path, 3).read_text():
            assert time.monotonic() < deadline, stack_file(tmp_path, 3).read_text()
            os.kill(process.pid, number)
            time.sleep(0.01)  # a file has no event to wait for
        assert process.poll() is None
