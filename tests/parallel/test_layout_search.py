"""Layouts by chance: what is let through holds together, and what is suggested works."""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest

from parallel.config import DeepSpeedConfig, ParallelConfig
from parallel.layout import LayoutDemands, num_micro_batches, resolve_layout
from parallel.layout_case import Case
from parallel.layout_check import layout_problems, nearest_layout
from parallel.layout_rules import RULES, SETTING_RULES
from parallel.pipeline import check_schedule
from parallel.stages import stages_per_rank

_DEGREES = (1, 1, 1, 1, 2, 2, 3, 4)
_SCHEDULES = ("gpipe", "1f1b", "interleaved_1f1b", "interleaved_zero_bubble", "zbv", "dualpipev")


def _cases(seed: int, count: int) -> Iterator[Case]:
    chance = random.Random(seed)

    def pick(*values):  # type: ignore[no-untyped-def]
        return chance.choice(values)

    for _ in range(count):
        num_layers = pick(2, 4, 4, 6, 8)
        moe = pick(True, True, False)
        demands = LayoutDemands(
            num_layers=num_layers,
            num_heads=pick(4, 8, 8, 12),
            num_kv_heads=pick(1, 2, 4, None),
            vocab_size=pick(512, 512, 510),
            d_ff=pick(256, 256, 96, None),
            num_experts=pick(4, 8, 6) if moe else None,
            expert_d_ff=pick(64, 48) if moe else None,
            shared_d_ff=pick(None, 64) if moe else None,
            seq_len=pick(128, 128, 96, 100),
            global_batch_size=pick(8, 16, 16, 24, 7),
            micro_batch_size=pick(None, None, 1, 2),
            optimizer=pick("adamw", "adamw", "muon"),
        )
        pp = pick(1, 1, 2, 2, 4)
        split = [num_layers // pp] * pp if pp > 1 and pick(True, False, False) else None
        config = ParallelConfig(
            pp=pp,
            dp_replicate=pick(*_DEGREES[:6]),
            dp_shard=pick(-1, -1, -1, 1, 2, 4),
            cp=pick(*_DEGREES),
            tp=pick(*_DEGREES),
            ep=pick(*_DEGREES),
            expert_tp=pick(*_DEGREES[:6]),
            pipeline_schedule=pick(*_SCHEDULES),
            pipeline_stages_per_rank=pick(None, None, None, 1, 2, 3),
            pipeline_split=split,
            context_method=pick("all_gather", "ring", "ulysses"),
            data_engine=pick("ddp", "fsdp2", "fsdp2", "deepspeed"),
            cpu_offload=pick(False, False, True),
            deepspeed=DeepSpeedConfig(zero_stage=pick(1, 2, 3), offload_optimizer=pick("none", "cpu", "nvme")),
        )
        yield Case(config=config, demands=demands, world_size=pick(1, 2, 4, 8, 8, 8, 16, 12))


def _holds_together(case: Case) -> None:
    """The rules once more, as plain arithmetic."""
    config, demands = case.config, case.demands
    layout = resolve_layout(config, case.world_size)
    assert layout.pp * layout.dp_replicate * layout.dp_shard * layout.cp * layout.tp == case.world_size
    folded = layout.dp_shard * layout.cp * layout.tp
    assert layout.edp_shard * layout.ep * layout.expert_tp == folded
    for number in (demands.num_heads, demands.d_ff or 0, demands.shared_d_ff or 0, demands.vocab_size):
        assert number % layout.tp == 0
    if demands.num_kv_heads:
        assert max(demands.num_kv_heads, layout.tp) % min(demands.num_kv_heads, layout.tp) == 0
    share = demands.seq_len // layout.cp
    assert share * layout.cp == demands.seq_len
    assert share % layout.tp == 0
    assert layout.cp == 1 or share % 2 == 0
    if config.context_method == "ulysses":
        assert demands.num_heads // layout.tp % layout.cp == 0
    assert (demands.num_experts or 1) % layout.ep == 0
    if demands.expert_d_ff:
        assert demands.expert_d_ff // layout.expert_tp % 8 == 0
        assert demands.expert_d_ff % layout.expert_tp == 0
    else:
        assert layout.ep == layout.expert_tp == 1
    micro_batches = num_micro_batches(config, layout, demands)
    assert demands.global_batch_size % (layout.num_data_ranks * micro_batches) == 0
    if layout.pp > 1:
        stages = layout.pp * stages_per_rank(config.pipeline_schedule, config.pipeline_stages_per_rank)
        assert stages <= demands.num_layers
        assert config.pipeline_split is None or len(config.pipeline_split) == stages
        check_schedule(
            config.pipeline_schedule, pp=layout.pp, num_stages=stages, num_micro_batches=micro_batches
        )  # what the pipeline itself refuses
    if config.data_engine == "deepspeed":
        assert case.world_size == layout.dp_shard * layout.cp
        assert demands.optimizer == "adamw"


def test_what_is_let_through_holds_together() -> None:
    good = [case for case in _cases(1, 4000) if not any(rule(case) for rule in (*RULES, *SETTING_RULES))]
    for case in good:
        assert layout_problems(case.config, case.demands, case.world_size) == []
        _holds_together(case)
    assert len(good) > 60
    assert {case.config.pipeline_schedule for case in good if case.config.pp > 1} == set(_SCHEDULES)
    assert any(case.config.ep > 1 and case.config.tp > 1 for case in good)
    assert any(case.config.expert_tp > 1 for case in good)
    assert any(case.config.data_engine == "deepspeed" for case in good)


def test_every_mend_cures_its_reason() -> None:
    rules = (*RULES, *SETTING_RULES)
    tried = 0
    for case in _cases(2, 250):
        problems = layout_problems(case.config, case.demands, case.world_size)
        failing = [rule for rule in rules if rule(case)]
        assert len(failing) == len(problems)
        for rule, problem in zip(failing, problems, strict=True):
            for key, value in problem.mends:
                assert rule(case.with_value(key, value)) is None, (case, problem.message, key, value)
                tried += 1
    assert tried > 500


def test_a_single_reason_is_mended_for_good() -> None:
    """Where any of its mends leaves no problem at all, only such are named."""
    single = 0
    for case in _cases(3, 600):
        problems = layout_problems(case.config, case.demands, case.world_size)
        if len(problems) != 1 or not problems[0].mends:
            continue
        remaining = []
        for key, value in problems[0].mends:
            changed = case.with_value(key, value)
            remaining.append(layout_problems(changed.config, changed.demands, changed.world_size))
        single += all(not each for each in remaining)
        assert all(remaining) or not any(remaining), (case, problems[0].message)
    assert single > 20


@pytest.mark.parametrize("seed", [4, 5])
def test_the_nearest_layout_works(seed: int) -> None:
    found = 0
    for case in _cases(seed, 150):
        nearest = nearest_layout(case.config, case.demands, case.world_size)
        if nearest is None:
            continue
        degrees = {
            axis: getattr(nearest, axis) for axis in ("pp", "dp_replicate", "dp_shard", "cp", "tp", "ep", "expert_tp")
        }
        changed = Case(config=case.config.model_copy(update=degrees), demands=case.demands, world_size=case.world_size)
        assert not any(rule(changed) for rule in RULES)
        if not any(rule(case) for rule in RULES):  # what works is its own nearest
            assert nearest == resolve_layout(case.config, case.world_size)
        found += 1
    assert found > 40
