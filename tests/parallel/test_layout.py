"""Layouts: every rule with its message, and what a layout is."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from parallel.config import DeepSpeedConfig, ParallelConfig
from parallel.errors import ParallelError
from parallel.layout import Layout, LayoutDemands, micro_batch_size, num_micro_batches, resolve_layout
from parallel.layout_check import layout_problems, nearest_layout

DEMANDS = LayoutDemands(
    num_layers=4,
    num_heads=4,
    num_kv_heads=2,
    vocab_size=512,
    d_ff=256,
    num_experts=8,
    expert_d_ff=64,
    shared_d_ff=64,
    seq_len=128,
    global_batch_size=8,
    micro_batch_size=None,
)


def messages(world_size: int, config: dict[str, Any], **demands: Any) -> list[str]:
    found = layout_problems(ParallelConfig(**config), replace(DEMANDS, **demands), world_size)
    return [problem.message for problem in found]


@pytest.mark.parametrize(
    ("world_size", "config", "demands", "message"),
    [
        (
            8,
            {"dp_shard": 8, "tp": 2},
            {},
            "parallel: dp_shard 8 * tp 2 = 16 ranks declared, 8 required; "
            "use parallel.dp_shard = 4, or parallel.tp = 1, or --ranks 16",
        ),
        (
            4,
            {"tp": 8},
            {"num_heads": 8},
            "parallel: tp 8: 8 ranks declared, 4 required; use parallel.tp = 4, or --ranks 8",
        ),
        (
            10,
            {"tp": 4},
            {"global_batch_size": 10},
            "parallel: tp 4: 4 ranks declared, which do not divide the 10 required; use parallel.tp = 2, or --ranks 8",
        ),
        (3, {"dp_shard": 1}, {"global_batch_size": 9}, "parallel: every degree 1: 1 ranks declared, 3 required; use"),
        (8, {"tp": 8}, {}, "parallel.tp = 8: must divide model.num_heads = 4; use parallel.tp = 4"),
        (
            6,
            {"tp": 3},
            {"num_heads": 6, "d_ff": 96, "shared_d_ff": 96, "vocab_size": 96, "seq_len": 96, "global_batch_size": 6},
            "parallel.tp = 3: must divide model.num_kv_heads = 2, or be a multiple of it; use parallel.tp = 2 or 6",
        ),
        (8, {"tp": 4}, {"d_ff": 90}, "parallel.tp = 4: must divide model.d_ff = 90; use parallel.tp = 2"),
        (
            8,
            {"tp": 4},
            {"shared_d_ff": 66},
            "parallel.tp = 4: must divide model.moe.num_shared_experts * model.moe.d_ff = 66; use parallel.tp = 2",
        ),
        (
            8,
            {"tp": 4},
            {"vocab_size": 510},
            "parallel.tp = 4: must divide model.vocab_size = 510; use parallel.tp = 2, or model.vocab_size = 508 or 512",
        ),
        (
            8,
            {"cp": 4},
            {"seq_len": 124},
            "data.seq_len = 124: must be a multiple of 2 * parallel.cp = 8; use data.seq_len = 120 or 128, or parallel.cp = 2",
        ),
        (
            8,
            {"cp": 2, "tp": 4},
            {"seq_len": 124},
            "data.seq_len = 124: must be a multiple of 2 * parallel.cp = 4 and parallel.cp * parallel.tp = 8; "
            "use data.seq_len = 120 or 128, or parallel.cp = 1, or parallel.tp = 2",
        ),
        (
            8,
            {"cp": 4, "tp": 2, "context_method": "ulysses"},
            {},
            'parallel.cp = 4: with parallel.context_method = "ulysses", must divide the 2 heads of a rank '
            '(model.num_heads / parallel.tp); use parallel.cp = 2, or parallel.context_method = "all_gather"',
        ),
        (
            8,
            {"ep": 2},
            {"num_experts": None, "expert_d_ff": None, "shared_d_ff": None},
            "parallel.ep = 2: the model has no experts (model.moe); use parallel.ep = 1",
        ),
        (
            8,
            {"expert_tp": 2},
            {"num_experts": None, "expert_d_ff": None, "shared_d_ff": None},
            "parallel.expert_tp = 2: the model has no experts (model.moe); use parallel.expert_tp = 1",
        ),
        (
            12,
            {"ep": 3},
            {"global_batch_size": 12},
            "parallel.ep = 3: must divide model.moe.num_experts = 8; use parallel.ep = 2 or 4",
        ),
        (
            8,
            {"expert_tp": 4},
            {"expert_d_ff": 48},
            "parallel.expert_tp = 4: must cut model.moe.d_ff = 48 into equal multiples of 8; use parallel.expert_tp = 2",
        ),
        (
            8,
            {"ep": 4, "expert_tp": 4},
            {},
            "parallel.ep * parallel.expert_tp = 16: must divide dp_shard * cp * tp = 8, whose ranks the experts share; "
            "use parallel.ep = 2, or parallel.expert_tp = 2",
        ),
        (
            8,
            {"ep": 8, "dp_replicate": 2},
            {},
            "parallel.ep = 8: must divide dp_shard * cp * tp = 4, whose ranks the experts share; "
            "use parallel.ep = 4, or parallel.dp_replicate = 1",
        ),
        (
            8,
            {"pp": 2, "pipeline_stages_per_rank": 2},
            {},
            'parallel.pipeline_stages_per_rank = 2: parallel.pipeline_schedule = "1f1b" needs 1; '
            'use parallel.pipeline_stages_per_rank = 1, or parallel.pipeline_schedule = "interleaved_1f1b"',
        ),
        (
            8,
            {"pp": 2, "pipeline_schedule": "zbv", "pipeline_stages_per_rank": 1},
            {},
            'parallel.pipeline_stages_per_rank = 1: parallel.pipeline_schedule = "zbv" needs 2; '
            'use parallel.pipeline_stages_per_rank = 2, or parallel.pipeline_schedule = "interleaved_1f1b"',
        ),
        (8, {"pp": 8}, {}, "parallel.pp = 8: makes 8 stages, more than model.num_layers = 4; use parallel.pp = 4"),
        (
            8,
            {"pp": 4, "pipeline_schedule": "interleaved_1f1b"},
            {},
            "parallel.pp = 4: makes 8 stages (2 a rank), more than model.num_layers = 4; use parallel.pp = 2, "
            'or parallel.pipeline_stages_per_rank = 1, or parallel.pipeline_schedule = "1f1b"',
        ),
        (
            8,
            {"pp": 2, "pipeline_split": [1, 2, 2]},
            {},
            "parallel.pipeline_split = [1, 2, 2]: has 3 entries, and there are 2 stages, sums to 5, not to "
            "model.num_layers = 4; use parallel.pipeline_split = [2, 2]",
        ),
        (
            8,
            {"pp": 2, "pipeline_split": [4, 0]},
            {},
            "parallel.pipeline_split = [4, 0]: gives a stage no layer; use parallel.pipeline_split = [2, 2]",
        ),
        (
            8,
            {"pipeline_split": [4]},
            {},
            "parallel.pipeline_split = [4]: means nothing with parallel.pp = 1; use no parallel.pipeline_split",
        ),
        (
            4,
            {},
            {"global_batch_size": 10},
            "train.global_batch_size = 10: cannot be shared by 4 data ranks evenly; "
            "use train.global_batch_size = 8 or 12, or --ranks 2 or 5",
        ),
        (
            4,
            {},
            {"global_batch_size": 12, "micro_batch_size": 6},
            "train.global_batch_size = 12: cannot be shared by 4 data ranks of 6 samples (train.micro_batch_size) evenly; "
            "use train.global_batch_size = 24, or train.micro_batch_size = 3, or --ranks 2",
        ),
        (
            8,
            {"pp": 2},
            {"micro_batch_size": 2},
            'parallel.pipeline_schedule = "1f1b": a data rank has 1 micro batches of 2 (train.global_batch_size / data ranks '
            "/ train.micro_batch_size), and it needs at least 2, one a rank of the pipeline; use train.micro_batch_size = 1, "
            'or train.global_batch_size = 16, or parallel.pipeline_schedule = "gpipe"',
        ),
        (
            2,
            {"pp": 2, "pipeline_schedule": "dualpipev"},
            {"global_batch_size": 3},
            'parallel.pipeline_schedule = "dualpipev": a data rank has 3 micro batches of 1 (train.global_batch_size / data '
            "ranks / train.micro_batch_size), and it needs at least 4, one a stage; use train.global_batch_size = 4, "
            'or parallel.pipeline_schedule = "gpipe"',
        ),
        (
            2,
            {"pp": 2, "pipeline_schedule": "interleaved_1f1b"},
            {"global_batch_size": 7},
            'parallel.pipeline_schedule = "interleaved_1f1b": a data rank has 7 micro batches of 1 (train.global_batch_size / '
            "data ranks / train.micro_batch_size), and it needs a multiple of 3, the rounds of parallel.pp = 2; "
            'use train.global_batch_size = 6 or 8, or parallel.pipeline_schedule = "gpipe"',
        ),
        (
            8,
            {"data_engine": "deepspeed", "tp": 2},
            {},
            'parallel.tp = 2: must be 1 with parallel.data_engine = "deepspeed" (cp may be more); use parallel.tp = 1, '
            'or parallel.data_engine = "fsdp2"',
        ),
        (
            8,
            {"data_engine": "deepspeed"},
            {"optimizer": "muon"},
            'train.optimizer.name = "muon": parallel.data_engine = "deepspeed" works with "adamw" only; '
            'use train.optimizer.name = "adamw", or parallel.data_engine = "fsdp2"',
        ),
        (
            8,
            {"data_engine": "deepspeed", "deepspeed": DeepSpeedConfig(offload_parameters="cpu")},
            {},
            'parallel.deepspeed.offload_parameters = "cpu": needs parallel.deepspeed.zero_stage = 3, not 2; '
            'use parallel.deepspeed.zero_stage = 3, or parallel.deepspeed.offload_parameters = "none"',
        ),
        (
            8,
            {"data_engine": "deepspeed", "deepspeed": DeepSpeedConfig(offload_optimizer="nvme", nvme_path="/x")},
            {},
            'parallel.deepspeed.offload_optimizer = "nvme": needs parallel.deepspeed.zero_stage = 3, not 2; '
            'use parallel.deepspeed.zero_stage = 3, or parallel.deepspeed.offload_optimizer = "cpu"',
        ),
        (
            8,
            {"data_engine": "deepspeed", "deepspeed": DeepSpeedConfig(zero_stage=3, offload_optimizer="nvme")},
            {},
            'parallel.deepspeed.offload_optimizer = "nvme": needs parallel.deepspeed.nvme_path, a folder on a disk local to '
            'each host; use parallel.deepspeed.offload_optimizer = "cpu"',
        ),
        (
            8,
            {"cpu_offload": True},
            {},
            'parallel.cpu_offload = true: means nothing with parallel.data_engine = "ddp"; use parallel.cpu_offload = false, '
            'or parallel.data_engine = "fsdp2"',
        ),
        (
            8,
            {"reshard_after_forward": False, "data_engine": "deepspeed"},
            {},
            'parallel.reshard_after_forward = false: means nothing with parallel.data_engine = "deepspeed"; '
            'use parallel.reshard_after_forward = true, or parallel.data_engine = "fsdp2"',
        ),
        (
            8,
            {"async_tp": True, "tp": 2},
            {"compile": "off", "device": "cpu"},
            'parallel.async_tp = true: needs CUDA and torch.compile, and run.device = "cpu" and train.compile = "off"; '
            "use parallel.async_tp = false",
        ),
    ],
)
def test_each_rule_says_what_is_wrong_and_the_nearest_that_works(
    world_size: int, config: dict[str, Any], demands: dict[str, Any], message: str
) -> None:
    found = messages(world_size, config, **demands)
    assert any(each.startswith(message) for each in found), "\n".join(found)


@pytest.mark.parametrize(
    ("world_size", "config", "demands"),
    [
        (1, {}, {}),
        (8, {"tp": 4}, {"num_kv_heads": 1}),  # fewer key heads than ranks: copies
        (8, {"tp": 4}, {"num_kv_heads": None}),  # latent attention has none to cut
        (8, {"tp": 4}, {"d_ff": None}),  # no dense layer
        (8, {"cp": 4, "context_method": "ulysses"}, {}),
        (8, {"ep": 8}, {}),  # over all of dp_shard
        (8, {"tp": 2, "cp": 2, "ep": 4, "expert_tp": 2}, {}),
        (8, {"pp": 4, "pipeline_split": [1, 1, 1, 1]}, {}),
        (8, {"pp": 2, "pipeline_schedule": "gpipe"}, {"micro_batch_size": 2}),  # one micro batch does
        (8, {"pp": 4, "pipeline_schedule": "interleaved_zero_bubble", "pipeline_stages_per_rank": 1}, {}),
        (1, {"pipeline_schedule": "zbv", "pipeline_stages_per_rank": 3}, {}),  # no pipeline: nothing to schedule
        (8, {"data_engine": "deepspeed", "cp": 2}, {}),
        (8, {"deepspeed": DeepSpeedConfig(offload_parameters="nvme")}, {}),  # another engine's settings
        (8, {"async_tp": True, "tp": 2}, {}),
        (8, {"async_tp": True}, {"device": "cpu"}),  # nothing to overlap
    ],
)
def test_what_is_possible_is_not_refused(world_size: int, config: dict[str, Any], demands: dict[str, Any]) -> None:
    assert messages(world_size, config, **demands) == []


@pytest.mark.parametrize("axis", ["pp", "dp_replicate", "tp", "ep", "expert_tp"])
def test_deepspeed_composes_with_data_and_context_axes_only(axis: str) -> None:
    (found,) = messages(8, {"data_engine": "deepspeed", axis: 2})
    assert found.startswith(
        f'parallel.{axis} = 2: must be 1 with parallel.data_engine = "deepspeed" (cp may be more); use '
    )
    assert f"parallel.{axis} = 1" in found


def test_all_reasons_come_at_once_each_with_a_mend_that_cures_all_where_one_does() -> None:
    found = messages(8, {"tp": 3})
    assert [message.split(": must")[0].split("; use")[0] for message in found] == [
        "parallel: tp 3: 3 ranks declared, which do not divide the 8 required",
        *["parallel.tp = 3"] * 5,
        "data.seq_len = 128",
    ]
    assert all(message.endswith("use parallel.tp = 2 or 4") for message in found)


def test_reasons_that_no_single_change_cures_end_with_the_nearest_layout() -> None:
    found = messages(8, {"tp": 3, "cp": 3, "ep": 3, "pp": 5})
    assert len(found) == 9
    assert found[-1].endswith(
        "nearest layout that works on 8 ranks: parallel.pp = 2, parallel.cp = 2, parallel.tp = 2, parallel.ep = 4"
    )
    assert not any("nearest layout" in message for message in found[:-1])
    config = ParallelConfig(pp=2, cp=2, tp=2, ep=4)
    assert layout_problems(config, DEMANDS, 8) == []


def test_where_no_layout_works_none_is_named() -> None:
    assert nearest_layout(ParallelConfig(), replace(DEMANDS, global_batch_size=1, seq_len=127), 16384) is None


def test_the_search_is_quick_for_sixteen_thousand_ranks() -> None:
    demands = replace(DEMANDS, num_layers=126, num_heads=128, num_kv_heads=8, global_batch_size=1024, seq_len=8192)
    nearest = nearest_layout(ParallelConfig(tp=12, pp=15, cp=3), demands, 16384)
    assert nearest is not None
    assert (nearest.pp, nearest.cp, nearest.world_size) == (16, 4, 16384)


def test_dp_shard_takes_what_the_others_leave() -> None:
    assert resolve_layout(ParallelConfig(pp=2, tp=2), 16) == Layout(pp=2, dp_shard=4, tp=2)
    assert resolve_layout(ParallelConfig(dp_shard=4, dp_replicate=2), 8) == Layout(dp_shard=4, dp_replicate=2)


def test_degrees_that_do_not_make_up_the_world_are_refused_in_one_line() -> None:
    with pytest.raises(
        ParallelError, match="tp 3: 3 ranks declared, which do not divide the 8 required: change a degree"
    ):
        resolve_layout(ParallelConfig(tp=3), 8)
    with pytest.raises(ParallelError, match=r"dp_shard 2 \* tp 2 = 4 ranks declared, 8 required"):
        resolve_layout(ParallelConfig(tp=2, dp_shard=2), 8)


def test_experts_fold_the_data_context_and_tensor_axes() -> None:
    layout = Layout(pp=2, dp_replicate=2, dp_shard=2, cp=2, tp=2, ep=4)
    assert (layout.world_size, layout.edp_shard, layout.num_data_ranks) == (32, 2, 4)


@pytest.mark.parametrize(
    ("config", "world_size", "micro", "expected"),
    [
        ({}, 2, None, (4, 1)),  # all at once
        ({}, 2, 2, (2, 2)),
        ({"pp": 2}, 4, None, (1, 4)),  # one at a time in a pipeline
        ({"pp": 2, "tp": 2}, 4, 4, (4, 2)),
    ],
)
def test_micro_batches(config: dict[str, Any], world_size: int, micro: int | None, expected: tuple[int, int]) -> None:
    parallel, demands = ParallelConfig(**config), replace(DEMANDS, micro_batch_size=micro)
    layout = resolve_layout(parallel, world_size)
    assert (micro_batch_size(parallel, layout, demands), num_micro_batches(parallel, layout, demands)) == expected
