"""Everything that speaks against a layout at once, each reason with the nearest values that cure it. Without torch."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from typing import Any

from parallel.config import ParallelConfig
from parallel.layout import Layout, LayoutDemands, LayoutProblem
from parallel.layout_case import WORLD, Case, Rule, Violation
from parallel.layout_rules import RULES, SETTING_RULES

_DEGREES = ("pp", "dp_replicate", "dp_shard", "cp", "tp", "ep", "expert_tp")
# How far a search for a number of samples or tokens goes, in units, up and down.
_REACH = 64


def layout_problems(config: ParallelConfig, demands: LayoutDemands, world_size: int) -> list[LayoutProblem]:
    """All reasons why `world_size` ranks cannot lay out `demands` as `config` says; empty where they can.

    Each names the nearest values that cure it: one that cures all reasons where there is one. Where none does, the last
    reason ends with the nearest layout that works.
    """
    case = Case(config=config, demands=demands, world_size=world_size)
    found = [(rule, violation) for rule in (*RULES, *SETTING_RULES) if (violation := rule(case))]
    problems = []
    cured = False
    for rule, violation in found:
        mends = _mends(case, violation, (*RULES, *SETTING_RULES))
        cured = cured or bool(mends)
        mends = mends or _mends(case, violation, (rule,))
        message = violation.reason + (f"; {_in_words(mends)}" if mends else "")
        problems.append(LayoutProblem(keys=violation.keys, message=message, mends=tuple(mends)))
    if found and not cured and (nearest := nearest_layout(config, demands, world_size)):
        changes = _changes(config, nearest)
        if changes:
            last = problems[-1]
            message = f"{last.message}; nearest layout that works on {world_size} ranks: {changes}"
            problems[-1] = LayoutProblem(keys=last.keys, message=message, mends=last.mends)
    return problems


def nearest_layout(config: ParallelConfig, demands: LayoutDemands, world_size: int) -> Layout | None:
    """The layout of `world_size` ranks that works and changes the degrees least, counted in doublings; None: there is none.

    A dp_shard of -1 costs nothing to change.
    """
    case = Case(config=config, demands=demands, world_size=world_size)
    candidates = sorted(_candidates(case), key=lambda candidate: _distance(config, candidate))
    for candidate in candidates:
        degrees = {axis: getattr(candidate, axis) for axis in _DEGREES}
        changed = Case(config=config.model_copy(update=degrees), demands=demands, world_size=world_size)
        if not any(rule(changed) for rule in RULES):
            return candidate
    return None


def _candidates(case: Case) -> Iterator[Layout]:
    """All grids of the world, each with the experts' folding nearest to what is asked."""
    divisors = _divisors(case.world_size)
    experts, width = case.demands.num_experts or 1, case.demands.expert_d_ff or 1
    foldings = sorted(
        (Layout(ep=ep, expert_tp=tp) for ep in _divisors(experts) for tp in _divisors(width)),
        key=lambda folding: (
            abs(math.log(folding.ep / case.config.ep)) + abs(math.log(folding.expert_tp / case.config.expert_tp))
        ),
    )
    for pp, dp_replicate, cp, tp in itertools.product(divisors, repeat=4):
        others = pp * dp_replicate * cp * tp
        if others > case.world_size or case.world_size % others:
            continue
        dp_shard = case.world_size // others
        folded = dp_shard * cp * tp
        folding = next(each for each in foldings if folded % (each.ep * each.expert_tp) == 0)
        yield Layout(
            pp=pp,
            dp_replicate=dp_replicate,
            dp_shard=dp_shard,
            cp=cp,
            tp=tp,
            ep=folding.ep,
            expert_tp=folding.expert_tp,
        )


def _distance(config: ParallelConfig, layout: Layout) -> tuple[float, tuple[int, ...]]:
    """How far a layout is from what is asked; equally far ones in an order of their own."""
    asked = {axis: getattr(config, axis) for axis in _DEGREES}
    steps = (abs(math.log2(getattr(layout, axis) / degree)) for axis, degree in asked.items() if degree != -1)
    return round(sum(steps), 9), tuple(getattr(layout, axis) for axis in _DEGREES)


def _changes(config: ParallelConfig, layout: Layout) -> str:
    """The degrees in which a layout differs from what is asked."""
    asked = {axis: getattr(config, axis) for axis in _DEGREES}
    differing = [axis for axis, degree in asked.items() if degree not in (-1, getattr(layout, axis))]
    return ", ".join(f"parallel.{axis} = {getattr(layout, axis)}" for axis in differing)


def _mends(case: Case, violation: Violation, rules: tuple[Rule, ...]) -> list[tuple[str, Any]]:
    """The nearest values, below and above, of each key that may cure a violation, for which none of `rules` complains."""
    mends: list[tuple[str, Any]] = []
    for key in violation.mend_by:
        working = (
            value
            for value in _values_to_try(case, violation, key)
            if not any(rule(case.with_value(key, value)) for rule in rules)
        )
        now = case.value(key)
        if key in violation.choices or not isinstance(now, int):
            mends += [(key, value) for value in itertools.islice(working, 1)]
            continue
        sides: dict[bool, int] = {}
        for value in working:
            sides.setdefault(value > now, value)
            if len(sides) == 2:
                break
        mends += [(key, value) for _, value in sorted(sides.items())]
    return mends


def _values_to_try(case: Case, violation: Violation, key: str) -> list[Any]:
    """Other values for a key, the nearest first."""
    now = case.value(key)
    if key in violation.choices:
        values = list(violation.choices[key])
        return [value for value in values if value != now]
    if key == WORLD or (key.split(".")[0] != "parallel" and key != "train.micro_batch_size"):
        base = now // violation.unit if key != WORLD else now
        unit = violation.unit if key != WORLD else 1
        values = [unit * count for count in range(max(1, base - _REACH), base + _REACH + 1)]
    elif key == "train.micro_batch_size":
        values = _divisors(max(1, case.demands.global_batch_size // case.layout.num_data_ranks))
    elif key == "parallel.pipeline_stages_per_rank":
        values = list(range(1, case.demands.num_layers + 1))
    else:
        values = _divisors(case.world_size)
    near = now if isinstance(now, int) and now > 0 else 1
    return sorted((value for value in values if value != now), key=lambda value: abs(math.log(value / near)))


def _in_words(mends: list[tuple[str, Any]]) -> str:
    grouped: dict[str, list[str]] = {}
    for key, value in mends:
        grouped.setdefault(key, []).append(f'"{value}"' if isinstance(value, str) else str(value).lower())
    return "use " + ", or ".join(
        f"no {key}" if values == ["none"] else f"{key}{' ' if key == WORLD else ' = '}{' or '.join(values)}"
        for key, values in grouped.items()
    )


def _divisors(number: int) -> list[int]:
    small = [divisor for divisor in range(1, math.isqrt(number) + 1) if number % divisor == 0]
    return sorted({*small, *(number // divisor for divisor in small)})
