"""What a layout must satisfy, a rule each. Imports without torch.

A rule looks at a whole case and finds one violation or none, so that a search can try a change and ask again.
"""

from __future__ import annotations

import math

from parallel.layout import micro_batch_size, num_micro_batches, world_mismatch
from parallel.layout_case import DEMAND_KEYS, WORLD, Case, Rule, Violation, key_of, stated
from parallel.stages import SINGLE_STAGE_SCHEDULES, V_SCHEDULES, split_layers

# Grouped products want rows of 16-byte multiples, which in bf16 are 8 numbers.
_EXPERT_ROW = 8


def _degrees_make_up_the_world(case: Case) -> Violation | None:
    reason = world_mismatch(case.config, case.world_size)
    if reason is None:
        return None
    degrees = {axis: getattr(case.config, axis) for axis in ("dp_shard", "tp", "pp", "cp", "dp_replicate")}
    split = tuple(key_of(axis) for axis, degree in degrees.items() if degree not in (-1, 1)) or ("parallel.dp_shard",)
    product = math.prod(degree for degree in degrees.values() if degree != -1)
    worlds = [product]
    if case.config.dp_shard == -1:
        below = case.world_size // product * product
        worlds = [world for world in (below, below + product) if world]
    return Violation(keys=split, reason=reason, mend_by=(*split, WORLD), choices={WORLD: worlds})


def _divides(axis: str, demand: str, *, mend_demand: bool = False) -> Rule:
    """The degree of an axis divides a number of the model."""

    def rule(case: Case) -> Violation | None:
        degree, number = getattr(case.config, axis), getattr(case.demands, demand)
        if number is None or number % degree == 0:
            return None
        key = DEMAND_KEYS[demand]
        named = f"{key} * model.moe.d_ff" if demand == "shared_d_ff" else key
        return Violation(
            keys=(key_of(axis), key, "model.preset"),
            reason=f"{stated(case, key_of(axis))}: must divide {named} = {number}",
            mend_by=(key_of(axis), key) if mend_demand else (key_of(axis),),
            unit=degree,
        )

    return rule


def _kv_heads_are_cut_or_copied(case: Case) -> Violation | None:
    tp, heads = case.config.tp, case.demands.num_kv_heads
    if heads is None or heads % tp == 0 or tp % heads == 0:
        return None
    return Violation(
        keys=("parallel.tp", "model.num_kv_heads", "model.preset"),
        reason=f"parallel.tp = {tp}: must divide model.num_kv_heads = {heads}, or be a multiple of it",
        mend_by=("parallel.tp",),
    )


def _rows_are_cut(case: Case) -> Violation | None:
    """Along cp into two pieces a rank (zig-zag), and what a rank has of it along tp between the layers."""
    cp, tp, row = case.config.cp, case.config.tp, case.demands.seq_len
    unit = math.lcm(2 * cp if cp > 1 else 1, cp * tp)
    if row % unit == 0:
        return None
    shares = " and ".join(
        text
        for text, applies in (
            (f"2 * parallel.cp = {2 * cp}", cp > 1),
            (f"parallel.cp * parallel.tp = {cp * tp}", tp > 1),
        )
        if applies
    )
    return Violation(
        keys=("data.seq_len", "parallel.cp", "parallel.tp"),
        reason=f"data.seq_len = {row}: must be a multiple of {shares}",
        mend_by=("data.seq_len", *(key_of(axis) for axis in ("cp", "tp") if getattr(case.config, axis) > 1)),
        unit=unit,
    )


def _heads_are_exchanged(case: Case) -> Violation | None:
    cp, tp, heads = case.config.cp, case.config.tp, case.demands.num_heads
    if case.config.context_method != "ulysses" or cp == 1 or heads % tp or heads // tp % cp == 0:
        return None
    return Violation(
        keys=("parallel.cp", "parallel.context_method", "parallel.tp", "model.num_heads", "model.preset"),
        reason=f'parallel.cp = {cp}: with parallel.context_method = "ulysses", must divide the '
        f"{heads // tp} heads of a rank (model.num_heads / parallel.tp)",
        mend_by=("parallel.cp", "parallel.context_method"),
        choices={"parallel.context_method": ["all_gather"]},
    )


