"""Faults come to where they belong, change something there, and are taken back."""

from __future__ import annotations

import json
import os
import re
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from cluster.fabric.findings import Finding, Kind
from tests.requirements import requires
from tests.system.fabric.diagnosing import is_told
from tests.system.fabric.faults import FAULTS, Expected, bad_path, draw_fault, draw_two_faults, no_fault, slow_sender
from tests.system.fabric.foreign import datagrams
from tests.system.fabric.hosts import FabricOfHosts, Host, run_command
from tests.system.fabric.ranks import HostRank, Ranks

pytestmark = requires("netns")

SEED = 3
SENT_BYTES = 1_000_000
DEADLINE_S = 90.0


def wait_for_ever(rank: HostRank) -> None:
    rank.parent.send("here")
    signal.pause()


@pytest.fixture(scope="module")
def fabric() -> Iterator[FabricOfHosts]:
    """A smaller one than that of other tests: its whole state is looked at many times."""
    with FabricOfHosts(hosts_per_leaf=2, foreign_per_leaf=1) as small:
        yield small


@pytest.fixture(scope="module")
def ranks(fabric: FabricOfHosts) -> Iterator[Ranks]:
    with Ranks(fabric, wait_for_ever) as waiting:
        assert {waiting.hear(number, timeout_s=60) for number in range(len(fabric.hosts))} == {"here"}
        yield waiting


def state_of(fabric: FabricOfHosts, ranks: Ranks) -> dict[str, object]:
    """All that a fault may change, without handles and counters, which differ each time."""
    namespaces = [fabric.switches, *(host.namespace for host in fabric.all_hosts)]
    processes = [ranks.process_id(host) for host in fabric.hosts]
    queues = {name: run_command("tc", "-n", name, "qdisc", "show") for name in namespaces}
    inside = {name: ("ip", "netns", "exec", name) for name in namespaces}
    return {
        "queues": {name: re.sub(r"(qdisc \w+) \w+:", r"\1", text) for name, text in queues.items()},
        "rules": {name: run_command(*inside[name], "iptables", "-w", "-t", "raw", "-S") for name in namespaces},
        "bridge": run_command(*inside[fabric.switches], "sysctl", "net.bridge.bridge-nf-call-iptables"),
        "processes": {name: len(run_command("ip", "netns", "pids", name).split()) for name in namespaces},
        "groups": [Path(f"/proc/{process}/cgroup").read_text() for process in processes],
        "scheduling": [os.sched_getscheduler(process) for process in processes],
    }


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_changes_something_and_is_taken_back(fabric: FabricOfHosts, ranks: Ranks, name: str) -> None:
    rng = np.random.default_rng([SEED, FAULTS.index(name)])
    before = state_of(fabric, ranks)
    for _ in range(2):  # of some faults there are two sorts
        fault = draw_fault(rng, name, fabric)
        with fault.inject(fabric, ranks):
            assert state_of(fabric, ranks) != before, fault.settings
        # What a killed process of a namespace leaves there goes when the kernel has cleaned it up.
        deadline = time.monotonic() + DEADLINE_S
        while (after := state_of(fabric, ranks)) != before and time.monotonic() < deadline:
            pass
        assert after == before, fault.settings


def sent_bytes(fabric: FabricOfHosts, host: Host) -> int:
    """What the leaf has sent to the host so far."""
    links = json.loads(run_command("ip", "-n", fabric.switches, "-j", "-s", "link", "show", "dev", host.port))
    return links[0]["stats64"]["tx"]["bytes"]


def test_foreign_traffic_comes_to_its_receiver_alone(fabric: FabricOfHosts) -> None:
    sender, victim = fabric.foreign[0], fabric.hosts[-1]
    before = {host.name: sent_bytes(fabric, host) for host in fabric.all_hosts}
    deadline = time.monotonic() + DEADLINE_S
    with datagrams(fabric, sender, victim, 5.0):
        while sent_bytes(fabric, victim) - before[victim.name] < SENT_BYTES:
            assert time.monotonic() < deadline, "nothing comes"
        more = {host.name: sent_bytes(fabric, host) - before[host.name] for host in fabric.all_hosts}
        dropped = json.loads(run_command("tc", "-n", sender.namespace, "-j", "-s", "qdisc", "show", "dev", "eth0"))[0][
            "drops"
        ]
    assert dropped == 0, "the sender spins: its queue takes less than its socket"
    del more[victim.name]
    assert max(more.values()) < SENT_BYTES / 100, f"a switch floods: {more}"


def test_draws_are_those_of_their_seed(fabric: FabricOfHosts) -> None:
    for name in FAULTS:
        one, same, other = (draw_fault(np.random.default_rng(seed), name, fabric) for seed in (1, 1, 2))
        assert one.settings == same.settings
        assert one.expected == same.expected
        assert one.settings != other.settings


def test_two_faults_are_at_different_places(fabric: FabricOfHosts) -> None:
    rng = np.random.default_rng(SEED)
    for _ in range(200):
        first, second = draw_two_faults(rng, fabric)
        assert first.name != second.name
        hosts = [{name for way in fault.expected for name in way.hosts} for fault in (first, second)]
        uplinks = [fault for fault in (first, second) if fault.name == "congested_uplink"]
        assert uplinks or not hosts[0] & hosts[1], (first, second)
        assert {first.name, second.name} != {"incast", "congested_uplink"}


def finding(kind: Kind, *hosts: str) -> Finding:
    return Finding(kind=kind, hosts=hosts, ranks=(), confidence=1.0, evidence={}, sentence="")


def test_an_expected_finding_has_its_kind_and_its_hosts_and_a_path_its_direction() -> None:
    path = Expected(kind="bad_path", hosts=("h1", "h2"))
    assert path.is_met_by(finding("bad_path", "h1", "h2"))
    assert not path.is_met_by(finding("bad_path", "h2", "h1"))
    uplink = Expected(kind="congested_uplink", hosts=("h1", "h2"))
    assert uplink.is_met_by(finding("congested_uplink", "h2", "h1"))
    assert not uplink.is_met_by(finding("congested_uplink", "h2"))
    assert not uplink.is_met_by(finding("slow_link", "h2", "h1"))


def test_the_first_findings_count_and_a_false_alarm_does_too(fabric: FabricOfHosts) -> None:
    h0, h1, h2 = fabric.hosts[:3]
    path = bad_path(h0, h1, 0.5, both_ways=True)
    sender = slow_sender(h2, 0.5)
    there, back, slow = finding("bad_path", "h0", "h1"), finding("bad_path", "h1", "h0"), finding("slow_sender", "h2")
    wrong = finding("slow_sender", "h3")
    assert is_told([no_fault()], [])
    assert not is_told([no_fault()], [wrong])
    assert is_told([sender], [slow, wrong])
    assert not is_told([sender], [wrong, slow])
    assert not is_told([sender], [])
    assert is_told([path, sender], [there, back, slow])
    assert is_told([sender, path], [back, slow])
    assert not is_told([path, sender], [there, back])
    assert not is_told([path, sender], [there, wrong, slow])
