"""Faults of a simulated fabric: what each does to links and hosts, what a diagnosis is expected to say, and random draws."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

from cluster.fabric.findings import Finding, Kind
from cluster.fabric.simulation.topology import Topology

Injection = Literal[
    "none",
    "slow_host",
    "slow_sender",
    "slow_receiver",
    "slow_link",
    "bad_path",
    "congested_uplink",
    "incast",
    "packet_loss",
    "missing_rank",
]
"""What is done to the fabric. Most are named as the finding that they shall lead to. bad_path: a cable between a leaf and a
spine is slow, one way or both; where leaves have a single cable, one pair of hosts. congested_uplink: foreign traffic on all
cables of a leaf, one way or both. incast: foreign traffic into one host, a slow receiver. packet_loss: a host's link loses
packets, a slow sender or receiver whose rates vary much."""
INJECTIONS: tuple[Injection, ...] = get_args(Injection)

_BANDWIDTH_KEPT = (0.3, 0.8)
_COMPUTE_KEPT = (0.4, 0.9)
_CALLS_BEFORE_DEATH = 4


@dataclass(frozen=True, kw_only=True)
class LinkFault:
    """What is wrong with one link."""

    link: int
    keep: float
    """Share of its capacity (of what the own flows need, where it has more) that is left."""
    varies: float = 0.0
    """Standard deviation of the logarithm of what is left, from one round to the next."""
    queue_round_trips: float = 0.0
    """How long a packet waits in its queue, in the fabric's round-trip times, while foreign traffic fills it."""


@dataclass(frozen=True, kw_only=True)
class Fault:
    """One thing that is wrong with a fabric, and how a right finding is recognised. The diagnosis never sees it."""

    injection: Injection
    expected: Kind | None
    """None: nothing is wrong."""
    keep: float
    """Share of bandwidth, or of the speed of compute, that is left."""
    endpoint: int | None = None
    """The culprit; one end of it for a path, one of its endpoints for an uplink."""
    links: tuple[LinkFault, ...] = ()
    pairs: tuple[tuple[int, int], ...] = ()
    """Sender and receiver of paths that are slow, where they share their links with healthy ones."""
    compute_keep: float = 1.0
    missing_from_call: int | None = None
    """The measurement from which on the endpoint answers no more."""

    def recognised(self, finding: Finding, topology: Topology) -> bool:
        """Whether `finding` names this fault: its kind, its hosts and, where hosts have several rails, its rail.

        A slow cable: a pair of hosts whose traffic crosses it. An uplink: all hosts of its leaf (in a fabric of two leaves,
        where the uplink is the same for both, also the other's, or all).
        """
        if finding.kind != self.expected:
            return False
        if self.expected == "bad_path":
            return self._crosses(finding, topology)
        if topology.rails > 1 and not self._on_its_rail(finding, topology):
            return False
        return set(finding.hosts) in self._culprits(topology)

    def _on_its_rail(self, finding: Finding, topology: Topology) -> bool:
        """A host computes, and goes missing, as a whole; a network card is one of several."""
        if self.expected in ("slow_host", "missing_rank"):
            return True
        rails = {rank % topology.rails for rank in finding.ranks}
        return self.endpoint is not None and rails == {self.endpoint % topology.rails}

    def described(self, topology: Topology) -> str:
        """Kind and place in a few words."""
        if self.expected is None or self.endpoint is None:
            return self.injection
        if self.pairs:
            return f"{self.expected} " + ",".join(f"h{sender}->h{receiver}" for sender, receiver in self.pairs)
        place = f"leaf-{topology.leaf_of[self.endpoint]}" if self.injection in ("bad_path", "congested_uplink") else ""
        return f"{self.expected} {place or f'h{topology.host_of[self.endpoint]}'}"

    def _culprits(self, topology: Topology) -> list[set[str]]:
        if self.endpoint is None:
            return []
        if self.expected != "congested_uplink":
            return [{f"h{topology.host_of[self.endpoint]}"}]
        leaves = [
            {f"h{host}" for host in topology.host_of[topology.leaf_of == leaf]} for leaf in self._leaves(topology)
        ]
        return [*leaves, set.union(*leaves)]

    def _leaves(self, topology: Topology) -> list[int]:
        own = int(topology.leaf_of[self.endpoint])
        return [0, 1] if topology.num_leaves == 2 else [own]

    def _crosses(self, finding: Finding, topology: Topology) -> bool:
        if len(finding.ranks) != 2:
            return False
        pair = (finding.ranks[0], finding.ranks[1])
        if self.pairs:
            return pair in self.pairs
        return bool(np.isin(topology.routes(np.array([pair])), [fault.link for fault in self.links]).any())


HEALTHY = Fault(injection="none", expected=None, keep=1.0)


