"""Faults for a made-up fabric: each is drawn from a seed, injected for the time of a context, and taken back.

What a fault `expects` is for scoring alone: whoever diagnoses sees measurements.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from cluster.fabric.findings import Finding, Kind
from tests.system.fabric import foreign
from tests.system.fabric.compute_quota import compute_quota
from tests.system.fabric.hosts import FabricOfHosts, Host, run_command, shaping
from tests.system.fabric.ranks import Ranks

_FIRMNESS = 1.05
"""Datagrams are lost in a full queue too, which gives TCP a little more than what they should leave to it."""
_LOSS = (0.04, 0.06)
"""Shares of packets to lose. At four percent, TCP on these links loses a quarter of its rate; at eight, four fifths."""
Injection = Callable[[FabricOfHosts, Ranks], contextlib.AbstractContextManager[None]]


@dataclass(frozen=True, kw_only=True)
class Expected:
    """The finding that a fault must lead to."""

    kind: Kind
    hosts: tuple[str, ...]
    """bad_path: sender, receiver."""

    def is_met_by(self, finding: Finding) -> bool:
        """The same kind at the same place."""
        if finding.kind != self.kind:
            return False
        if self.kind == "bad_path":
            return finding.hosts == self.hosts
        return set(finding.hosts) == set(self.hosts)


@dataclass(frozen=True, kw_only=True)
class Fault:
    """Something to inject, and what it is known by."""

    name: str
    settings: Mapping[str, Any]
    """Plain data for the record. `keep` is the share that is left of the bandwidth, or of the compute."""
    expected: tuple[Expected, ...]
    """Any one of these is right. Empty: there is nothing to find."""
    inject: Injection

    def is_met_by(self, finding: Finding) -> bool:
        """Whether the finding tells this fault."""
        return any(way.is_met_by(finding) for way in self.expected)


def slow_sender(host: Host, keep: float) -> Fault:
    """What leaves the host does so at `keep` of its link's rate."""

    @contextlib.contextmanager
    def inject(fabric: FabricOfHosts, ranks: Ranks) -> Iterator[None]:
        fabric.set_rate_out(host, keep * fabric.link_mbit)
        try:
            yield
        finally:
            fabric.set_rate_out(host)

    return _fault("slow_sender", {"host": host.name, "keep": keep}, inject, ("slow_sender", (host.name,)))


def slow_receiver(host: Host, keep: float) -> Fault:
    """What comes to the host does so at `keep` of its link's rate."""

    @contextlib.contextmanager
    def inject(fabric: FabricOfHosts, ranks: Ranks) -> Iterator[None]:
        fabric.set_rate_in(host, keep * fabric.link_mbit)
        try:
            yield
        finally:
            fabric.set_rate_in(host)

    return _fault("slow_receiver", {"host": host.name, "keep": keep}, inject, ("slow_receiver", (host.name,)))


def slow_link(host: Host, keep: float) -> Fault:
    """Both ways."""
    ways = (slow_sender(host, keep), slow_receiver(host, keep))

    @contextlib.contextmanager
    def inject(fabric: FabricOfHosts, ranks: Ranks) -> Iterator[None]:
        with ways[0].inject(fabric, ranks), ways[1].inject(fabric, ranks):
            yield

    return _fault("slow_link", {"host": host.name, "keep": keep}, inject, ("slow_link", (host.name,)))


def slow_host(host: Host, keep: float) -> Fault:
    """Its rank gets `keep` of a core."""

    @contextlib.contextmanager
    def inject(fabric: FabricOfHosts, ranks: Ranks) -> Iterator[None]:
        with compute_quota(ranks.process_id(host), keep):
            yield

    return _fault("slow_host", {"host": host.name, "keep": keep}, inject, ("slow_host", (host.name,)))


def bad_path(sender: Host, receiver: Host, keep: float, *, both_ways: bool = False) -> Fault:
    """Between these two alone; others share the sender's link as ever."""

    @contextlib.contextmanager
    def inject(fabric: FabricOfHosts, ranks: Ranks) -> Iterator[None]:
        ways = [(sender, receiver), (receiver, sender)] if both_ways else [(sender, receiver)]
        try:
            for here, there in ways:
                _slow_path(fabric, here, there, keep)
            yield
        finally:
            for here, _ in ways:
                fabric.set_rate_out(here)

    names = (sender.name, receiver.name)
    settings = {"hosts": list(names), "keep": keep, "both_ways": both_ways}
    if both_ways:
        return _fault("bad_path", settings, inject, ("bad_path", names), ("bad_path", names[::-1]))
    return _fault("bad_path", settings, inject, ("bad_path", names))