def _has_experts(axis: str) -> Rule:
    def rule(case: Case) -> Violation | None:
        if case.demands.num_experts is not None or getattr(case.config, axis) == 1:
            return None
        return Violation(
            keys=(key_of(axis), "model.moe", "model.preset"),
            reason=f"{stated(case, key_of(axis))}: the model has no experts (model.moe)",
            mend_by=(key_of(axis),),
        )

    return rule


def _expert_is_cut(case: Case) -> Violation | None:
    degree, width = case.config.expert_tp, case.demands.expert_d_ff
    if width is None or degree == 1 or width % (_EXPERT_ROW * degree) == 0:
        return None
    return Violation(
        keys=("parallel.expert_tp", "model.moe.d_ff", "model.preset"),
        reason=f"parallel.expert_tp = {degree}: must cut model.moe.d_ff = {width} into equal multiples of {_EXPERT_ROW}",
        mend_by=("parallel.expert_tp",),
    )


def _experts_fold(case: Case) -> Violation | None:
    layout, both = case.layout, case.config.ep * case.config.expert_tp
    folded = layout.dp_shard * layout.cp * layout.tp
    if folded % both == 0 or world_mismatch(case.config, case.world_size):
        return None
    split = tuple(axis for axis in ("ep", "expert_tp") if getattr(case.config, axis) > 1)
    degrees = f"parallel.ep * parallel.expert_tp = {both}" if len(split) > 1 else stated(case, key_of(split[0]))
    return Violation(
        keys=(*map(key_of, split), "parallel.dp_shard", "parallel.cp", "parallel.tp"),
        reason=f"{degrees}: must divide dp_shard * cp * tp = {folded}, whose ranks the experts share",
        mend_by=tuple(map(key_of, (*split, "dp_replicate", "pp"))),
    )


def _schedule_has_its_stages(case: Case) -> Violation | None:
    schedule, held = case.config.pipeline_schedule, case.config.pipeline_stages_per_rank
    needed = 1 if schedule in SINGLE_STAGE_SCHEDULES else 2 if schedule in V_SCHEDULES else None
    if case.config.pp == 1 or held is None or needed is None or held == needed:
        return None
    return Violation(
        keys=("parallel.pipeline_stages_per_rank", "parallel.pipeline_schedule", "parallel.pp"),
        reason=f'parallel.pipeline_stages_per_rank = {held}: parallel.pipeline_schedule = "{schedule}" needs {needed}',
        mend_by=("parallel.pipeline_stages_per_rank", "parallel.pipeline_schedule"),
        choices={"parallel.pipeline_schedule": ["interleaved_1f1b"]},
    )


def _stages_have_layers(case: Case) -> Violation | None:
    layers, stages = case.demands.num_layers, case.num_stages
    if stages <= layers:
        return None
    held = stages // case.config.pp
    of = f"{stages} stages ({held} a rank)" if held > 1 else f"{stages} stages"
    return Violation(
        keys=(
            "parallel.pp",
            "parallel.pipeline_stages_per_rank",
            "parallel.pipeline_schedule",
            "model.num_layers",
            "model.preset",
        ),
        reason=f"parallel.pp = {case.config.pp}: makes {of}, more than model.num_layers = {layers}",
        mend_by=("parallel.pp", "parallel.pipeline_stages_per_rank", "parallel.pipeline_schedule"),
        choices={"parallel.pipeline_schedule": ["1f1b"]},
    )


def _split_is_of_all_layers(case: Case) -> Violation | None:
    split, layers, stages = case.config.pipeline_split, case.demands.num_layers, case.num_stages
    if split is None:
        return None
    wrong = []
    if case.config.pp == 1:
        wrong.append("means nothing with parallel.pp = 1")
    elif len(split) != stages:
        wrong.append(f"has {len(split)} entries, and there are {stages} stages")
    if sum(split) != layers:
        wrong.append(f"sums to {sum(split)}, not to model.num_layers = {layers}")
    if any(entry < 1 for entry in split):
        wrong.append("gives a stage no layer")
    if not wrong:
        return None
    even = split_layers([1.0] * layers, embedding_cost=0.0, head_cost=0.0, num_stages=min(stages, layers))
    return Violation(
        keys=(
            "parallel.pipeline_split",
            "parallel.pp",
            "parallel.pipeline_stages_per_rank",
            "model.num_layers",
            "model.preset",
        ),
        reason=f"parallel.pipeline_split = {split}: {', '.join(wrong)}",
        mend_by=("parallel.pipeline_split",),
        choices={"parallel.pipeline_split": [list(even), None] if case.config.pp > 1 else [None]},
    )


