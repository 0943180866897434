"""What a step sends, as counted by the ledger, beside what its formulas say.

A formula is a claim about the code. Where it is not met, some change has added communication, or removed some.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from megamodel.train.communication_data import engine_terms, muon_terms, step_terms
from megamodel.train.communication_facts import Expected, PartShare, Place, RunShape
from megamodel.train.communication_styles import (
    context_terms,
    expert_terms,
    pipeline_terms,
    router_terms,
    tensor_terms,
)
from parallel.ledger import LedgerKey, LedgerRow, Spread, spread


def expected_communication(shape: RunShape, parts: Sequence[PartShare], place: Place) -> tuple[Expected, ...]:
    """What the rank at `place`, which holds `parts`, communicates in one step. No communication."""
    terms = [
        *step_terms(shape, parts),
        *engine_terms(shape, parts, place),
        *muon_terms(shape, parts),
        *tensor_terms(shape, parts),
        *router_terms(shape, parts),
        *context_terms(shape, parts),
        *expert_terms(shape, parts),
        *pipeline_terms(shape, parts, place.pp),
    ]
    together: dict[tuple[LedgerKey, str, str], list[Expected]] = {}
    for term in terms:
        together.setdefault((term.key, term.purpose, term.formula), []).append(term)
    return tuple(
        Expected(
            key=key,
            count=sum(term.count for term in same),
            num_bytes=sum(term.num_bytes for term in same),
            purpose=purpose,
            formula=formula,
            on_average=same[0].on_average,
        )
        for (key, purpose, formula), same in together.items()
    )


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """One kind of communication of all ranks: counted, and expected."""

    key: LedgerKey
    count: Spread
    num_bytes: Spread
    expected_count: Spread
    expected_bytes: Spread
    terms: tuple[str, ...]
    """Purpose and formula of each reason for it, over all ranks; none where nothing of the kind was expected."""
    agrees: bool | None
    """Counts are equal on every rank, and bytes too (their sum, where the bytes of one rank depend on the data). None:
    there is nothing to compare with."""

    def as_data(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "axis": self.key.axis,
            "kind": self.key.kind,
            "dtype": self.key.dtype,
            "count": vars(self.count),
            "bytes": vars(self.num_bytes),
            "expected_count": vars(self.expected_count),
            "expected_bytes": vars(self.expected_bytes),
            "formula": list(self.terms),
            "agrees": self.agrees,
        }


@dataclass(frozen=True, kw_only=True)
class StepCommunication:
    """The communication of one step, over all ranks."""

    step: int
    rows: tuple[Comparison, ...]

    @property
    def agrees(self) -> bool | None:
        """All of it is as expected; None where nothing was to be expected."""
        return None if any(row.agrees is None for row in self.rows) else all(row.agrees for row in self.rows)

    def as_data(self) -> dict[str, Any]:
        """For JSON."""
        return {"step": self.step, "agrees": self.agrees, "rows": [row.as_data() for row in self.rows]}


def compare(
    measured: Sequence[Sequence[LedgerRow]], expected: Sequence[Sequence[Expected] | None]
) -> tuple[Comparison, ...]:
    """Both, by rank, as one table: a row for every kind of communication that was counted or expected on some rank.

    Where a rank expects None, no formula claims anything.
    """
    counted = [{row.key: row for row in page} for page in measured]
    claims = [terms for terms in expected if terms is not None]
    keys = {key for page in counted for key in page} | {term.key for terms in claims for term in terms}
    rows = tuple(_compare_one(key, counted, [terms or () for terms in expected]) for key in sorted(keys))
    return rows if len(claims) == len(expected) else tuple(replace(row, agrees=None) for row in rows)


def _compare_one(
    key: LedgerKey, counted: Sequence[dict[LedgerKey, LedgerRow]], expected: Sequence[Sequence[Expected]]
) -> Comparison:
    of_key = [[term for term in terms if term.key == key] for terms in expected]
    counts = [page[key].count if key in page else 0 for page in counted]
    sizes = [page[key].num_bytes if key in page else 0 for page in counted]
    due_counts = [sum(term.count for term in terms) for terms in of_key]
    due_sizes = [sum(term.num_bytes for term in terms) for terms in of_key]
    on_average = any(term.on_average for terms in of_key for term in terms)
    agrees = counts == due_counts and (sum(sizes) == sum(due_sizes) if on_average else sizes == due_sizes)
    return Comparison(
        key=key,
        count=spread(counts),
        num_bytes=spread(sizes),
        expected_count=spread(due_counts),
        expected_bytes=spread(due_sizes),
        terms=tuple(dict.fromkeys(f"{term.purpose}: {term.formula}" for terms in of_key for term in terms)),
        agrees=agrees,
    )