def _slow_path(fabric: FabricOfHosts, sender: Host, receiver: Host, keep: float) -> None:
    """What goes to one address has a queue of its own below the link's rate; all together have the link's rate."""
    whole, part = (round(share * fabric.link_mbit * 1e6) for share in (1.0, keep))
    run_command("tc", "-n", sender.namespace, "qdisc", "delete", "dev", "eth0", "root")
    queue = "burst 5000 cburst 5000 quantum 4500"
    limit = shaping(keep * fabric.link_mbit).split()[-1]
    run_command(
        *("tc", "-n", sender.namespace, "-batch", "-"),
        stdin=f"""qdisc add dev eth0 root handle 1: htb default 10
class add dev eth0 parent 1: classid 1:1 htb rate {whole}bit ceil {whole}bit {queue}
class add dev eth0 parent 1:1 classid 1:10 htb rate {whole - part // 2}bit ceil {whole}bit {queue}
class add dev eth0 parent 1:1 classid 1:20 htb rate {part // 2}bit ceil {part}bit {queue}
qdisc add dev eth0 parent 1:10 bfifo limit {shaping(fabric.link_mbit).split()[-1]}
qdisc add dev eth0 parent 1:20 bfifo limit {limit}
filter add dev eth0 parent 1: protocol ip prio 1 u32 match ip dst {receiver.address}/32 flowid 1:20
""",
    )


def congested_uplink(fabric: FabricOfHosts, keep: float, *, out_of: tuple[int, ...]) -> Fault:
    """Foreign datagrams leave `keep` of what the hosts of a leaf can send over the uplink, out of these leaves."""

    @contextlib.contextmanager
    def inject(fabric: FabricOfHosts, ranks: Ranks) -> Iterator[None]:
        mbit = _FIRMNESS * (fabric.uplink_mbit - keep * fabric.needed_mbit)
        with contextlib.ExitStack() as stack:
            for leaf in out_of:
                stack.enter_context(foreign.datagrams(fabric, *_across(fabric, leaf), mbit))
            yield

    settings = {"keep": keep, "out_of": list(out_of), "traffic": "udp"}
    return _fault("congested_uplink", settings, inject, ("congested_uplink", _names(fabric)))


def contended_uplink(fabric: FabricOfHosts, streams: int, *, out_of: tuple[int, ...]) -> Fault:
    """Foreign TCP streams take their share of the uplink, out of these leaves."""

    @contextlib.contextmanager
    def inject(fabric: FabricOfHosts, ranks: Ranks) -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            for leaf in out_of:
                stack.enter_context(foreign.streams(*_across(fabric, leaf), streams))
            yield

    own = len(fabric.hosts) // 2
    keep = fabric.uplink_mbit * own / (own + streams) / fabric.needed_mbit
    settings = {"keep": keep, "out_of": list(out_of), "traffic": f"tcp x {streams}"}
    return _fault("congested_uplink", settings, inject, ("congested_uplink", _names(fabric)))


def _across(fabric: FabricOfHosts, leaf: int) -> tuple[Host, Host]:
    """A foreign host of this leaf, and one of the other. Each takes part in one direction only."""
    sender = next(host for host in fabric.foreign if host.leaf == leaf)
    return sender, [host for host in fabric.foreign if host.leaf != leaf][-1]


def incast(fabric: FabricOfHosts, victim: Host, keep: float, *, senders: int) -> Fault:
    """Foreign datagrams from several hosts leave `keep` of one host's link into it."""

    @contextlib.contextmanager
    def inject(fabric: FabricOfHosts, ranks: Ranks) -> Iterator[None]:
        mbit = _FIRMNESS * (1 - keep) * fabric.link_mbit / senders
        with contextlib.ExitStack() as stack:
            for sender in fabric.foreign[:senders]:
                stack.enter_context(foreign.datagrams(fabric, sender, victim, mbit))
            yield

    settings = {"host": victim.name, "keep": keep, "senders": senders, "traffic": "udp"}
    return _fault("incast", settings, inject, ("slow_receiver", (victim.name,)))


def contended_incast(fabric: FabricOfHosts, victim: Host, *, senders: int) -> Fault:
    """Foreign TCP streams, one a sender, share one host's link with what else comes to it."""

    @contextlib.contextmanager
    def inject(fabric: FabricOfHosts, ranks: Ranks) -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            stack.enter_context(foreign.sink(victim))
            for sender in fabric.foreign[:senders]:
                stack.enter_context(foreign.streams_into(sender, victim, 1))
            yield

    settings = {"host": victim.name, "keep": 1 / (1 + senders), "senders": senders, "traffic": "tcp"}
    return _fault("incast", settings, inject, ("slow_receiver", (victim.name,)))


def loss_out(host: Host, share: float) -> Fault:
    """This share of the packets that leave the host never comes to its leaf."""

    @contextlib.contextmanager
    def inject(fabric: FabricOfHosts, ranks: Ranks) -> Iterator[None]:
        # Dropped at the leaf: a packet dropped within its host is no loss to TCP, which is told and tries again.
        with _dropping(fabric.switches, ("-m", "physdev", "--physdev-in", host.port), share):
            fabric.set_filtering(True)
            try:
                yield
            finally:
                fabric.set_filtering(False)

    return _fault("loss_out", {"host": host.name, "loss": share}, inject, ("slow_sender", (host.name,)))


