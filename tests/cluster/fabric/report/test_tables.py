from typing import Any

import pytest

from cluster.fabric.report import units
from cluster.fabric.report.tables import counter_table, findings_list, fit_table, key_figures, prediction_table
from tests.cluster.fabric.report import samples


@pytest.mark.parametrize(
    ("key", "value", "shown"),
    [
        ("bytes_per_s", 6e6, "48.0 Mbit/s"),
        ("idle_round_trip_s", 0.00021, "210 µs"),
        ("num_bytes", 2**20, "1 MiB"),
        ("loss_share", 0.123, "12 %"),
        ("congested", True, "yes"),
        ("comparisons", 12, "12"),
        ("from_hosts", ["h0", "h1"], "h0, h1"),
        ("flows", [], "–"),
        ("competitors", None, "–"),
        ("rates", {"h0_bytes_per_s": 1.25e8}, "h0_bytes_per_s: 1.00 Gbit/s"),
        ("solo_bytes_per_s", {"h0": 1.25e8}, "h0: 1.00 Gbit/s"),
        ("during", "a transfer", "a transfer"),
    ],
)
def test_evidence_is_shown_in_the_unit_of_its_key(key: str, value: Any, shown: str) -> None:
    (text,) = findings_list({"findings": [samples.finding("slow_host", ("h0",), "h0.", **{key: value})]})
    assert text.evidence[0][1] == shown


def test_evidence_is_named_without_its_unit() -> None:
    evidence = {"bytes_per_s": 1.0, "control_bytes_per_s": 1.0, "compute_s": 1.0, "s": 1.0, "both_ways": False}
    (text,) = findings_list({"findings": [samples.finding("slow_host", ("h0",), "h0.", **evidence)]})
    assert [name for name, _ in text.evidence] == ["rate", "control rate", "compute", "s", "both ways"]


def test_a_finding_brings_what_counters_say_apart() -> None:
    (text,) = findings_list({"findings": [samples.SLOW_SENDER]})
    assert text.kind == "slow sender"
    assert len(text.supports) == len(text.contradicts) == 1
    assert "counters" not in dict(text.evidence)


def test_key_figures_tell_what_there_is() -> None:
    figures = [(each.label, each.value, each.unit) for each in key_figures(samples.verdict(), samples.sweep())]
    assert figures == [
        ("hosts", "8", ""),
        ("ranks", "8", "over gloo"),
        ("between two hosts", "48.0", "Mbit/s"),
        ("start of a message", "210", "µs"),
        ("noise of a measurement", "2.1", "%"),
        ("rounds in 7.40 s", "31", ""),
    ]
    assert key_figures(None, None) == []
    assert key_figures({"healthy": True, "findings": [], "alpha_s": None, "beta_s_per_byte": None}, None) == []


def test_fits_have_the_bandwidth_of_large_messages_and_intervals() -> None:
    table = fit_table(samples.sweep())
    assert table is not None
    assert table.rows[0] == (
        "world",
        "all_reduce",
        "isolated",
        "210 µs",
        "189 µs to 231 µs",
        "6.00 MB/s",
        "5.88 MB/s to 6.12 MB/s",
        "2.0 %",
    )
    sweep = samples.sweep()
    sweep["fits"][0]["model"]["beta_s_per_byte"] = {"value": 0.0, "low": None, "high": None}
    table = fit_table(sweep)
    assert table is not None
    assert table.rows[0][5:7] == ("–", "–")
    assert fit_table(None) is None


def test_predictions_are_bars_to_the_longest() -> None:
    first, second, third = prediction_table(samples.PREDICTIONS)
    assert (first.expected, first.measured, first.difference, first.notable) == ("3.10 ms", "5.20 ms", "+68 %", True)
    assert second.measured_bar == 100
    assert first.measured_bar == pytest.approx(100 * 5.2 / 11.3)
    assert (third.expected, third.difference, third.expected_bar) == ("–", "–", 0)


def test_counters_that_grew_on_one_host_alone_come_first() -> None:
    table = counter_table(
        {
            "a": {"x/y/bytes": 1000.0, "x/y/errors": 0.0, "x/y/still": 0.0, "x/y/rate_bytes_per_s": 1e9},
            "b": {"x/y/bytes": 1100.0, "x/y/errors": 30.0, "x/y/still": 0.0},
            "c": {"x/y/bytes": 900.0, "x/y/errors": 0.0},
        }
    )
    assert table is not None
    assert table.rows == (("x/y/errors", "0", "30", "b"), ("x/y/bytes", "1,000", "1,100", "b"))
    assert counter_table({"a": {"x/y/still": 0.0}}) is None
    assert counter_table(None) is None


@pytest.mark.parametrize(
    ("shown", "expected"),
    [
        (units.figure(0.01234), "0.0123"),
        (units.figure(1234567.0), "1,234,567"),
        (units.figure(0.0), "0"),
        (units.seconds(0.0), "0 s"),
        (units.seconds(2.5e-9), "2.50 ns"),
        (units.seconds(0.0148), "14.8 ms"),
        (units.size(512), "512 B"),
        (units.size(3 * 2**30), "3 GiB"),
        (units.percent(0.004), "0.4 %"),
        (units.percent(-0.18, signed=True), "-18 %"),
        (units.byte_rates([2e9]).name, "GB/s"),
        (units.bit_rates([float("nan"), 100.0]).name, "bit/s"),
        (units.bit_rates([]).name, "bit/s"),
        (units.time_unit([0.004, 1e-6]).name, "ms"),
        (units.time_unit([]).name, "s"),
    ],
)
def test_numbers_read_well(shown: str, expected: str) -> None:
    assert shown == expected