def _batch_is_shared(case: Case) -> Violation | None:
    if world_mismatch(case.config, case.world_size):
        return None
    batch, micro, ranks = case.demands.global_batch_size, case.demands.micro_batch_size, case.layout.num_data_ranks
    unit = ranks * (micro or 1)
    if batch % unit == 0:
        return None
    share = f"{ranks} data ranks" if ranks > 1 else "1 data rank"
    share += "" if micro is None else f" of {micro} samples (train.micro_batch_size)"
    return Violation(
        keys=("train.global_batch_size", "train.micro_batch_size", "parallel.dp_shard", "parallel.dp_replicate"),
        reason=f"train.global_batch_size = {batch}: cannot be shared by {share} evenly",
        mend_by=("train.global_batch_size", "train.micro_batch_size", WORLD)
        if micro
        else ("train.global_batch_size", WORLD),
        unit=unit,
    )


def _pipeline_is_fed(case: Case) -> Violation | None:
    """What torch's schedules demand of the number of micro batches."""
    schedule, pp = case.config.pipeline_schedule, case.config.pp
    if pp == 1 or _batch_is_shared(case) or world_mismatch(case.config, case.world_size):
        return None
    count = num_micro_batches(case.config, case.layout, case.demands)
    needed = None
    if schedule == "1f1b" and count < pp:
        needed = f"at least {pp}, one a rank of the pipeline"
    elif schedule == "dualpipev" and count < 2 * pp:
        needed = f"at least {2 * pp}, one a stage"
    elif schedule.startswith("interleaved") and count % (rounds := max(1, count // pp)):
        needed = f"a multiple of {rounds}, the rounds of parallel.pp = {pp}"
    if needed is None:
        return None
    micro = micro_batch_size(case.config, case.layout, case.demands)
    return Violation(
        keys=("train.global_batch_size", "train.micro_batch_size", "parallel.pipeline_schedule", "parallel.pp"),
        reason=f'parallel.pipeline_schedule = "{schedule}": a data rank has {count} micro batches of {micro} '
        f"(train.global_batch_size / data ranks / train.micro_batch_size), and it needs {needed}",
        mend_by=(
            *(("train.micro_batch_size",) if needed.startswith("at least") else ()),
            *("train.global_batch_size", "parallel.pp", "parallel.pipeline_schedule"),
        ),
        unit=case.layout.num_data_ranks * micro,
        choices={"parallel.pipeline_schedule": ["gpipe"]},
    )


def _overlap_is_compiled_for_cuda(case: Case) -> Violation | None:
    if not case.config.async_tp or case.config.tp == 1:
        return None
    wrong = [key for key, bad in (("run.device", "cpu"), ("train.compile", "off")) if case.value(key) == bad]
    if not wrong:
        return None
    return Violation(
        keys=("parallel.async_tp", *wrong),
        reason=f"parallel.async_tp = true: needs CUDA and torch.compile, and {' and '.join(stated(case, key) for key in wrong)}",
        mend_by=("parallel.async_tp",),
        choices={"parallel.async_tp": [False]},
    )


def _deepspeed_is_alone(axis: str) -> Rule:
    def rule(case: Case) -> Violation | None:
        if case.config.data_engine != "deepspeed" or getattr(case.config, axis) == 1:
            return None
        return Violation(
            keys=(key_of(axis), "parallel.data_engine"),
            reason=f'{stated(case, key_of(axis))}: must be 1 with parallel.data_engine = "deepspeed" (cp may be more)',
            mend_by=(key_of(axis), "parallel.data_engine"),
            choices={"parallel.data_engine": ["fsdp2"]},
        )

    return rule


def _deepspeed_steps_adamw(case: Case) -> Violation | None:
    """It flattens what it shards; Muon would want matrices."""
    if case.config.data_engine != "deepspeed" or case.demands.optimizer == "adamw":
        return None
    return Violation(
        keys=("train.optimizer.name", "parallel.data_engine"),
        reason=f'{stated(case, "train.optimizer.name")}: parallel.data_engine = "deepspeed" works with "adamw" only',
        mend_by=("train.optimizer.name", "parallel.data_engine"),
        choices={"train.optimizer.name": ["adamw"], "parallel.data_engine": ["fsdp2"]},
    )


def _deepspeed_keeps_fp32(case: Case) -> Violation | None:
    """Its own fp32 copies would start from rounded weights."""
    if case.config.data_engine != "deepspeed" or case.config.param_dtype == "fp32":
        return None
    return Violation(
        keys=("parallel.param_dtype", "parallel.data_engine"),
        reason=f'{stated(case, "parallel.param_dtype")}: parallel.data_engine = "deepspeed" keeps its weights in fp32',
        mend_by=("parallel.param_dtype", "parallel.data_engine"),
        choices={"parallel.param_dtype": ["fp32"], "parallel.data_engine": ["fsdp2"]},
    )


def _is_for_fsdp2(name: str, default: bool) -> Rule:
    def rule(case: Case) -> Violation | None:
        if case.config.data_engine == "fsdp2" or getattr(case.config, name) == default:
            return None
        return Violation(
            keys=(key_of(name), "parallel.data_engine"),
            reason=f"{stated(case, key_of(name))}: means nothing with {stated(case, 'parallel.data_engine')}",
            mend_by=(key_of(name), "parallel.data_engine"),
            choices={key_of(name): [default], "parallel.data_engine": ["fsdp2"]},
        )

    return rule


def _deepspeed_offload(name: str) -> Rule:
    key = f"parallel.deepspeed.{name}"

    def rule(case: Case) -> Violation | None:
        section = case.config.deepspeed
        where = getattr(section, name)
        if case.config.data_engine != "deepspeed" or section.zero_stage == 3 or where == "none":
            return None
        if name == "offload_optimizer" and where == "cpu":
            return None
        others = ["cpu"] if name == "offload_optimizer" else ["none"]
        return Violation(
            keys=(key, "parallel.deepspeed.zero_stage"),
            reason=f"{stated(case, key)}: needs parallel.deepspeed.zero_stage = 3, not {section.zero_stage}",
            mend_by=("parallel.deepspeed.zero_stage", key),
            choices={"parallel.deepspeed.zero_stage": [3], key: others},
        )

    return rule


def _nvme_has_a_folder(case: Case) -> Violation | None:
    section = case.config.deepspeed
    on_nvme = [name for name in ("offload_optimizer", "offload_parameters") if getattr(section, name) == "nvme"]
    if case.config.data_engine != "deepspeed" or not on_nvme or section.nvme_path is not None:
        return None
    key = f"parallel.deepspeed.{on_nvme[0]}"
    return Violation(
        keys=("parallel.deepspeed.nvme_path", key),
        reason=f"{stated(case, key)}: needs parallel.deepspeed.nvme_path, a folder on a disk local to each host",
        mend_by=(key,) if len(on_nvme) == 1 else (),
        choices={key: ["cpu"]},
    )


RULES: tuple[Rule, ...] = (
    _degrees_make_up_the_world,
    _divides("tp", "num_heads"),
    _kv_heads_are_cut_or_copied,
    _divides("tp", "d_ff"),
    _divides("tp", "shared_d_ff"),
    _divides("tp", "vocab_size", mend_demand=True),
    _rows_are_cut,
    _heads_are_exchanged,
    _has_experts("ep"),
    _has_experts("expert_tp"),
    _divides("ep", "num_experts"),
    _expert_is_cut,
    _experts_fold,
    _schedule_has_its_stages,
    _stages_have_layers,
    _split_is_of_all_layers,
    _batch_is_shared,
    _pipeline_is_fed,
    *map(_deepspeed_is_alone, ("pp", "dp_replicate", "tp", "ep", "expert_tp")),
)
"""What depends on the degrees."""

SETTING_RULES: tuple[Rule, ...] = (
    _is_for_fsdp2("cpu_offload", False),
    _is_for_fsdp2("reshard_after_forward", True),
    _deepspeed_offload("offload_optimizer"),
    _deepspeed_offload("offload_parameters"),
    _nvme_has_a_folder,
    _deepspeed_steps_adamw,
    _deepspeed_keeps_fp32,
    _overlap_is_compiled_for_cuda,
)
"""What no degree can cure."""
