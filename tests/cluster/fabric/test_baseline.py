"""Sweeps kept over time: what counts as slower, and what as noise."""

from __future__ import annotations

import json
from datetime import timedelta
from pathlib import Path

import numpy as np
import pytest

from cluster.errors import FabricError
from cluster.fabric.baseline import BaselineStore, compare_sweeps
from cluster.fabric.groups import mesh_groups, rail_groups, world_group
from cluster.fabric.probing import Endpoint
from cluster.fabric.sweep import SweepResult
from tests.cluster.fabric.collectives import NOON, FakeCollectives, swept

ENDS = [Endpoint(rank=rank, host=f"h{rank // 4}", machine="m", rail=rank % 4) for rank in range(16)]
RAILS = rail_groups(ENDS)
RAIL_3 = (3, 7, 11, 15)
NOISE: dict[str, float] = {"noise": 0.04, "run_noise": 0.02}


def _rails(seed: int, **changes: object) -> SweepResult:
    fabric = FakeCollectives(
        world_size=16, seed=seed, **{"alpha_s": 1e-6, "beta_s_per_byte": 1 / 41e9, **NOISE, **changes}
    )  # type: ignore[arg-type]
    return swept(fabric, *RAILS, taken_at=NOON + timedelta(days=seed), kinds=("all_reduce", "all_gather", "send_recv"))


def test_a_slower_rail_is_named_in_one_sentence_with_both_figures() -> None:
    before = _rails(0, noise=0.0, run_noise=0.0)
    now = _rails(7, noise=0.0, run_noise=0.0, slow={RAIL_3: 1.22})
    check = compare_sweeps(now, before, name="2026-11-16T12-00-00")
    assert not check.ok
    of_rail = [found for found in check.regressions if found.kind == "all_reduce" and found.metric == "busbw"]
    assert [found.group for found in of_rail] == ["rail 3"]
    (found,) = of_rail
    assert found.sentence == ("busbw of all_reduce on rail 3 is 17 % below that of 2026-11-16 (38.4 -> 31.9 GB/s)")
    assert found.change_share == pytest.approx(1 / 1.22 - 1, abs=0.02)
    assert found.now < found.before


def test_found_with_noise_and_nothing_else_is() -> None:
    history = [_rails(seed) for seed in range(5)]
    for seed in range(100, 110):
        now = _rails(seed, slow={RAIL_3: 1.35})
        check = compare_sweeps(now, history[-1], name="last", history=history)
        assert {found.group for found in check.regressions} == {"rail 3"}, seed
        kinds = {found.kind for found in check.regressions if found.metric == "busbw"}
        assert len(kinds) >= 2, (seed, kinds)
        assert all(found.confidence > 0.98 for found in check.regressions)


@pytest.mark.parametrize("stored", [1, 5])
def test_an_unchanged_cluster_is_not_accused(stored: int) -> None:
    history = [_rails(seed) for seed in range(stored)]
    alarms = [
        seed
        for seed in range(200, 216)
        if not compare_sweeps(_rails(seed), history[-1], name="last", history=history).ok
    ]
    assert not alarms


def test_noisy_runs_need_a_greater_change() -> None:
    """With 15 % from run to run a drop of a fifth is nothing, and the check says how noisy it is."""
    found = {}
    for noise in (0.01, 0.15):
        history = [_rails(seed, noise=0.0, run_noise=noise) for seed in range(6)]
        now = _rails(9, noise=0.0, run_noise=noise, slow={RAIL_3: 1.3})
        check = compare_sweeps(now, history[-1], name="last", history=history)
        found[noise] = {each.group for each in check.regressions}
        assert check.noise_share == pytest.approx(noise, rel=0.6)
    assert found == {0.01: {"rail 3"}, 0.15: set()}


def test_a_series_that_is_noisy_itself_needs_a_greater_change() -> None:
    rng = np.random.default_rng(2)
    slow = [{RAIL_3: float(rng.lognormal(0, 0.2))} for _ in range(8)]
    history = [_rails(seed, slow=each) for seed, each in enumerate(slow)]
    for rail, found in ((3, set()), (2, {"rail 2"})):
        now = _rails(9, slow={**slow[-1], (rail, rail + 4, rail + 8, rail + 12): 1.4 * slow[-1].get(RAIL_3, 1.0)})
        check = compare_sweeps(now, history[-1], name="last", history=history)
        assert {each.group for each in check.regressions} == found


def test_a_change_below_a_tenth_is_of_no_interest_however_sure() -> None:
    before = _rails(0, noise=0.0, run_noise=0.0)
    now = _rails(7, noise=0.0, run_noise=0.0, slow={RAIL_3: 1.08})
    assert compare_sweeps(now, before, name="last").ok