def draw_fault(rng: np.random.Generator, injection: Injection, topology: Topology) -> Fault:
    """A fault of a kind at a random place: 20 to 70 % of bandwidth, or 10 to 60 % of compute, are lost."""
    endpoint = int(rng.integers(topology.num_endpoints))
    keep = float(rng.uniform(*(_COMPUTE_KEPT if injection == "slow_host" else _BANDWIDTH_KEPT)))
    match injection:
        case "none":
            return HEALTHY
        case "slow_host":
            return _slow_host(rng, topology, endpoint, keep)
        case "bad_path":
            return _bad_path(rng, topology, endpoint, keep)
        case "congested_uplink":
            return _congested_uplink(rng, topology, endpoint, keep)
        case "missing_rank":
            call = int(rng.integers(_CALLS_BEFORE_DEATH))
            return Fault(
                injection=injection, expected="missing_rank", keep=0.0, endpoint=endpoint, missing_from_call=call
            )
    return _slow_endpoint(rng, topology, endpoint, keep, injection)


def draw_two_faults(
    rng: np.random.Generator, injections: Sequence[Injection], topology: Topology
) -> tuple[Fault, Fault]:
    """Two faults of different kinds at different hosts, and at different leaves where there are more than two."""
    kinds = rng.choice(np.array(injections, dtype=object), 2, replace=False)
    first = draw_fault(rng, kinds[0], topology)
    while True:
        second = draw_fault(rng, kinds[1], topology)
        if not _same_place(first, second, topology):
            return first, second


def _same_place(first: Fault, second: Fault, topology: Topology) -> bool:
    if first.endpoint is None or second.endpoint is None:
        return False
    ends = [{*sum(fault.pairs, ()), fault.endpoint} for fault in (first, second)]
    shared = topology.num_leaves > 2 and topology.leaf_of[first.endpoint] == topology.leaf_of[second.endpoint]
    return bool(shared or ends[0] & ends[1])


def _slow_host(rng: np.random.Generator, topology: Topology, endpoint: int, keep: float) -> Fault:
    """Half of them cannot feed their link either, and lose up to 40 % of it."""
    network = float(rng.uniform(max(keep, 0.6), 1.0)) if rng.random() < 0.5 else 1.0
    links = (topology.out_of(endpoint), topology.into(endpoint)) if network < 1 else ()
    return Fault(
        injection="slow_host",
        expected="slow_host",
        keep=keep,
        endpoint=endpoint,
        links=tuple(LinkFault(link=link, keep=network) for link in links),
        compute_keep=keep,
    )


def _slow_endpoint(
    rng: np.random.Generator, topology: Topology, endpoint: int, keep: float, injection: Injection
) -> Fault:
    out, into = topology.out_of(endpoint), topology.into(endpoint)
    ends: dict[Kind, tuple[int, ...]] = {"slow_sender": (out,), "slow_receiver": (into,), "slow_link": (out, into)}
    varies = queue = 0.0
    expected: Kind = "slow_receiver"
    match injection:
        case "slow_sender" | "slow_link":
            expected = injection
        case "packet_loss":
            expected = "slow_sender" if rng.random() < 0.5 else "slow_receiver"
            varies = float(rng.uniform(0.05, 0.2))
        case "incast":
            varies, queue = float(rng.uniform(0.05, 0.15)), float(rng.uniform(3, 30))
    return Fault(
        injection=injection,
        expected=expected,
        keep=keep,
        endpoint=endpoint,
        links=tuple(LinkFault(link=link, keep=keep, varies=varies, queue_round_trips=queue) for link in ends[expected]),
    )


def _bad_path(rng: np.random.Generator, topology: Topology, endpoint: int, keep: float) -> Fault:
    if topology.spines > 1:
        cable = topology.cable(int(topology.leaf_of[endpoint]), int(rng.integers(topology.spines)))
        links = _one_way_or_both(rng, cable)
        return Fault(
            injection="bad_path",
            expected="bad_path",
            keep=keep,
            endpoint=endpoint,
            links=tuple(LinkFault(link=link, keep=keep) for link in links),
        )
    other = int((endpoint + 1 + rng.integers(topology.num_endpoints - 1)) % topology.num_endpoints)
    pairs = ((endpoint, other), (other, endpoint))
    return Fault(
        injection="bad_path",
        expected="bad_path",
        keep=keep,
        endpoint=endpoint,
        pairs=pairs if rng.random() < 1 / 3 else pairs[:1],
    )


def _congested_uplink(rng: np.random.Generator, topology: Topology, endpoint: int, keep: float) -> Fault:
    """Foreign traffic is unevenly spread over a leaf's cables, bursty, and keeps a queue at each."""
    leaf = int(topology.leaf_of[endpoint])
    both = np.array([topology.cable(leaf, spine) for spine in range(topology.spines)])
    links = both[:, _one_way_or_both(rng, (0, 1))].reshape(-1)
    spread = 0.1 * rng.standard_normal(len(links)) * (topology.spines > 1)
    kept: NDArray[np.float64] = np.clip(keep + spread - spread.mean(), 0.15, 0.95)
    varies, queue = float(rng.uniform(0.05, 0.2)), float(rng.uniform(2, 30))
    return Fault(
        injection="congested_uplink",
        expected="congested_uplink",
        keep=keep,
        endpoint=endpoint,
        links=tuple(
            LinkFault(link=int(link), keep=float(share), varies=varies, queue_round_trips=queue)
            for link, share in zip(links, kept, strict=True)
        ),
    )


def _one_way_or_both(rng: np.random.Generator, both: tuple[int, int]) -> tuple[int, ...]:
    return (both[:1], both[1:], both)[int(rng.integers(3))]