def loss_in(host: Host, share: float) -> Fault:
    """This share of the packets that come to the host is thrown away by it."""

    @contextlib.contextmanager
    def inject(fabric: FabricOfHosts, ranks: Ranks) -> Iterator[None]:
        with _dropping(host.namespace, ("-i", "eth0"), share):
            yield

    return _fault("loss_in", {"host": host.name, "loss": share}, inject, ("slow_receiver", (host.name,)))


@contextlib.contextmanager
def _dropping(namespace: str, match: tuple[str, ...], share: float) -> Iterator[None]:
    rule = (*match, "-m", "statistic", "--mode", "random", "--probability", f"{share:.4f}", "-j", "DROP")
    command = ("ip", "netns", "exec", namespace, "iptables", "-w", "-t", "raw")
    run_command(*command, "-A", "PREROUTING", *rule)
    try:
        yield
    finally:
        run_command(*command, "-D", "PREROUTING", *rule)


def gone_rank(rng: np.random.Generator, fabric: FabricOfHosts) -> Fault:
    """A rank is stopped or killed, at a moment up to three seconds after the injection. Never rank 0, which reports."""
    host = fabric.hosts[rng.integers(1, len(fabric.hosts))]
    moment_s = round(float(rng.uniform(0.0, 3.0)), 2)
    sent = (signal.SIGSTOP, signal.SIGKILL)[rng.integers(2)]

    @contextlib.contextmanager
    def inject(fabric: FabricOfHosts, ranks: Ranks) -> Iterator[None]:
        timer = threading.Timer(moment_s, os.kill, (ranks.process_id(host), sent))
        timer.start()
        try:
            yield
        finally:
            timer.cancel()
            timer.join()

    settings = {"host": host.name, "signal": sent.name, "moment_s": moment_s}
    return _fault("gone_rank", settings, inject, ("missing_rank", (host.name,)))


def no_fault() -> Fault:
    """Nothing is wrong."""
    return _fault("none", {}, lambda fabric, ranks: contextlib.nullcontext())


def _names(fabric: FabricOfHosts) -> tuple[str, ...]:
    return tuple(host.name for host in fabric.hosts)


def _fault(name: str, settings: Mapping[str, Any], inject: Injection, *expected: tuple[Kind, tuple[str, ...]]) -> Fault:
    return Fault(
        name=name,
        settings=settings,
        expected=tuple(Expected(kind=kind, hosts=hosts) for kind, hosts in expected),
        inject=inject,
    )


def draw_fault(rng: np.random.Generator, name: str, fabric: FabricOfHosts) -> Fault:
    """A fault of that name (see `FAULTS`), at a place and of a strength drawn from `rng`.

    Bandwidth: 22 to 70 % is lost, compute: 10 to 60 %.
    """
    hosts = fabric.hosts
    host = hosts[rng.integers(len(hosts))]
    keep = round(float(rng.uniform(0.3, 0.78)), 3)
    elastic = bool(rng.integers(2))
    leaves = ((0,), (1,), (0, 1))[rng.integers(3)]
    if name == "bad_path":
        first, second = rng.choice(len(hosts), size=2, replace=False)
        return bad_path(hosts[first], hosts[second], keep, both_ways=bool(rng.integers(2)))
    if name == "congested_uplink":
        if elastic:
            return contended_uplink(fabric, int(rng.integers(3, 9)), out_of=leaves)
        return congested_uplink(fabric, keep, out_of=leaves)
    if name == "incast":
        if elastic:
            return contended_incast(fabric, host, senders=int(rng.integers(1, 3)))
        return incast(fabric, host, keep, senders=int(rng.integers(2, len(fabric.foreign) + 1)))
    draws: dict[str, Callable[[], Fault]] = {
        "none": no_fault,
        "slow_sender": lambda: slow_sender(host, keep),
        "slow_receiver": lambda: slow_receiver(host, keep),
        "slow_link": lambda: slow_link(host, keep),
        "slow_host": lambda: slow_host(host, round(float(rng.uniform(0.4, 0.9)), 3)),
        "loss_out": lambda: loss_out(host, round(float(rng.uniform(*_LOSS)), 3)),
        "loss_in": lambda: loss_in(host, round(float(rng.uniform(*_LOSS)), 3)),
    }
    return draws[name]()


FAULTS = (
    *("slow_sender", "slow_receiver", "slow_link", "slow_host", "bad_path", "congested_uplink", "incast"),
    *("loss_out", "loss_in"),
)
"""What `draw_fault` can draw, `none` aside."""


def draw_two_faults(rng: np.random.Generator, fabric: FabricOfHosts) -> tuple[Fault, ...]:
    """Two faults of different kinds at different hosts, of which one at most needs the foreign hosts."""
    while True:
        names = rng.choice(FAULTS, size=2, replace=False)
        if not set(names) & {"incast"} or not set(names) & {"congested_uplink"}:
            two = tuple(draw_fault(rng, name, fabric) for name in names)
            places = [_places(fault) for fault in two]
            if not places[0] & places[1]:
                return two


def _places(fault: Fault) -> set[str]:
    """Hosts that it is at; an uplink is at none."""
    if fault.name == "congested_uplink":
        return set()
    return {name for way in fault.expected for name in way.hosts}
