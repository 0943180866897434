"""Ports at which processes of a job meet: below those that a kernel gives out by itself."""

from __future__ import annotations

import random
import socket

FIRST_PORT, NUM_PORTS = 30000, 2700
"""Linux gives out ports from 32768 to whoever connects; those of ranks that srun starts by itself lie below these."""


def hold_port() -> socket.socket:
    """A socket that keeps a port which nobody else on this host has now, until it is closed. It does not listen.

    So nobody else is given the port while who waits for it has not opened it yet. Raises OSError where no port is left at all.
    """
    for port in random.sample(range(FIRST_PORT, FIRST_PORT + NUM_PORTS), NUM_PORTS):
        if (held := _bound(port)) is not None:
            return held
    held = socket.socket()
    held.bind(("", 0))
    return held


def _bound(port: int) -> socket.socket | None:
    held = socket.socket()
    try:
        held.bind(("", port))
    except OSError:
        held.close()
        return None
    return held
