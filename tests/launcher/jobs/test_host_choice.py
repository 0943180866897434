"""Which hosts train next."""

from collections.abc import Sequence

import pytest

from launcher.config import RunConfig
from launcher.jobs.host_choice import choose_hosts, ranks_on_a_host


def _choose(available: str, nodes: int, fewest: int, fitting: Sequence[int] = range(99), **others: list[str]) -> str:
    return " ".join(
        choose_hosts(available.split(), nodes=nodes, fewest=fewest, fits=lambda count: count in fitting, **others)
    )


@pytest.mark.parametrize(
    ("available", "nodes", "fewest", "chosen"),
    [
        ("a b c d", 3, 3, "a b c"),  # d is a spare
        ("b c d", 3, 3, "b c d"),
        ("b d", 3, 3, ""),
        ("b d", 3, 2, "b d"),
        ("b", 3, 2, ""),
        ("", 1, 1, ""),
    ],
)
def test_as_many_as_asked_for_or_at_least_the_fewest(available: str, nodes: int, fewest: int, chosen: str) -> None:
    assert _choose(available, nodes, fewest) == chosen


def test_the_largest_number_on_which_the_run_can_be_laid_out() -> None:
    assert _choose("a b c", 4, 1, fitting=(1, 2, 4)) == "a b"
    assert _choose("a b c", 4, 2, fitting=(1, 4)) == ""


def test_spares_come_before_hosts_that_have_just_failed() -> None:
    assert _choose("a b c d", 3, 3, doubtful=["b"]) == "a c d"
    assert _choose("a b c", 3, 2, doubtful=["b"]) == "a b c"


def test_hosts_that_were_not_there_are_taken_only_where_nothing_goes_without_them() -> None:
    assert _choose("a b c", 3, 2, missing=["b"]) == "a c"
    assert _choose("a b c", 3, 3, missing=["b"]) == "a b c"
    assert _choose("a b c", 3, 2, fitting=(3,), missing=["b"]) == "a b c"
    assert _choose("a b c d", 3, 2, missing=["b"], doubtful=["a"]) == "a c d"


def test_ranks_of_a_host() -> None:
    model = {"preset": "moe-tiny"}
    assert ranks_on_a_host(RunConfig.model_validate({"model": model, "launch": {"ranks_per_node": 8}}), {}) == 8
    assert ranks_on_a_host(RunConfig.model_validate({"model": model, "run": {"device": "cpu"}}), {}) == 1
