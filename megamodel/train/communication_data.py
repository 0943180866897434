"""Formulas of what the step itself, data parallelism and Muon send.

Symbols: M micro batches of a rank in a step; n elements of a parameter on this rank before FSDP2, d of them along the dim
that FSDP2 shards, N the ranks over which it does (dp_shard * cp; for experts edp_shard); w bytes of an element as gathered,
r as summed; U units: blocks, stacks of experts, and what is left; L MoE layers, E experts; R = dp_replicate.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from megamodel.train.communication_facts import (
    DTYPE_BYTES,
    DTYPE_NAMES,
    Expected,
    ParameterShare,
    PartShare,
    Place,
    RunShape,
    expect,
)
from megamodel.train.muon import assign_owners
from megamodel.train.optimizer import _UNDECAYED
from megamodel.train.sharding_plan import has_style
from parallel.pipeline import SPLIT_BACKWARD_IS_SOUND
from parallel.stages import SPLIT_BACKWARD_SCHEDULES

_DENSE = ("dp_replicate", "dp_shard", "cp")
_EXPERT = ("dp_replicate", "edp_shard")
# DDP's own: the first bucket is small, so that communication begins early.
_DDP_BUCKETS = (2**20, 25 * 2**20)
# As parallel.gradients cuts them, in elements.
_SUM_BUCKET = 2**26
# As Muon does.
_MUON_BUCKET = 2**28


def step_terms(shape: RunShape, parts: Sequence[PartShare]) -> Iterator[Expected]:
    """The numbers about a step that every rank needs: three all-reduces over the world."""
    if shape.layout.world_size == 1:
        return
    moe = shape.model.moe
    routers = shape.model.num_moe_layers * (1 + moe.num_experts) if moe is not None else 0
    yield expect(
        "world", "all_reduce", "int64", count=1, elements=2, purpose="numbers of tokens", formula="2 * 8"
    )  # fmt: skip
    yield expect(
        "world", "all_reduce", "float64", count=1, elements=4 + routers,
        purpose="losses, the wish to stop, the bubble, and routers' statistics", formula="(4 + MoE layers * (1 + E)) * 8",
    )  # fmt: skip
    # Where every rank holds every gradient whole, each knows the norm by itself.
    if shape.layout.pp > 1 or _is_spread(shape, parts):
        yield expect("world", "all_reduce", "float64", count=1, elements=1, purpose="gradient norm", formula="8")


def _is_spread(shape: RunShape, parts: Sequence[PartShare]) -> bool:
    """Whether some rank lacks a part of some parameter."""
    shards = shape.axis_size("dp_shard", "cp") if fsdp_is_at_work(shape, parts) else 1
    return shards > 1 or any(p.shape != p.whole_shape for part in parts for p in part.parameters)


def engine_terms(shape: RunShape, parts: Sequence[PartShare], place: Place) -> Iterator[Expected]:
    """The data engine, and the sums over ranks that it leaves to be made after the last backward."""
    if fsdp_is_at_work(shape, parts):
        for part in parts:
            for unit in _units(shape, part):
                yield from _unit_terms(shape, part, unit)
    elif _is_ddp(shape):
        parameters = [p for part in parts for p in part.parameters]
        reduce = DTYPE_NAMES[shape.parallel.reduce_dtype]
        yield expect(
            "_".join(_DENSE), "all_reduce", reduce, count=len(_ddp_buckets(parameters)),
            elements=sum(p.numel for p in parameters), purpose="gradients, by DDP, in buckets", formula="sum(n) * r",
        )  # fmt: skip
        yield expect(
            "_".join(_DENSE), "all_reduce", "int32", count=1, elements=len(parameters),
            purpose="which parameters were used, by DDP", formula="parameters * 4",
        )  # fmt: skip
    yield from _left_over(shape, parts, place)


def fsdp_is_at_work(shape: RunShape, parts: Sequence[PartShare]) -> bool:
    """Whether FSDP2 is at work: some parameter is held by more than one rank of its data axes."""
    experts = any(p.is_expert for part in parts for p in part.parameters)
    return shape.parallel.data_engine == "fsdp2" and (
        shape.axis_size(*_DENSE) > 1 or (experts and shape.axis_size("edp_shard") > 1)
    )


def _is_ddp(shape: RunShape) -> bool:
    layout = shape.layout
    return layout.world_size > 1 and layout.pp == layout.tp == layout.ep == layout.expert_tp == 1


def _ddp_buckets(parameters: Sequence[ParameterShare]) -> list[int]:
    """Bytes of each bucket: of one type, in the order of registration, closed as soon as it reaches its limit."""
    by_dtype: dict[str, list[int]] = {}
    for parameter in parameters:
        buckets = by_dtype.setdefault(parameter.dtype, [0])
        if buckets[-1] >= _DDP_BUCKETS[min(len(buckets), len(_DDP_BUCKETS)) - 1]:
            buckets.append(0)
        buckets[-1] += parameter.numel * DTYPE_BYTES[parameter.dtype]
    return [size for buckets in by_dtype.values() for size in buckets]


@dataclass(frozen=True, kw_only=True)
class _Unit:
    """Parameters that FSDP2 gathers in one piece."""

    what: str
    grid: tuple[str, ...]
    """The data axes: dp_replicate, then those that shard."""
    parameters: tuple[ParameterShare, ...]


def _units(shape: RunShape, part: PartShare) -> Iterator[_Unit]:
    sharded = [p for p in part.parameters if _is_sharded(shape, p)]
    experts = [p for p in sharded if p.is_expert] if _own_grid(shape) else []
    for names, what, grid, members in (
        (_module_names(experts, 4), "experts", _EXPERT, experts),
        ([f"layers.{layer}" for layer in part.layers], "block", _DENSE, [p for p in sharded if p not in experts]),
    ):
        for name in names:
            yield _Unit(
                what=what, grid=grid, parameters=tuple(p for p in members if p.name.startswith(f"{name}."))
            )  # fmt: skip
    rest = tuple(p for p in sharded if not p.name.startswith("layers."))
    if rest:
        yield _Unit(what="embedding, head", grid=_DENSE, parameters=rest)


def _module_names(parameters: Sequence[ParameterShare], depth: int) -> list[str]:
    return list(dict.fromkeys(".".join(p.name.split(".")[:depth]) for p in parameters))


def _own_grid(shape: RunShape) -> bool:
    return shape.axis_size("ep", "expert_tp", "tp") > 1


def _is_sharded(shape: RunShape, parameter: ParameterShare) -> bool:
    in_two_types = "bf16" in (shape.train.precision, shape.parallel.param_dtype)
    if in_two_types and has_style(parameter.name.rpartition(".")[0], "full_precision"):
        return False
    if parameter.is_expert and _own_grid(shape):
        return shape.axis_size(*_EXPERT) > 1 or shape.parallel.cpu_offload
    return True


def _unit_terms(shape: RunShape, part: PartShare, unit: _Unit) -> Iterator[Expected]:
    """Gathered before its forward, and again before its backward if freed in between; reduced once a step."""
    gathers = _gathers(shape, part)
    shards = shape.axis_size(*unit.grid[1:])
    axis = "_".join(unit.grid[1:])
    elements = sum(_padded(p, shards) for p in unit.parameters)
    reduced = DTYPE_NAMES[shape.parallel.reduce_dtype]
    # Parameters that are kept in bfloat16 are gathered as they are.
    gathered = shape.activations if shape.parallel.param_dtype == "fp32" else DTYPE_NAMES[shape.parallel.param_dtype]
    if shards > 1:
        yield expect(
            axis, "all_gather", gathered, count=gathers, elements=gathers * elements,
            purpose=f"parameters of each {unit.what}", formula=f"{_gathers_formula(shape)} * sum(N * ceil(d / N) * n / d) * w",
        )  # fmt: skip
        yield expect(
            axis, "reduce_scatter", reduced, count=1, elements=elements,
            purpose=f"gradients of each {unit.what}", formula="sum(N * ceil(d / N) * n / d) * r",
        )  # fmt: skip
    if shape.layout.dp_replicate > 1:
        yield expect(
            "dp_replicate", "all_reduce", reduced, count=1, elements=elements // shards,
            purpose=f"shards of gradients of each {unit.what}", formula="sum(ceil(d / N) * n / d) * r",
        )  # fmt: skip


def _gathers(shape: RunShape, part: PartShare) -> int:
    """How often the parameters of a unit are gathered in a step."""
    micro_batches, pp = shape.micro_batches, shape.layout.pp
    if not shape.parallel.reshard_after_forward:
        # A stage of a pipeline keeps what it has until the end of the step.
        return 1 if pp > 1 else micro_batches
    return 2 * micro_batches + (_split_backwards(shape, part.stage) if pp > 1 and part.stage > 0 else 0)


def _gathers_formula(shape: RunShape) -> str:
    if not shape.parallel.reshard_after_forward:
        return "1" if shape.layout.pp > 1 else "M"
    splits = shape.layout.pp > 1 and shape.parallel.pipeline_schedule in SPLIT_BACKWARD_SCHEDULES
    return "(2 * M + split backwards of stages after the first)" if splits else "2 * M"


def _split_backwards(shape: RunShape, stage: int) -> int:
    """Micro batches whose weights' gradients a stage computes apart from those of its input, and gathers for again."""
    schedule, pp = shape.parallel.pipeline_schedule, shape.layout.pp
    memory = shape.train.activation_memory.mode
    if schedule not in SPLIT_BACKWARD_SCHEDULES or not SPLIT_BACKWARD_IS_SOUND or memory != "none":
        return 0
    if schedule != "dualpipev":
        return shape.micro_batches
    # Only while the pipeline fills and empties.
    rank = stage if stage < pp else 2 * pp - 1 - stage
    return pp - rank + rank // 2 if stage < pp else pp - rank - 1 + (rank + 1) // 2


