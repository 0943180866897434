"""Foreign hosts that send: the processes of `traffic.py`, started in their namespaces and ended by their process id."""

from __future__ import annotations

import contextlib
import select
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from tests.system.fabric.hosts import FabricOfHosts, Host, run_command, shaping

_TRAFFIC = Path(__file__).with_name("traffic.py")
_PORT = "9009"
_QUEUE_BYTES = 1_000_000
_START_SECONDS = 30.0


@contextlib.contextmanager
def datagrams(fabric: FabricOfHosts, sender: Host, receiver: Host, mbit: float) -> Iterator[None]:
    """`sender` sends `mbit` Mbit/s to `receiver`, which drops them: nobody listens, and nobody is to complain."""
    drop = ("PREROUTING", "-p", "udp", "-s", sender.address, "--dport", _PORT, "-j", "DROP")
    command = ("ip", "netns", "exec", receiver.namespace, "iptables", "-w", "-t", "raw")
    run_command(*command, "-A", *drop)
    try:
        # The link sets the rate: exact, however the machine's cores are shared. Its queue is longer than what the sender's
        # socket holds, so that the sender waits: it would take a core for datagrams that are dropped at once.
        fabric.set_queue(sender.namespace, "eth0", shaping(mbit, queue_bytes=_QUEUE_BYTES))
        with _running(sender, "udp", receiver.address):
            yield
    finally:
        fabric.set_rate_out(sender)
        run_command(*command, "-D", *drop)


@contextlib.contextmanager
def streams(sender: Host, receiver: Host, connections: int) -> Iterator[None]:
    """TCP streams without end from one to the other."""
    with sink(receiver), streams_into(sender, receiver, connections):
        yield


@contextlib.contextmanager
def sink(receiver: Host) -> Iterator[None]:
    """`receiver` takes in what `streams_into` sends it."""
    with _running(receiver, "sink"):
        yield


@contextlib.contextmanager
def streams_into(sender: Host, receiver: Host, connections: int) -> Iterator[None]:
    """TCP streams without end to a host that has a `sink`."""
    with _running(sender, "tcp", receiver.address, str(connections)):
        yield


@contextlib.contextmanager
def _running(host: Host, *words: str) -> Iterator[None]:
    # Without site packages an interpreter starts in a fraction of the time.
    command = ["ip", "netns", "exec", host.namespace, sys.executable, "-I", "-S", str(_TRAFFIC), *words]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            started, _, _ = select.select([process.stdout], [], [], _START_SECONDS)
            if not started or process.stdout.readline() != "ready\n":
                raise RuntimeError(f"{' '.join(command)} did not start")
            yield
        finally:
            process.kill()
