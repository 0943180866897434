"""From a configuration to this rank's part of a decoder: meta, sharding plan, compilation, engine, weights."""

from __future__ import annotations

import os
import shutil
import sysconfig
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule

from megamodel.errors import RefusedError
from megamodel.model.config import ModelConfig
from megamodel.model.decoder import Decoder, LayerRange, Seams
from megamodel.model.explicit_attention import ExplicitScores
from megamodel.model.initialization import initial_part
from megamodel.model.loss import ChunkedTokenLoss, chunk_terms
from megamodel.model.seams import InOrder, LocalExchange, ScaledDotProduct, WholeSequences
from megamodel.train.activation_memory import apply_activation_memory
from megamodel.train.config import TrainConfig
from megamodel.train.layout import layers_of_stages, layout_demands, splits_backward
from megamodel.train.passes import Passes, PipelinePasses, WholeModelPasses
from megamodel.train.sharding_plan import is_expert, is_full_precision, is_gathered_unit, modules_to_cut
from parallel.config import ParallelConfig, PipelineSchedule
from parallel.context import context_attention
from parallel.data_parallel import DataParallel, Units, wrap
from parallel.experts import ExpertExchange, SequenceShards, SideStream
from parallel.layout import micro_batch_size
from parallel.mesh import Axis, Mesh
from parallel.placement import Placement, piece_of
from parallel.stages import SPLIT_BACKWARD_SCHEDULES, V_SCHEDULES, stages_of_rank, stages_per_rank
from parallel.tensor_parallel import VocabularyLoss, cut_modules

_EXPLICIT_UP_TO = 256
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True, kw_only=True)
class BuiltModel:
    """This rank's part of a decoder, ready to train. `notice` is what the user should know of how it was built, if
    anything."""

    mesh: Mesh
    data_parallel: DataParallel
    passes: Passes
    micro_batch_size: int
    compiled: bool
    notice: str | None

    @property
    def parts(self) -> tuple[Decoder, ...]:
        """The ranges of layers on this rank; one, of all layers, without a pipeline."""
        return tuple(part for part in self.data_parallel.parts if isinstance(part, Decoder))

    @property
    def decoder(self) -> Decoder:
        """The whole decoder of a rank that has it."""
        (decoder,) = self.parts
        return decoder

    def after_update(self, counts_LE: torch.Tensor | None) -> None:
        """What follows an optimizer step. counts_LE: see `TrainStep`."""
        self.data_parallel.after_update()
        if counts_LE is not None:
            for part in self.parts:
                part.update_balance_bias(counts_LE)


def _without_effect(
    train: TrainConfig, parallel: ParallelConfig, parts: Sequence[nn.Module], *, compiled: bool
) -> Iterator[str]:
    """What was asked for and does nothing here."""
    schedule = parallel.pipeline_schedule
    if parallel.pp > 1 and schedule in SPLIT_BACKWARD_SCHEDULES and not splits_backward(train, compiled=compiled):
        yield (
            f'parallel.pipeline_schedule = "{schedule}" fills idle time with the gradients of weights, which compiled blocks '
            "and train.activation_memory do not leave apart: ranks wait as under interleaved_1f1b"
        )
    if parallel.cpu_offload and not any(isinstance(part, FSDPModule) for part in parts):
        yield "parallel.cpu_offload does nothing: no rank shares its part of the model with another"
    if parallel.data_engine == "deepspeed" and not torch.distributed.is_initialized():
        yield "DeepSpeed is left out, and so is its offload: one process has no rank to share with"


def compute_dtype(precision: str) -> torch.dtype:
    """The type of activations for `train.precision`."""
    return DTYPES[precision]


def build_model(
    model: ModelConfig, train: TrainConfig, parallel: ParallelConfig, *, mesh: Mesh, seed: int | None, seq_len: int
) -> BuiltModel:
    """A decoder with initial weights that depend on the seed alone, spread over the ranks of `mesh`. A collective.

    Without a seed the weights are left undefined: a checkpoint fills them. `seq_len` is the length of training rows in
    tokens.
    """
    device = mesh.world.device
    notice = _missing_compiler(train.compile, device)
    compiled = train.compile != "off" and notice is None
    if parallel.async_tp and mesh.size("tp") > 1:
        if not compiled or device.type != "cuda":
            raise RefusedError(
                "parallel.async_tp = true: needs CUDA and torch.compile, and "
                + ("the compiler is off" if device.type == "cuda" else f"this run is on the {device.type}")
                + "; set parallel.async_tp = false"
            )
        _overlap_tensor_parallelism(mesh.axis("tp"))
    parts, placements = plan_parts(model, train, parallel, mesh=mesh, seq_len=seq_len, compiled=compiled)
    sharded = parallel.data_engine == "fsdp2"
    if not sharded:
        materialize(parts, device, model, seed, placements)
    data_parallel = spread(parts, placements, train, parallel, mesh=mesh)
    if sharded:
        materialize(parts, device, model, seed, placements, cpu_offload=parallel.cpu_offload)
    micro = micro_batch_size(parallel, mesh.layout, layout_demands(model, train, seq_len=seq_len))
    return BuiltModel(
        mesh=mesh,
        data_parallel=data_parallel,
        passes=_passes(data_parallel, train, parallel, micro=micro, seq_len=seq_len, compiled=compiled),
        micro_batch_size=micro,
        compiled=compiled,
        notice="; ".join([*([notice] if notice else []), *_without_effect(train, parallel, parts, compiled=compiled)])
        or None,
    )


