"""Simulated fabrics: which directed links there are, how fast, and which of them a flow crosses. Pure numpy.

Leaves, spines and cores as in a folded Clos ("fat-tree", Al-Fares et al., SIGCOMM 2008): every leaf has one cable to each
spine of its pod, and the spines that have the same number in all pods share a group of cores. A leaf holds hosts, or, where
the fabric is rail-optimised, one rail of a unit of hosts; pods then hold leaves of one rail as long as there are enough.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from cluster.fabric.probing import Endpoint, Figures, Flows

Routing = Literal["ecmp", "static"]
"""ecmp: spine and core by a hash of sender and receiver, as RoCE's connections are spread: two flows may share a cable while
another idles. static: both by the receiver's number, as InfiniBand's tables for trees do (D-mod-k, Zahavi 2012): shifts of
all hosts by the same distance share no cable."""
Indices = NDArray[np.intp]

_MBIT = 1e6 / 8
_GBIT = 1e9 / 8
LOCAL_SPEED = 8.0
"""Endpoints of one host reach one another by a link of its own, so many times faster than a host's link."""


@dataclass(frozen=True, kw_only=True)
class Topology:
    """A folded Clos with E endpoints. Links are numbered; every cable is two links, one a direction."""

    name: str
    num_hosts: int
    rails: int
    """Endpoints a host has."""
    hosts_per_leaf: int
    spines: int
    """Cables of a leaf upwards, one to each spine of its pod."""
    leaves_per_pod: int
    cores: int
    """Cables of a spine upwards, one to each core of its group; 0 where there is one pod."""
    host_rate: float
    """Bytes a second of a host's link, each direction."""
    cable_rate: float
    """Bytes a second of a cable between leaf and spine, or spine and core, each direction."""
    round_trip_s: float
    """Of a small message through one leaf; each further level adds half of it."""
    routing: Routing
    salt: int = 0
    """Of the hash that spreads flows."""

    @property
    def num_endpoints(self) -> int:
        """E."""
        return self.num_hosts * self.rails

    @property
    def num_units(self) -> int:
        """Groups of hosts that share their leaves."""
        return -(-self.num_hosts // self.hosts_per_leaf)

    @property
    def num_leaves(self) -> int:
        """One for each unit and rail."""
        return self.num_units * self.rails

    @property
    def num_pods(self) -> int:
        """Leaves under the same spines are a pod."""
        return -(-self.num_leaves // self.leaves_per_pod)

    @cached_property
    def host_of(self) -> Indices:
        """(E,) number of each endpoint's host."""
        return np.arange(self.num_endpoints) // self.rails

    @cached_property
    def leaf_of(self) -> Indices:
        """(E,) number of each endpoint's leaf."""
        rail = np.arange(self.num_endpoints) % self.rails
        return rail * self.num_units + self.host_of // self.hosts_per_leaf

    @property
    def num_links(self) -> int:
        """All links; number `num_links` itself stands for "no link", which slows nothing."""
        return self._core_down + self.num_pods * self.spines * self.cores

    # The order of links: endpoints out, in; within hosts out, in; leaf to spine, back; spine to core, back.
    @property
    def _leaf_up(self) -> int:
        return 4 * self.num_endpoints

    @property
    def _leaf_down(self) -> int:
        return self._leaf_up + self.num_leaves * self.spines

    @property
    def _core_up(self) -> int:
        return self._leaf_down + self.num_leaves * self.spines

    @property
    def _core_down(self) -> int:
        return self._core_up + self.num_pods * self.spines * self.cores

    def out_of(self, endpoint: int) -> int:
        """The link from an endpoint to its leaf."""
        return endpoint

    def into(self, endpoint: int) -> int:
        """The link from its leaf to an endpoint."""
        return self.num_endpoints + endpoint

    def cable(self, leaf: int, spine: int) -> tuple[int, int]:
        """The links from a leaf to a spine and back."""
        number = leaf * self.spines + spine
        return self._leaf_up + number, self._leaf_down + number

    def capacities(self) -> Figures:
        """(num_links + 1,) bytes a second of each link, and infinity for "no link"."""
        rates = np.full(self.num_links + 1, self.cable_rate)
        rates[: 2 * self.num_endpoints] = self.host_rate
        rates[2 * self.num_endpoints : 4 * self.num_endpoints] = LOCAL_SPEED * self.host_rate
        rates[-1] = np.inf
        return rates

    def routes(self, flows: Flows) -> Indices:
        """(F, 6) links that each flow crosses, filled with `num_links`."""
        senders, receivers = flows[:, 0], flows[:, 1]
        leaves, pods = self.leaf_of[flows], self.leaf_of[flows] // self.leaves_per_pod
        spine, core = self._choices(senders, receivers)
        within_host = self.host_of[senders] == self.host_of[receivers]
        within_leaf = within_host | (leaves[:, 0] == leaves[:, 1])
        within_pod = within_leaf | (pods[:, 0] == pods[:, 1])
        num = self.num_endpoints
        cores = (pods * self.spines + spine[:, None]) * self.cores + core[:, None]
        return np.stack(
            [
                np.where(within_host, 2 * num + senders, senders),
                np.where(within_host, 3 * num + receivers, num + receivers),
                np.where(within_leaf, self.num_links, self._leaf_up + leaves[:, 0] * self.spines + spine),
                np.where(within_leaf, self.num_links, self._leaf_down + leaves[:, 1] * self.spines + spine),
                np.where(within_pod, self.num_links, self._core_up + cores[:, 0]),
                np.where(within_pod, self.num_links, self._core_down + cores[:, 1]),
            ],
            axis=1,
        )

    def _choices(self, senders: Indices, receivers: Indices) -> tuple[Indices, Indices]:
        if self.routing == "static":
            number = receivers // self.rails
            return number % self.spines, number // self.spines % max(self.cores, 1)
        bits = _hash(senders.astype(np.uint64) * np.uint64(self.num_endpoints) + receivers.astype(np.uint64), self.salt)
        spine = (bits >> np.uint64(32)) % np.uint64(self.spines)
        core = (bits & np.uint64(0xFFFFFFFF)) % np.uint64(max(self.cores, 1))
        return spine.astype(np.intp), core.astype(np.intp)

    def endpoints(self) -> tuple[Endpoint, ...]:
        """Host `h7` has ranks from 7 times the number of rails, and a machine of its own."""
        return tuple(
            Endpoint(
                rank=number,
                host=f"h{host}",
                machine=f"machine-{host}",
                rail=number % self.rails,
                leaf=f"leaf-{leaf}",
            )
            for number, (host, leaf) in enumerate(zip(self.host_of.tolist(), self.leaf_of.tolist(), strict=True))
        )


def _hash(values: NDArray[np.uint64], salt: int) -> NDArray[np.uint64]:
    """SplitMix64 (Steele, Lea and Flood, OOPSLA 2014), which wraps around by design."""
    with np.errstate(over="ignore"):
        bits = values + np.uint64((0x9E3779B97F4A7C15 * (salt + 1)) % 2**64)
        bits = (bits ^ (bits >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        bits = (bits ^ (bits >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return bits ^ (bits >> np.uint64(31))


def two_leaves(num_hosts: int = 8) -> Topology:
    """Two switches of half the hosts each, and an uplink that carries 1.25 times what a switch's hosts can send.

    50 Mbit/s a host: the hosts that tests build on one machine.
    """
    half = -(-num_hosts // 2)
    return Topology(
        name="two-leaves",
        num_hosts=num_hosts,
        rails=1,
        hosts_per_leaf=half,
        spines=1,
        leaves_per_pod=2,
        cores=0,
        host_rate=50 * _MBIT,
        cable_rate=1.25 * half * 50 * _MBIT,
        round_trip_s=3e-4,
        routing="ecmp",
    )


def fat_tree(
    num_hosts: int, *, rails: int = 1, oversubscription: float = 1.0, routing: Routing = "ecmp", salt: int = 0
) -> Topology:
    """Leaves of 32 hosts (8 where there are at most 256 of them), cables as fast as a host's 400 Gbit/s, pods of 32 leaves.

    oversubscription: what a leaf's hosts can send over what its cables can carry; the same from spines to cores.
    rails: with more than one, a leaf holds one rail of its hosts.
    """
    hosts_per_leaf = 32 if num_hosts * rails > 256 else 8
    num_leaves = -(-num_hosts // hosts_per_leaf) * rails
    spines = max(1, round(hosts_per_leaf / oversubscription))
    leaves_per_pod = min(32, num_leaves)
    return Topology(
        name="fat-tree" if rails == 1 else "rail",
        num_hosts=num_hosts,
        rails=rails,
        hosts_per_leaf=hosts_per_leaf,
        spines=spines,
        leaves_per_pod=leaves_per_pod,
        cores=0 if num_leaves <= leaves_per_pod else max(1, round(leaves_per_pod / oversubscription)),
        host_rate=400 * _GBIT,
        cable_rate=400 * _GBIT,
        round_trip_s=6e-6,
        routing=routing,
        salt=salt,
    )