def test_a_greater_alpha_is_told_as_latency() -> None:
    before = swept(FakeCollectives(noise=0.01))
    now = swept(FakeCollectives(noise=0.01, seed=1, alpha_s=30e-6), taken_at=NOON)
    found = compare_sweeps(now, before, name="last week").regressions
    latency = [each for each in found if each.metric == "latency" and each.kind == "all_reduce"]
    assert len(latency) == 1
    assert latency[0].sentence.startswith("latency of all_reduce on world is 4")
    assert " % above that of last week (2026-11-16) (" in latency[0].sentence
    assert latency[0].sentence.endswith(" us)")


def test_the_mode_is_told_where_groups_overlap() -> None:
    sets = mesh_groups("dp=4,tp=2", 8)
    before = swept(FakeCollectives(), *sets)
    now = swept(FakeCollectives(together_slowness=2.0), *sets)
    found = compare_sweeps(now, before, name="last").regressions
    assert found
    assert {each.mode for each in found} == {"together"}
    assert "busbw of all_gather on tp, together, is 49 % below that of last (2026-11-16)" in " ".join(
        each.sentence for each in found
    )


def test_wrong_data_are_worse_whatever_the_baseline() -> None:
    before = swept(FakeCollectives())
    check = compare_sweeps(swept(FakeCollectives(wrong="broadcast")), before, name="last")
    (found,) = check.regressions
    assert found.metric == "correctness"
    assert found.sentence.startswith("broadcast on world gives wrong data at 1024, 4096, ")


def test_what_only_one_of_them_has_is_told_and_not_compared() -> None:
    before = swept(FakeCollectives(), world_group(8))
    now = swept(FakeCollectives(), *mesh_groups("dp=4,tp=2", 8))
    check = compare_sweeps(now, before, name="last")
    assert (check.num_compared, check.ok) == (0, True)
    assert "all_reduce on world of 8 ranks, isolated" in check.only_there
    assert "all_reduce on tp of 2 ranks, together" in check.only_here


def test_a_store_gives_back_what_was_saved_the_oldest_first(tmp_path: Path) -> None:
    store = BaselineStore(tmp_path, "alps")
    late, early = _rails(9), _rails(1)
    path = store.save(late)
    assert path == tmp_path / "alps" / "2026-11-25T12-00-00.json"
    store.save(early, "before-the-upgrade")
    assert store.names() == ("before-the-upgrade", "2026-11-25T12-00-00")
    assert store.load("before-the-upgrade") == early
    assert [each.name for each in path.parent.iterdir() if each.suffix != ".json"] == []
    assert BaselineStore(tmp_path, "jura").names() == ()


def test_a_check_takes_the_newest_of_the_same_kind_unless_one_is_named(tmp_path: Path) -> None:
    store = BaselineStore(tmp_path, "alps")
    store.save(_rails(1, noise=0.0, run_noise=0.0), "old")
    store.save(_rails(2, noise=0.0, run_noise=0.0, slow={RAIL_3: 1.3}), "new")
    store.save(swept(FakeCollectives(transport="mpi", world_size=16), *RAILS, taken_at=NOON + timedelta(days=3)), "mpi")
    now = _rails(4, noise=0.0, run_noise=0.0, slow={RAIL_3: 1.3})
    newest, named = store.check(now), store.check(now, "old")
    assert (newest.baseline, newest.ok) == ("new", True)
    assert (named.baseline, named.ok) == ("old", False)
    assert json.loads(json.dumps(named.as_data()))["ok"] is False


def test_what_cannot_be_compared_or_stored_is_refused_in_one_line(tmp_path: Path) -> None:
    store = BaselineStore(tmp_path, "alps")
    now = _rails(1)
    with pytest.raises(FabricError, match=r"no baseline in .*alps is of 16 ranks over gloo: save one first"):
        store.check(now)
    store.save(now, "a")
    with pytest.raises(FabricError, match=r"a\.json is there already: give another name, or remove it"):
        store.save(now, "a")
    with pytest.raises(FabricError, match=r"no baseline 'b' in .*alps: there are a"):
        store.check(now, "b")
    store.save(swept(FakeCollectives()), "small")
    with pytest.raises(FabricError, match="baseline 'small' is of 8 ranks over gloo, this sweep of 16 ranks over gloo"):
        store.check(now, "small")
    for name in ("../a", "", ".hidden", "a/b"):
        with pytest.raises(FabricError, match="a name has letters, digits"):
            store.save(now, name)
        with pytest.raises(FabricError, match=r"cluster .*: a name has letters"):
            BaselineStore(tmp_path, name)
    (tmp_path / "alps" / "broken.json").write_text("{}")
    with pytest.raises(FabricError, match=r"broken.json is not what `mega fabric sweep --output` writes"):
        store.check(now)