def _padded(parameter: ParameterShare, shards: int) -> int:
    """Elements of all shards together: each is as large as the largest."""
    dim = _sharded_dim(parameter, shards)
    length = parameter.shape[dim]
    return shards * math.ceil(length / shards) * (parameter.numel // length)


def _sharded_dim(parameter: ParameterShare, shards: int) -> int:
    """Stacks of few experts are sharded inside the expert, where that goes evenly."""
    shape = parameter.shape
    return 1 if parameter.is_expert and shape[0] % shards and shape[1] % shards == 0 else 0


def _left_over(shape: RunShape, parts: Sequence[PartShare], place: Place) -> Iterator[Expected]:
    """Gradients that are partial after the last backward, summed in few large pieces."""
    by_axis: dict[str, list[int]] = {}
    # A tied embedding in two stages of one rank is summed once: the copies have been added up.
    for parameter in {p.name: p for part in parts for p in part.parameters}.values():
        for axis in _axes_to_sum(shape, parts, parameter):
            by_axis.setdefault(axis, []).append(_own_elements(shape, parts, parameter, place))
    for axis, numels in by_axis.items():
        yield expect(
            axis, "all_reduce", DTYPE_NAMES[shape.parallel.reduce_dtype], count=len(_buckets(numels, _SUM_BUCKET)),
            elements=sum(numels), purpose="gradients that no engine has summed", formula="sum(n) * r",
        )  # fmt: skip


def _own_elements(shape: RunShape, parts: Sequence[PartShare], parameter: ParameterShare, place: Place) -> int:
    """Elements of a gradient on this rank after FSDP2, whose last shards may be smaller than the rest, or empty."""
    if not (fsdp_is_at_work(shape, parts) and _is_sharded(shape, parameter)):
        return parameter.numel
    expert = parameter.is_expert and _own_grid(shape)
    shards = shape.axis_size(*(_EXPERT if expert else _DENSE)[1:])
    length = parameter.shape[_sharded_dim(parameter, shards)]
    share = math.ceil(length / shards)
    before = share * (place.expert_shard if expert else place.shard)
    return max(0, min(share, length - before)) * (parameter.numel // length)


def _axes_to_sum(shape: RunShape, parts: Sequence[PartShare], parameter: ParameterShare) -> list[str]:
    names = list(parameter.sum_axes)
    sharded = fsdp_is_at_work(shape, parts)
    if (sharded and _is_sharded(shape, parameter)) or (not sharded and _is_ddp(shape)):
        return names
    data = _EXPERT if parameter.is_expert else _DENSE
    if "tp" in names:  # data and tp in one sum
        names.remove("tp")
        data = (*data, "tp")
    return ["_".join(data), *names] if shape.axis_size(*data) > 1 else names


def _buckets(sizes: Sequence[int], limit: int) -> list[list[int]]:
    """Indices, cut where a bucket would outgrow its limit."""
    buckets: list[list[int]] = [[]]
    for index, size in enumerate(sizes):
        if buckets[-1] and sum(sizes[i] for i in buckets[-1]) + size > limit:
            buckets.append([])
        buckets[-1].append(index)
    return buckets


def muon_terms(shape: RunShape, parts: Sequence[PartShare]) -> Iterator[Expected]:
    """Muon: whole matrices are dealt out over the ranks that hold them, matrices in parts are gathered."""
    if shape.train.optimizer.name != "muon":
        return
    groups: dict[object, list[ParameterShare]] = {}
    sharded = fsdp_is_at_work(shape, parts)
    for parameter in (p for part in parts for p in part.parameters if not p.name.endswith(_UNDECAYED)):
        on_grid = sharded and _is_sharded(shape, parameter)
        own_grid = parameter.is_expert and _own_grid(shape)
        groups.setdefault((own_grid if on_grid else None), []).append(parameter)
    for grid, parameters in groups.items():
        if grid is not None:
            for parameter in parameters:
                yield from _gathered_by_muon(shape, parameter, _EXPERT if grid else _DENSE)
            continue
        for parameter in parameters:
            if parameter.cuts:
                yield from _gathered_by_muon(shape, parameter, ())
        yield from _dealt_out(shape, parameters)


def _dealt_out(shape: RunShape, parameters: Sequence[ParameterShare]) -> Iterator[Expected]:
    """One all-gather a bucket, of as much from each rank as the most burdened one has."""
    ranks = shape.axis_size(*_DENSE, "tp")
    count, elements = 0, 0
    for bucket in _buckets([p.numel for p in parameters], _MUON_BUCKET):
        whole = [parameters[index] for index in bucket if not parameters[index].cuts]
        if ranks == 1 or len(whole) < ranks:
            continue
        owners = assign_owners([float(p.numel * min(p.shape[-2:])) for p in whole], ranks)
        count += 1
        elements += ranks * max(
            sum(p.numel for p, owner in zip(whole, owners, strict=True) if owner == rank) for rank in range(ranks)
        )
    if count:
        yield expect(
            "_".join((*_DENSE, "tp")), "all_gather", shape.activations, count=count, elements=elements,
            purpose="Muon's directions, from their owners", formula="ranks * max over ranks of sum(own n) * b",
        )  # fmt: skip


def _gathered_by_muon(shape: RunShape, parameter: ParameterShare, grid: tuple[str, ...]) -> Iterator[Expected]:
    """A matrix needs all of its rows and columns; a stack of whole matrices needs nothing from others."""
    stack_dims = len(parameter.shape) - 2
    cuts = [cut for cut in parameter.cuts if cut.dim >= stack_dims]
    shards = shape.axis_size(*grid[1:]) if grid else 1
    dim = _sharded_dim(parameter, shards) if grid == _EXPERT else 0
    if shards > 1 and (cuts or dim >= stack_dims):
        yield expect(
            "_".join(grid[1:]), "all_gather", parameter.dtype, count=1,
            elements=_padded(parameter, shards),
            purpose="Muon's momentum, from FSDP2's shards", formula="sum(N * ceil(d / N) * n / d) * 4",
        )  # fmt: skip
    numel = parameter.numel
    for cut in cuts:
        yield expect(
            cut.axis, "all_gather", parameter.dtype, count=1, elements=numel * cut.size,
            purpose="Muon's momentum, from the parts of each matrix", formula="sum(n * ranks) * 4",
        )  # fmt: skip
        numel *= cut.parts
