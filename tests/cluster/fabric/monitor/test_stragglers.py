"""Who is slow, since when, what it costs; and nobody where all is well."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest

from cluster.fabric.findings import Finding
from cluster.fabric.monitor.durations import GroupDurations, StepDurations
from cluster.fabric.monitor.stragglers import StragglerSearch
from tests.cluster.fabric.monitor.stories import step_of, windows_of

EVEN = dict.fromkeys(range(4), 0.1)


def _host(rank: int) -> str:
    return f"h{rank}"


def _findings(make: Callable[[int], dict], steps: int = 200, host_of: Callable[[int], str] = _host) -> list[Finding]:
    search = StragglerSearch(host_of=host_of)
    return [finding for window in windows_of(range(steps), make) for finding in search.add(window)]


@pytest.mark.parametrize("knows_waits", [True, False])
def test_a_rank_that_becomes_slow_is_named_once_with_its_cost(knows_waits: bool) -> None:
    noise = random.Random(1)

    def make(step: int) -> dict:
        return step_of(step, EVEN if step < 60 else {**EVEN, 2: 0.13}, noise=noise, knows_waits=knows_waits)

    (found,) = _findings(make)
    assert (found.kind, found.hosts, found.ranks) == ("slow_host", ("h2",), (2,))
    assert found.evidence["since_step"] == 60
    assert found.evidence["cost_s_per_step"] == pytest.approx(0.03, rel=0.3)
    assert found.evidence["late_s"] > found.evidence["others_late_s"] + 0.02
    assert found.confidence > 0.99
    assert found.sentence.startswith("rank 2 on h2 holds the others up since step 60: it ")
    if knows_waits:
        assert "it works for 1" in found.sentence
        assert "its 3 peers need 1" in found.sentence
    else:
        assert "it comes to the collectives " in found.sentence
        assert "a step later than its 3 peers" in found.sentence


def test_two_slow_ranks_are_both_named() -> None:
    noise = random.Random(2)
    work = dict.fromkeys(range(8), 0.1) | {3: 0.15, 5: 0.13}
    ranks = tuple(work)
    found = _findings(lambda step: step_of(step, work, groups=(("world", ranks),), noise=noise))
    assert sorted(finding.ranks[0] for finding in found) == [3, 5]


def test_nobody_is_named_in_healthy_runs() -> None:
    for seed in range(20):
        noise = random.Random(seed)
        drift = noise.uniform(-0.0005, 0.0005)
        found = _findings(
            lambda step, noise=noise, drift=drift: step_of(
                step, dict.fromkeys(range(4), 0.1 * (1 + drift * step)), noise=noise
            ),
            steps=300,
        )
        assert not found, f"seed {seed}: {found[0].sentence}"


def test_one_bad_step_and_a_short_spell_are_not_told() -> None:
    noise = random.Random(4)

    def make(step: int) -> dict:
        slow = step == 30 or 60 <= step < 70
        return step_of(step, {**EVEN, 1: 0.3} if slow else EVEN, noise=noise)

    assert _findings(make) == []


def test_a_straggler_that_is_well_again_may_be_told_anew() -> None:
    noise = random.Random(5)

    def make(step: int) -> dict:
        slow = 20 <= step < 80 or step >= 140
        return step_of(step, {**EVEN, 1: 0.14} if slow else EVEN, noise=noise)

    assert [finding.evidence["since_step"] for finding in _findings(make, steps=220)] == [20, 140]


def test_stages_of_a_pipeline_are_compared_with_their_like() -> None:
    noise = random.Random(6)
    roles = {0: "stage 0", 1: "stage 0", 2: "stage 1", 3: "stage 1"}
    uneven = {0: 0.1, 1: 0.1, 2: 0.15, 3: 0.15}
    assert _findings(lambda step: step_of(step, uneven, noise=noise, roles=roles)) == []
    (found,) = _findings(lambda step: step_of(step, {**uneven, 3: 0.19}, noise=noise, roles=roles))
    assert found.ranks == (3,)


def test_a_stage_without_replicas_is_compared_with_its_own_past() -> None:
    noise = random.Random(7)
    roles = {rank: f"stage {rank}" for rank in range(4)}
    uneven = {0: 0.1, 1: 0.12, 2: 0.15, 3: 0.11}

    def make(step: int) -> dict:
        return step_of(step, uneven if step < 100 else {**uneven, 1: 0.16}, noise=noise, roles=roles)

    (found,) = _findings(make)
    assert (found.kind, found.ranks) == ("slow_host", (1,))
    assert abs(found.evidence["since_step"] - 100) <= 5
    assert "has become slower at step" in found.sentence


PAIRS = (("dp", (0, 2)), ("dp", (1, 3)), ("tp", (0, 1)), ("tp", (2, 3)))


def test_a_group_whose_network_becomes_slower_names_what_its_hosts_share() -> None:
    noise = random.Random(8)

    def make(step: int) -> dict:
        slow = {group: 0.03 if 3 in group[1] and step >= 100 else 0.015 for group in PAIRS}
        return step_of(step, EVEN, network_s=slow, groups=PAIRS, noise=noise)

    found = _findings(make, steps=250)
    assert {(finding.kind, finding.hosts) for finding in found} == {("slow_link", ("h3",))}
    assert abs(found[0].evidence["since_step"] - 100) <= 5
    assert "none of the ranks is late" in found[0].sentence


def test_where_all_groups_between_hosts_slow_down_it_is_between_the_hosts() -> None:
    noise = random.Random(9)

    def make(step: int) -> dict:
        slow = {group: 0.03 if group[0] == "dp" and step >= 100 else 0.015 for group in PAIRS}
        return step_of(step, EVEN, network_s=slow, groups=PAIRS, noise=noise)

    found = _findings(make, steps=250, host_of=lambda rank: "a" if rank < 2 else "b")
    assert {finding.kind for finding in found} == {"congested_uplink"}
    assert {finding.hosts for finding in found} == {("a", "b")}


def test_thousands_of_ranks_take_seconds() -> None:
    noise = random.Random(10)
    work = dict.fromkeys(range(4096), 0.1) | {1234: 0.13}
    ranks = tuple(work)
    found = _findings(lambda step: step_of(step, work, groups=(("world", ranks),), noise=noise), steps=15)
    assert [finding.ranks for finding in found] == [(1234,)]


def _overlapped(step: int, late_s: dict[int, float], noise: random.Random) -> dict[int, StepDurations]:
    """As NCCL tells it: eight ranks, a step of one second, ten collectives behind the computing that take longer than the step
    when summed; a late rank's are shorter."""
    ranks = tuple(range(8))
    return {
        rank: StepDurations(
            step=step,
            role="stage 0",
            step_s=1.0,
            busy_s=None,
            every=1,
            cost_s=1e-4,
            groups=(
                GroupDurations(
                    axis="dp",
                    ranks=ranks,
                    kinds=("all_reduce",) * 10,
                    num_bytes=(1000,) * 10,
                    seconds=tuple(0.15 - late_s.get(rank, 0.0) / 10 + noise.gauss(0, 0.003) for _ in range(10)),
                    waited_s=0.0,
                ),
            ),
        )
        for rank in ranks
    }


def test_where_communication_hides_behind_computing_the_late_rank_is_named() -> None:
    noise = random.Random(12)
    (found,) = _findings(lambda step: _overlapped(step, {3: 0.25} if step >= 40 else {}, noise))
    assert found.ranks == (3,)
    assert found.evidence["since_step"] == 40
    assert found.evidence["late_s"] == pytest.approx(0.25, rel=0.4)
    assert found.evidence["cost_s_per_step"] == pytest.approx(0.25, rel=0.3)
    assert "busy_s" not in found.evidence


def test_nobody_is_late_in_healthy_runs_that_hide_their_communication() -> None:
    for seed in range(20):
        noise = random.Random(seed)
        found = _findings(lambda step, noise=noise: _overlapped(step, {}, noise))
        assert not found, f"seed {seed}: {found[0].sentence}"