def plan_parts(
    model: ModelConfig, train: TrainConfig, parallel: ParallelConfig, *, mesh: Mesh, seq_len: int, compiled: bool
) -> tuple[list[Decoder], dict[str, Placement]]:
    """This rank's stages on the meta device, cut as the plan says and compiled, and where each parameter lies."""
    seams = _seams(train, parallel, seq_len, mesh=mesh, compiled=compiled)
    parts: list[Decoder] = []
    placements: dict[str, Placement] = {}
    for layers in layers_of_rank(model, parallel, seq_len, mesh.coordinate("pp")):
        with torch.device("meta"):
            part = Decoder(model, seams, layers)
        part.compute_dtype = compute_dtype(train.precision)
        placements |= cut_modules(part, modules_to_cut(part, model), mesh)
        parts.append(part)
    _tie_across_stages(placements, model, mesh, parallel.pipeline_schedule)
    for part in parts:
        if parallel.param_dtype == "bf16":
            _keep_in_bf16(part)
        whole_experts = mesh.size("ep", "expert_tp", "tp") == 1
        compile_part = partial(compile_blocks, whole_experts=whole_experts) if compiled else None
        apply_activation_memory(part, train.activation_memory, compile_blocks=compile_part)
    return parts, placements


def layers_of_rank(model: ModelConfig, parallel: ParallelConfig, seq_len: int, pp_rank: int) -> list[LayerRange]:
    """The ranges of layers that a rank of the pipeline holds, in the order of the stages."""
    if parallel.pp == 1:
        return [LayerRange(first=0, end=model.num_layers)]
    split = layers_of_stages(model, parallel, seq_len=seq_len)
    ends = list(accumulate(split))
    stages = stages_of_rank(pp_rank, parallel.pp, len(split), parallel.pipeline_schedule)
    return [LayerRange(first=ends[stage] - split[stage], end=ends[stage]) for stage in stages]


def spread(
    parts: Sequence[Decoder],
    placements: Mapping[str, Placement],
    train: TrainConfig,
    parallel: ParallelConfig,
    *,
    mesh: Mesh,
) -> DataParallel:
    """Hands the parts to the data engine. A collective."""
    casts = parallel.data_engine == "fsdp2" and train.precision != "fp32" and parallel.param_dtype == "fp32"
    return wrap(
        parts,
        mesh=mesh,
        placements=placements,
        engine=parallel.data_engine,
        units=Units(is_unit=is_gathered_unit, is_expert=is_expert, is_full_precision=is_full_precision),
        param_dtype=compute_dtype(train.precision) if casts else None,
        reduce_dtype=DTYPES[parallel.reduce_dtype],
        reshard_after_forward=parallel.reshard_after_forward,
        cpu_offload=parallel.cpu_offload,
    )


@torch.no_grad()
def materialize(
    parts: Sequence[nn.Module],
    device: torch.device,
    config: ModelConfig,
    seed: int | None,
    placements: Mapping[str, Placement],
    *,
    cpu_offload: bool = False,
) -> None:
    """Gives parts on meta memory, and with a seed initial weights: to each tensor its box of the same whole."""
    for part in parts:
        part.to_empty(device=torch.device("cpu") if cpu_offload else device)
        if cpu_offload and device.type != "cpu":
            _move_unsharded(part, device)
        for name, tensor in [*part.named_parameters(), *part.named_buffers()] if seed is not None else []:
            piece = piece_of(tensor, placements.get(name))
            if piece.local.numel():
                piece.local.copy_(
                    initial_part(name, piece.shape, piece.offsets, piece.local.shape, config, seed)  # type: ignore[arg-type]
                )


def find_compiler(device_type: str) -> str | None:
    """What torch.compile would build kernels with on this kind of device, or None where that is missing."""
    if device_type == "cuda":
        try:
            import triton
        except ImportError:
            return None
        return f"triton {triton.__version__}"
    if not (Path(sysconfig.get_path("include")) / "Python.h").is_file():
        return None
    return next((found for name in (os.environ.get("CXX", "g++"), "clang++") if (found := shutil.which(name))), None)


def compile_blocks(decoder: Decoder, *, whole_experts: bool = True) -> None:
    """Compiles each block's forward in place: names stay, and blocks of a kind share one compilation.

    Without `whole_experts` the routed experts stay out of it: other ranks decide how many rows arrive, so every step would
    have new shapes, and FSDP2 has hooks of its own there.
    """
    for block in decoder.layers.values():
        moe = getattr(block, "moe", None)
        if moe is not None and not whole_experts:
            moe.routed = torch.compiler.disable(moe.routed)
        # The forward, not the module: FSDP2's hooks around it must stay outside the compiled region.
        block.forward = torch.compile(block.forward, dynamic=False)


