"""What becomes of confirmed slow parts: which finding, which hosts, which words."""

from __future__ import annotations

from typing import Any

import pytest

from cluster.fabric.analysis.explain import Part, path, receiver, sender, uplink
from cluster.fabric.analysis.judgement import Slow, judged
from cluster.fabric.findings import Finding
from cluster.fabric.probing import Endpoint

ENDPOINTS = tuple(Endpoint(rank=10 + number, host=f"h{number}", machine="m") for number in range(8))
HALVES = frozenset(range(4)), frozenset(range(4, 8))
RATES = {"bytes_per_s": 2.5e6, "control_bytes_per_s": 6e6}


def slow(part: Part, log_loss: float = 0.8, tail: float = 1e-9, **evidence: Any) -> Slow:
    """A part of the network at 20 of 48 Mbit/s."""
    return Slow(part=part, log_loss=log_loss, tail=tail, evidence={**RATES, **evidence})


def computing(endpoint: int, log_loss: float) -> Slow:
    """A slow host."""
    evidence = {"compute_s": 0.3, "control_compute_s": 0.2}
    return Slow(part=None, endpoint=endpoint, log_loss=log_loss, tail=1e-9, evidence=evidence)


def findings(*items: Slow) -> tuple[Finding, ...]:
    """Without counters."""
    return judged(items, ENDPOINTS, growth=[{}] * 8)


def named(*items: Slow) -> list[tuple[str, tuple[str, ...]]]:
    """Kinds and hosts."""
    return [(finding.kind, finding.hosts) for finding in findings(*items)]


def test_one_way_is_a_sender_or_receiver_and_both_are_a_link() -> None:
    assert named(slow(sender(3, 8))) == [("slow_sender", ("h3",))]
    assert named(slow(receiver(3, 8))) == [("slow_receiver", ("h3",))]
    assert named(slow(sender(3, 8)), slow(receiver(3, 8), log_loss=0.6)) == [("slow_link", ("h3",))]


def test_a_small_loss_one_way_is_a_side_effect_of_a_great_one_the_other_way() -> None:
    assert named(slow(sender(3, 8), log_loss=1.2), slow(receiver(3, 8), log_loss=0.15)) == [("slow_sender", ("h3",))]


def test_accidents_one_way_are_a_side_effect_of_packets_lost_the_other_way() -> None:
    mostly_well = slow(receiver(3, 8), log_loss=0.2, bytes_per_s=5.86e6)
    assert named(slow(sender(3, 8), log_loss=0.33), mostly_well) == [("slow_sender", ("h3",))]
    assert named(mostly_well) == [("slow_receiver", ("h3",))]


def test_a_path_that_is_bad_both_ways_is_one_finding() -> None:
    found = findings(slow(path(2, 5), log_loss=0.5), slow(path(5, 2), log_loss=0.7))
    assert [(finding.kind, finding.hosts, finding.evidence["both_ways"]) for finding in found] == [
        ("bad_path", ("h5", "h2"), True)
    ]
    assert findings(slow(path(2, 5)))[0].evidence["both_ways"] is False


def test_an_uplink_names_all_behind_it_and_both_ways_are_one_finding() -> None:
    words = {"competitors_in_words": "foreign traffic competes"}
    (found,) = findings(slow(uplink(*HALVES), **words), slow(uplink(*HALVES[::-1]), **words))
    assert found.kind == "congested_uplink"
    assert found.hosts == tuple(f"h{number}" for number in range(8))
    assert found.evidence["from_hosts"] == ["h0", "h1", "h2", "h3"]
    assert "foreign traffic competes" in found.sentence
    flows = [slow(uplink(*ways), competing_flows=[[ways[1] is HALVES[1]]], **words) for ways in (HALVES, HALVES[::-1])]
    assert findings(*flows)[0].evidence["competing_flows"] == [[True], [False]], "those of both ways"
    (small,) = findings(slow(uplink(frozenset({6, 7}), frozenset(range(6))), **words))
    assert small.hosts == ("h6", "h7")


def test_a_slow_host_explains_its_own_link_unless_that_is_much_slower() -> None:
    assert named(computing(3, 0.5), slow(sender(3, 8), log_loss=0.4)) == [("slow_host", ("h3",))]
    assert named(computing(3, 0.1), slow(sender(3, 8), log_loss=1.0)) == [
        ("slow_sender", ("h3",)),
        ("slow_host", ("h3",)),
    ]
    assert len(named(computing(3, 0.5), slow(sender(4, 8), log_loss=0.4))) == 2


def test_confidence_is_what_the_measurement_leaves_of_doubt() -> None:
    (found,) = findings(slow(sender(3, 8), tail=0.02))
    assert found.confidence == pytest.approx(0.98)
    assert found.ranks == (13,)
    assert found.evidence["counters"].keys() == {"supports", "contradicts"}


@pytest.mark.parametrize(
    ("item", "said"),
    [
        (slow(sender(3, 8)), "h3 sends slowly: 20.0 Mbit/s against 48.0 Mbit/s of its peers"),
        (slow(receiver(3, 8), standing_queue=True), "congested by foreign traffic"),
        (slow(path(2, 5)), "The path from h2 to h5 is bad in this direction alone: 20.0 Mbit/s against 48.0 Mbit/s"),
        (computing(4, 0.4), "h4 computes slowly: 300 ms for work that takes its peers 200 ms"),
    ],
)
def test_each_finding_says_what_is_wrong_in_one_sentence_with_its_numbers(item: Slow, said: str) -> None:
    (found,) = findings(item)
    assert said in found.sentence
    assert found.sentence.endswith("(confidence 1.00).")
