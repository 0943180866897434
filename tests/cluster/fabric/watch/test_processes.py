"""What the kernel tells of a process, and where the main thread of this one is."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace

import pytest

from cluster.fabric.watch.position import Position, main_thread_position
from cluster.fabric.watch.processes import (
    ProcessId,
    Usage,
    identify,
    is_starved,
    is_working,
    lives,
    this_process,
    usages,
)

IDLE = Usage(cpu_s=1.0, io_bytes=0, switches=0, stopped=False, is_runnable=False, in_disk_wait=False)


def _wait_for(ready: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not ready():
        assert time.monotonic() < deadline
        time.sleep(0.01)  # the kernel has no event for it


def test_a_process_by_its_number_and_its_start() -> None:
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    own = identify(child.pid)
    assert own is not None
    assert lives(own)
    assert not lives(ProcessId(pid=child.pid, start_ticks=own.start_ticks - 1))
    child.kill()
    _wait_for(lambda: not lives(own))  # though nobody has asked after its end yet
    child.wait()
    assert identify(child.pid) is None
    assert usages([own]) == {}


def test_a_stopped_process_and_a_busy_child_of_a_child() -> None:
    program = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'while True: pass'])"
    child = subprocess.Popen([sys.executable, "-c", program], start_new_session=True)
    try:
        own = identify(child.pid)
        assert own is not None
        start = usages([own])[own]
        _wait_for(lambda: usages([own])[own].cpu_s > start.cpu_s + 0.1)  # the child's
        os.kill(child.pid, signal.SIGSTOP)
        _wait_for(lambda: usages([own])[own].stopped)
    finally:
        os.killpg(child.pid, signal.SIGKILL)
        child.wait()


@pytest.mark.parametrize(
    ("change", "works"),
    [
        ({}, False),
        ({"cpu_s": 1.05}, False),
        ({"cpu_s": 1.2}, True),
        ({"io_bytes": 1_000_000}, True),
        ({"switches": 10}, False),
        ({"switches": 100}, True),
        ({"is_runnable": True}, True),
        ({"in_disk_wait": True}, True),
    ],
)
def test_what_counts_as_work(change: dict[str, float], works: bool) -> None:
    assert is_working(IDLE, replace(IDLE, **change), 2.0) is works


def test_a_rank_that_would_run_but_may_not_is_starved() -> None:
    assert is_starved(IDLE, replace(IDLE, is_runnable=True, cpu_s=1.1), 2.0)
    assert not is_starved(IDLE, replace(IDLE, is_runnable=True, cpu_s=2.9), 2.0)  # it holds the core, and says nothing
    assert not is_starved(IDLE, IDLE, 2.0)


def test_this_process() -> None:
    assert this_process().pid == os.getpid()


def _seen_from_a_thread(act: Callable[[], None], source: str, let_go: Callable[[], None]) -> Position:
    """Where the main thread is while it is in `act`, at the words `source`; afterwards `let_go` ends that."""
    seen: list[Position] = []

    def look() -> None:
        deadline = time.monotonic() + 20
        try:
            while not seen and time.monotonic() < deadline:
                time.sleep(0.01)  # nothing tells that it has come there
                position = main_thread_position()
                if any(source in line for line in position.lines[:1]):
                    seen.append(position)
        finally:
            let_go()

    thread = threading.Thread(target=look)
    thread.start()
    act()
    thread.join()
    assert seen, f"it was never at {source}"
    return seen[0]


def test_a_main_thread_that_sleeps_waits_for_nobody() -> None:
    end = threading.Event()

    def act() -> None:
        while not end.is_set():
            time.sleep(0.05)

    position = _seen_from_a_thread(act, ": time.sleep(0.05)", end.set)
    assert not position.waits
    assert "test_processes.py" in position.lines[0]


def test_a_main_thread_in_the_wait_of_native_code_waits_for_others() -> None:
    lock = threading.Lock()
    lock.acquire()

    class Work:
        wait = lock.acquire  # native code, as the wait of a communication is

    def act() -> None:
        Work.wait()

    assert _seen_from_a_thread(act, ": Work.wait()", lock.release).waits