def _overlap_tensor_parallelism(tp: Axis) -> None:
    """The compiler of CUDA code then cuts an all-gather and the product behind it, or a product and the reduce-scatter
    behind it, into pieces that overlap. It does so for the whole process."""
    import torch._inductor.config as inductor
    from torch.distributed._symmetric_memory import enable_symm_mem_for_group

    assert tp.group is not None
    inductor._micro_pipeline_tp = True
    with warnings.catch_warnings():  # torch 2.11 needs it, and 2.13 says that it does not
        warnings.simplefilter("ignore")
        enable_symm_mem_for_group(tp.group.group_name)


def _tie_across_stages(
    placements: dict[str, Placement], model: ModelConfig, mesh: Mesh, schedule: PipelineSchedule
) -> None:
    """A tied embedding is in the first and the last stage; both copies get the sum of both gradients."""
    if mesh.layout.pp == 1 or not model.tie_embeddings or schedule in V_SCHEDULES:
        return  # one rank has both: see DataParallel.after_update
    ends = mesh.pipeline_ends()
    placement = placements.get("embedding.weight")
    if placement is not None:
        placements["embedding.weight"] = replace(placement, sum_axes=(*placement.sum_axes, ends), num_stages=2)


def _keep_in_bf16(part: Decoder) -> None:
    """On meta: parameters are bfloat16 from the start, but for those that always compute in full precision."""
    for name, module in part.named_modules():
        if not is_full_precision(name, module):
            for parameter in module.parameters(recurse=False):
                parameter.data = parameter.data.bfloat16()


def _move_unsharded(part: nn.Module, device: torch.device) -> None:
    """FSDP2 moves what it shards between host and device; everything else must be on the device."""
    for module in part.modules():
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, buffer.to(device))
        for parameter in module.parameters(recurse=False):
            if not hasattr(parameter, "device_mesh"):
                parameter.data = parameter.data.to(device)


def _missing_compiler(choice: str, device: torch.device) -> str | None:
    """What to tell the user when compilation is wanted and cannot be had. Raises `RefusedError` when it must be."""
    if choice == "off" or find_compiler(device.type) is not None:
        return None
    missing = (
        "Triton" if device.type == "cuda" else "a C++ compiler with Python.h (Debian: apt-get install g++ python3-dev)"
    )
    if choice == "on":
        raise RefusedError(f'train.compile = "on" needs {missing}; install it, or set train.compile = "off"')
    return f"torch.compile is off: {missing} is missing; training is slower without"


def _seams(train: TrainConfig, parallel: ParallelConfig, seq_len: int, *, mesh: Mesh, compiled: bool) -> Seams:
    """What plugs into the decoder: local parts, or parallel ones where an axis is split. All compute the same."""
    device = mesh.world.device
    explicit = train.attention == "explicit" or (
        # Measured by benchmarks/attention.py: compiled, on CPUs, explicit scores win for short rows.
        train.attention == "auto" and compiled and device.type == "cpu" and seq_len <= _EXPLICIT_UP_TO
    )
    core = ExplicitScores() if explicit else ScaledDotProduct()
    terms: Any = torch.compile(chunk_terms, dynamic=False) if compiled else chunk_terms
    if mesh.size("tp") > 1:
        terms = VocabularyLoss(mesh.axis("tp"))
    spread_experts = mesh.size("ep", "expert_tp") > 1
    sequence = mesh.axis("cp", "tp")
    return Seams(
        attention_core=context_attention(parallel.context_method, mesh.axis("cp"), core),
        token_exchange=ExpertExchange(mesh.axis("ep"), mesh.axis("expert_tp"), mesh.axis("ep", "expert_tp"))
        if spread_experts
        else LocalExchange(),
        sequence_share=SequenceShards(sequence) if sequence.is_split else WholeSequences(),
        # With tp the shared expert has collectives of its own, and two groups on two streams have no order among ranks.
        beside_routed_experts=SideStream(device)
        if spread_experts and mesh.size("tp") == 1 and device.type == "cuda"
        else InOrder(),
        token_loss=ChunkedTokenLoss(terms=terms),
    )


def _passes(
    data_parallel: DataParallel,
    train: TrainConfig,
    parallel: ParallelConfig,
    *,
    micro: int,
    seq_len: int,
    compiled: bool,
) -> Passes:
    if parallel.pp == 1:
        return WholeModelPasses(data_parallel)
    mesh = data_parallel.mesh
    num_stages = parallel.pp * stages_per_rank(parallel.pipeline_schedule, parallel.pipeline_stages_per_rank)
    return PipelinePasses(
        data_parallel,
        stages=stages_of_rank(mesh.coordinate("pp"), parallel.pp, num_stages, parallel.pipeline_schedule),
        num_stages=num_stages,
        schedule=parallel.pipeline_schedule,
        num_micro_batches=train.global_batch_size // (mesh.layout.num_data_ranks * micro),
        micro_batch_size=micro,
        seq_len=seq_len,
        split_backward=splits_backward(train, compiled=compiled),
        reshard=parallel.reshard_after_forward,
    )
