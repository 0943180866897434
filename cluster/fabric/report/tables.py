"""Rows of text for the page's lists and tables, taken from plain data."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cluster.fabric.report import units
from cluster.fabric.report.data import Plain
from cluster.fabric.report.views import findings_of

_MOST_COUNTERS = 40


@dataclass(frozen=True, kw_only=True)
class FindingText:
    """One finding as the page shows it."""

    kind: str
    sentence: str
    confidence: str
    evidence: tuple[tuple[str, str], ...]
    """Name and value."""
    supports: tuple[str, ...]
    contradicts: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class KeyFigure:
    """One number at the head of the page."""

    label: str
    value: str
    unit: str


@dataclass(frozen=True, kw_only=True)
class Table:
    """Text in rows."""

    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    numeric: frozenset[int]
    """Numbers of the columns that are set to the right."""


@dataclass(frozen=True, kw_only=True)
class PredictionText:
    """Expected beside measured; the bars are shares of the longest one, 0 to 100."""

    what: str
    expected: str
    measured: str
    difference: str
    expected_bar: float
    measured_bar: float
    notable: bool


def findings_list(verdict: Plain | None) -> list[FindingText]:
    """All findings of a verdict."""
    texts = []
    for finding in findings_of(verdict):
        counters = finding.evidence.get("counters") or {}
        texts.append(
            FindingText(
                kind=finding.kind.replace("_", " "),
                sentence=finding.sentence,
                confidence=f"{100 * finding.confidence:.0f} %",
                evidence=tuple(
                    (_label(key), _shown(key, value)) for key, value in finding.evidence.items() if key != "counters"
                ),
                supports=tuple(counters.get("supports", ())),
                contradicts=tuple(counters.get("contradicts", ())),
            )
        )
    return texts


def key_figures(verdict: Plain | None, sweep: Plain | None) -> list[KeyFigure]:
    """What was measured, in a few numbers."""
    figures: list[KeyFigure] = []
    verdict, sweep = verdict or {}, sweep or {}
    details = verdict.get("details", {})
    if hosts := details.get("hosts") or sweep.get("hosts"):
        figures.append(KeyFigure(label="hosts", value=f"{len(hosts):,}", unit=""))
    if sweep:
        figures.append(KeyFigure(label="ranks", value=f"{sweep['world_size']:,}", unit=f"over {sweep['transport']}"))
    if beta := verdict.get("beta_s_per_byte"):
        unit = units.bit_rates([1 / beta])
        figures.append(KeyFigure(label="between two hosts", value=unit.show(1 / beta), unit=unit.name))
    if (alpha := verdict.get("alpha_s")) is not None:
        value, _, unit_name = units.seconds(alpha).partition(" ")
        figures.append(KeyFigure(label="start of a message", value=value, unit=unit_name))
    if (noise := details.get("noise_share")) is not None:
        figures.append(
            KeyFigure(label="noise of a measurement", value=units.percent(noise).removesuffix(" %"), unit="%")
        )
    if (rounds := verdict.get("rounds")) is not None:
        figures.append(KeyFigure(label=f"rounds in {units.seconds(verdict['seconds'])}", value=f"{rounds:,}", unit=""))
    return figures


def fit_table(sweep: Plain | None) -> Table | None:
    """Alpha and the bandwidth of large messages, by group and kind, with their 95 % intervals."""
    rows = []
    for fit in (sweep or {}).get("fits", ()):
        model = fit["model"]
        alpha, beta = model["alpha_s"], model["beta_s_per_byte"]
        rows.append(
            (
                fit["group"],
                model["kind"],
                fit["mode"].replace("_", " "),
                units.seconds(alpha["value"]),
                _between(alpha["low"], alpha["high"], units.seconds),
                _rate(beta["value"]),
                _between(beta["high"], beta["low"], _rate),
                units.percent(model["residual_share"]),
            )
        )
    head = ("group", "collective", "mode", "alpha", "95 %", "1 / beta", "95 %", "residual")
    return Table(head=head, rows=tuple(rows), numeric=frozenset(range(3, 8))) if rows else None


def prediction_table(rows: Sequence[Plain]) -> list[PredictionText]:
    """Expected and measured seconds a step, with bars to the longest of all."""
    known = [
        time for row in rows for time in ((row["expected"] or {}).get("value"), row["measured_s"]) if time is not None
    ]
    longest = max(known, default=1.0) or 1.0
    texts = []
    for row in rows:
        expected, measured = (row["expected"] or {}).get("value"), row["measured_s"]
        share = measured / expected - 1 if expected and measured is not None else None
        texts.append(
            PredictionText(
                what=f"{row['kind']} on {row['axis']}",
                expected="–" if expected is None else units.seconds(expected),
                measured="–" if measured is None else units.seconds(measured),
                difference="–" if share is None else units.percent(share, signed=True),
                expected_bar=100 * (expected or 0.0) / longest,
                measured_bar=100 * (measured or 0.0) / longest,
                notable=bool(row["notable"]),
            )
        )
    return texts


def counter_table(counters: Mapping[str, Mapping[str, float]] | None) -> Table | None:
    """Counters that grew anywhere, those first that grew on one host far more than on most."""
    hosts = counters or {}
    rows: list[tuple[float, tuple[str, ...]]] = []
    for name in dict.fromkeys(name for grown in hosts.values() for name in grown):
        if name.endswith("/rate_bytes_per_s"):  # what a port is set to, no growth
            continue
        values = {host: grown.get(name, 0.0) for host, grown in hosts.items()}
        host, greatest = max(values.items(), key=lambda item: item[1])
        if greatest > 0:
            usual = statistics.median(values.values())
            rows.append((greatest / (usual + 1), (name, _count(usual), _count(greatest), host)))
    rows.sort(key=lambda row: -row[0])
    head = ("counter", "median of hosts", "most", "on")
    texts = tuple(text for _, text in rows[:_MOST_COUNTERS])
    return Table(head=head, rows=texts, numeric=frozenset({1, 2})) if texts else None


def wrong_data(sweep: Plain | None) -> list[str]:
    """Collectives that gave a rank wrong data, in words."""
    return [
        f"{row['kind']} of {units.size(row['num_bytes'])} on {row['group']}, {row['mode'].replace('_', ' ')}"
        for row in (sweep or {}).get("rows", ())
        if not row["correct"]
    ]


def made_of(sweep: Plain | None) -> list[str]:
    """When and under which circumstances the sweep was measured."""
    if not sweep:
        return []
    return [f"swept {sweep['taken_at']}", *(f"{name} {value}" for name, value in sweep["circumstances"].items())]


def _label(key: str) -> str:
    stem, unit = _split(key)
    words = stem.replace("_", " ")
    return f"{words} rate".strip() if unit == "bytes_per_s" else words or key


def _split(key: str) -> tuple[str, str]:
    """`peers_out_bytes_per_s` is `peers_out` in `bytes_per_s`; without a known unit all of it is the name."""
    ending = next((unit for unit in ("bytes_per_s", "bytes", "share", "s") if f"_{key}".endswith(f"_{unit}")), "")
    return key.removesuffix(ending).rstrip("_"), ending


def _shown(key: str, value: Any) -> str:
    """In the unit that the key ends in."""
    unit = _split(key)[1]
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, Mapping):
        return ", ".join(f"{name}: {_shown(key if unit else str(name), each)}" for name, each in value.items()) or "–"
    if isinstance(value, Sequence) and not isinstance(value, str):
        return ", ".join(_shown(key, each) for each in value) or "–"
    if value is None:
        return "–"
    if not isinstance(value, int | float):
        return str(value)
    match unit:
        case "bytes_per_s":
            rate = units.bit_rates([value])
            return f"{rate.show(value)} {rate.name}"
        case "share":
            return units.percent(value)
        case "bytes":
            return units.size(value)
        case "s":
            return units.seconds(value)
    return _count(value)


def _count(number: float) -> str:
    return f"{number:,.0f}" if number == int(number) else units.figure(number)


def _rate(seconds_per_byte: float) -> str:
    if seconds_per_byte <= 0:
        return "–"
    unit = units.byte_rates([1 / seconds_per_byte])
    return f"{unit.show(1 / seconds_per_byte)} {unit.name}"


def _between(low: float | None, high: float | None, show: Any) -> str:
    return "–" if low is None or high is None else f"{show(low)} to {show(high)}"
