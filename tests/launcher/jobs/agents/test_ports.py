"""A port that is held is nobody else's, and no kernel gives it out."""

import contextlib
import socket
from pathlib import Path

import pytest

from launcher.jobs.agents import ports
from launcher.jobs.agents.ports import FIRST_PORT, NUM_PORTS, hold_port


def number(held: socket.socket) -> int:
    return int(held.getsockname()[1])


def test_held_ports_differ_and_are_below_those_that_the_kernel_gives_out() -> None:
    with contextlib.ExitStack() as exits:
        held = [number(exits.enter_context(hold_port())) for _ in range(20)]
        assert len(set(held)) == 20
        assert all(FIRST_PORT <= port < FIRST_PORT + NUM_PORTS for port in held)
    lowest = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    if lowest < 32768:
        pytest.skip(f"this machine gives out ports from {lowest}")
    assert lowest >= FIRST_PORT + NUM_PORTS


def test_a_port_that_is_taken_is_passed_over_and_any_is_better_than_none(monkeypatch: pytest.MonkeyPatch) -> None:
    with hold_port() as first:
        monkeypatch.setattr(ports, "FIRST_PORT", number(first))
        monkeypatch.setattr(ports, "NUM_PORTS", 1)
        with hold_port() as second:
            assert number(second) != number(first)


def test_a_port_that_was_held_can_be_opened_at_once() -> None:
    held = hold_port()
    port = number(held)
    held.close()
    with socket.create_server(("", port)):
        pass
