"""Every layout trains as one rank does: the loss of each step, every gradient, the norms and the weights at the end."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import pytest

from tests.gloo_pool import GlooPool
from tests.parity import cases
from tests.parity.harness import Case, Trace, alone_without_ties, compare, run_case
from tests.requirements import requires

_SAMPLES = int(os.environ.get("MEGA_PARITY_SAMPLES", "10"))
"""How many layouts are drawn by chance on each number of ranks; a campaign draws more."""
_SECONDS = 500.0
"""Eight ranks on two cores take up to eighty."""

Check = Callable[[Case], None]


@pytest.fixture(scope="module")
def known() -> dict[str, Any]:
    """Runs on one rank, each made once."""
    return {}


@pytest.fixture
def check(gloo_ranks: GlooPool, known: dict[str, Any]) -> Check:
    """Runs a case and its like on one rank, and compares."""

    def run_alone(case: Case) -> Trace:
        return gloo_ranks(1, run_case, case, timeout_s=_SECONDS)[0]

    def run(case: Case) -> None:
        key = repr(case.alone())
        if key not in known:
            known[key] = alone_without_ties(run_alone, case.alone())
        settled, alone = known[key]
        traces = gloo_ranks(case.ranks, run_case, case.seeded(settled.seed), timeout_s=_SECONDS)
        assert not (problems := compare(traces, alone)), f"{case.seeded(settled.seed)}:\n" + "\n".join(problems)

    return run


@pytest.fixture
def fresh_ranks(gloo_ranks: GlooPool) -> None:
    """Compiled code holds on to the groups of the world that it was compiled in: new processes for every case."""
    gloo_ranks.close()


def _named(case: Case) -> str:
    layout = " ".join(f"{key}={value}" for key, value in case.parallel.items())
    return f"{case.ranks} {'moe' if case.moe else 'dense'} {layout} {case.model if len(str(case.model)) < 30 else ''}".strip()


@pytest.mark.parametrize("case", cases.alone(), ids=_named)
def test_each_style_alone(check: Check, case: Case) -> None:
    check(case)


@pytest.mark.parametrize("case", cases.pairs(), ids=_named)
def test_every_pair(check: Check, case: Case) -> None:
    check(case)


@pytest.mark.parametrize("case", cases.compositions(), ids=_named)
def test_three_axes_and_more(check: Check, case: Case) -> None:
    check(case)


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("seed", range(_SAMPLES))
def test_layouts_drawn_by_chance(check: Check, seed: int, ranks: int) -> None:
    check(cases.draw(1000 * ranks + seed, ranks))


@pytest.mark.parametrize("case", cases.variants(), ids=_named)
def test_other_models_and_optimizers(check: Check, case: Case) -> None:
    check(case)


@requires("compiler")
@pytest.mark.compiler
@pytest.mark.parametrize("case", cases.compiled(), ids=_named)
def test_compiled(check: Check, fresh_ranks: None, case: Case) -> None:
    """Among them the known trap: compiled blocks behind a vocabulary-parallel embedding, whose gradient must arrive."""
    check(case)


@requires("compiler")
@pytest.mark.compiler
@pytest.mark.parametrize("seed", range(max(1, _SAMPLES // 10)))
def test_compiled_layouts_drawn_by_chance(check: Check, fresh_ranks: None, seed: int) -> None:
    check(cases.draw(5000 + seed, 2, compile="on"))


@pytest.mark.parametrize("case", cases.recomputed(), ids=_named)
def test_recomputed_and_offloaded_activations(check: Check, case: Case) -> None:
    check(case)


def test_the_comparison_sees_a_wrong_gradient(gloo_ranks: GlooPool) -> None:
    alone = gloo_ranks(1, run_case, Case(moe=False, steps=2))[0]
    name, (offsets, shape, values) = next(iter(alone.gradients.items()))
    wrong = {**alone.gradients, name: [offsets, shape, values * 1.001]}
    found = compare([Trace(**{**vars(alone), "gradients": wrong})], alone)
    assert [name in problem and "gradients" in problem for problem in found] == [True]
