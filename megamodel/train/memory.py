"""How much memory a rank needs, by formula: for what stays, and for the fullest moment of a step.

Rajbhandari et al. 2020 (ZeRO), section 3, for what stays; Korthikanti et al. 2022, section 4, for activations. Symbols as in
`activation_bytes`, and: p bytes of a number in a parameter as it is kept; d ranks that shard it; m micro batches in flight.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate

from megamodel.train.activation_bytes import FLOAT32, ActivationSetting, kept_by_block, saved_by_autograd
from megamodel.train.activation_memory import is_treated
from megamodel.train.communication_facts import RunShape
from megamodel.train.layout import layers_of_stages
from megamodel.train.parameter_counts import UnitCount, block_count, root_count
from parallel.stages import V_SCHEDULES

_BYTES = {"fp32": 4, "bf16": 2}
# As the token loss cuts its rows, and the sums of gradients their buckets.
_CHUNK_ROWS, _CHUNK_LOGITS, _BUCKET_ELEMENTS = 1024, 2**25, 2**26


@dataclass(frozen=True, kw_only=True)
class MemoryPrediction:
    """Bytes of one rank's device."""

    parameters: int
    """p times this rank's numbers, sharded ones divided by d."""
    gradients: int
    """As `parameters` when the step updates; in float32 and unsharded where FSDP2 accumulates micro batches."""
    optimizer: int
    """AdamW: 8 a number; Muon: 4 a number of a matrix in a block."""
    activations: int
    """What all blocks keep for the backward, times m, and their inputs between pipeline stages."""
    working: int
    """The most that a moment needs beside these: gathered parameters, the loss of a chunk, a block's backward, copies of
    gradients that are being sent."""
    peak: int
    """All of it at the fullest moment; less than the sum, since not everything is there at once."""
    activations_by_tensor: dict[str, int]
    """`activations` in parts."""


@dataclass(frozen=True, kw_only=True)
class ActivationReport:
    """What one activation mode keeps in this rank's blocks, and what it saves against keeping everything."""

    mode: str
    kept: int
    saved: int


@dataclass(frozen=True, kw_only=True)
class _Moment:
    """Bytes of one moment of a step, beside parameters and optimizer."""

    activations: int = 0
    gradients: int = 0
    working: int = 0

    @property
    def total(self) -> int:
        return self.activations + self.gradients + self.working


@dataclass(frozen=True, kw_only=True)
class _Stage:
    layers: range
    is_first: bool
    is_last: bool
    in_flight: float


def predict_memory(shape: RunShape, *, pp_rank: int = 0, fused_kernels: bool = False) -> MemoryPrediction:
    """For a rank at `pp_rank` of the pipeline; all ranks beside it need the same, but for the load of its experts, which
    is taken to be even. Without torch.compile, which needs less. `fused_kernels`: as on CUDA, see `ActivationSetting`."""
    return _Prediction(shape, pp_rank, fused_kernels).result()


def report_activations(shape: RunShape, *, pp_rank: int = 0, fused_kernels: bool = False) -> ActivationReport:
    """Predicted bytes of the run's activation mode, for one micro batch through each of this rank's blocks."""
    prediction = _Prediction(shape, pp_rank, fused_kernels)
    layers = [layer for stage in prediction.stages for layer in stage.layers]
    kept = sum(prediction.kept(layer) for layer in layers)
    whole = sum(prediction.whole(layer) for layer in layers)
    return ActivationReport(mode=shape.train.activation_memory.mode, kept=kept, saved=whole - kept)


def activation_setting(shape: RunShape, *, fused_kernels: bool = False) -> ActivationSetting:
    """What decides the memory of the run's blocks."""
    return ActivationSetting(
        model=shape.model,
        layout=shape.layout,
        micro_batch_size=shape.rows,
        seq_len=shape.seq_len,
        activation_bytes=_BYTES[shape.train.precision],
        casts_weights=shape.train.precision == "bf16"
        and shape.parallel.param_dtype == "fp32"
        and not is_sharded(shape),
        attention="explicit" if shape.train.attention == "explicit" else "sdpa",
        context_method=shape.parallel.context_method,
        document_mask=shape.document_mask,
        fused_kernels=fused_kernels,
    )


def is_sharded(shape: RunShape) -> bool:
    """Whether parameters are spread over the data ranks."""
    engine, ranks = shape.parallel.data_engine, shape.axis_size("dp_replicate", "dp_shard", "cp")
    own_grid = shape.model.moe is not None and shape.axis_size("edp_shard") > 1
    return (engine == "fsdp2" and (ranks > 1 or own_grid)) or (
        engine == "deepspeed" and shape.parallel.deepspeed.zero_stage == 3
    )


class _Prediction:
    def __init__(self, shape: RunShape, pp_rank: int, fused_kernels: bool) -> None:
        self.shape = shape
        self.setting = activation_setting(shape, fused_kernels=fused_kernels)
        self.memory = shape.train.activation_memory
        ends = list(accumulate(layers_of_stages(shape.model, shape.parallel, seq_len=shape.seq_len)))
        starts = [0, *ends[:-1]]
        flight = in_flight(shape, pp_rank)
        self.stages = [
            _Stage(
                layers=range(starts[stage], ends[stage]),
                is_first=stage == 0,
                is_last=stage == len(ends) - 1,
                in_flight=flight,
            )
            for stage in shape.stages_of(pp_rank)
        ]
        self.sharded = is_sharded(shape)
        self.p = _BYTES[shape.parallel.param_dtype]
        self.reduce = _BYTES[shape.parallel.reduce_dtype]
        # FSDP2 gathers, and makes gradients, in the activations' type.
        self.gathered_bytes = min(self.p, self.setting.activation_bytes) if self.sharded else self.p

    def kept(self, layer: int) -> int:
        return sum(kept_by_block(self.setting, layer, self.memory).values())

    def whole(self, layer: int) -> int:
        return sum(kept.num_bytes for kept in saved_by_autograd(self.setting, layer))

    def result(self) -> MemoryPrediction:
        blocks = {layer: block_count(self.shape, layer) for stage in self.stages for layer in stage.layers}
        roots = [root_count(self.shape, is_first=stage.is_first, is_last=stage.is_last) for stage in self.stages]
        units = [*blocks.values(), *roots]
        parameters = sum(self._kept_numbers(unit) for unit in units) * self.p
        optimizer = sum(self._optimizer_bytes(unit) for unit in units)
        by_tensor = self._activations_by_tensor()
        activations = sum(by_tensor.values())
        gradients = self._all_gradients(units)
        moments = [
            self._at_loss(blocks, roots, activations),
            *self._at_backwards(blocks, roots, activations),
            self._at_reduction(units, gradients),
        ]
        return MemoryPrediction(
            parameters=parameters,
            gradients=gradients,
            optimizer=optimizer,
            activations=activations,
            working=max(moment.working for moment in moments),
            peak=parameters + optimizer + max(moment.total for moment in moments),
            activations_by_tensor=by_tensor,
        )

    # What stays.

    def _kept_numbers(self, unit: UnitCount) -> int:
        return unit.kept if self.sharded else unit.whole

    def _optimizer_bytes(self, unit: UnitCount) -> int:
        muon = self.shape.train.optimizer.name == "muon"
        matrices = unit.kept_matrices if self.sharded else unit.matrices
        others = self._kept_numbers(unit) - matrices
        shards = 1
        engine = self.shape.parallel
        if engine.data_engine == "deepspeed" and engine.deepspeed.zero_stage < 3:
            shards = self.shape.layout.num_data_ranks
        return (others * 2 + matrices * (1 if muon else 2)) * self.p // shards

    def _accumulates(self) -> bool:
        """Whether FSDP2 holds unsharded gradients until the last micro batch."""
        return self.shape.layout.pp > 1 or self.shape.micro_batches > 1

    def _all_gradients(self, units: list[UnitCount]) -> int:
        if not self.sharded:
            return sum(unit.whole for unit in units) * self.p
        if self._accumulates():
            wide = max(self.gathered_bytes, self.reduce)
            return sum(unit.sharded_whole * wide + unit.replicated * FLOAT32 for unit in units)
        return sum(self._kept_numbers(unit) for unit in units) * self.p

    def _gradients_before(self, units: list[UnitCount]) -> int:
        """Gradients that exist when the fullest forward ends: of earlier micro batches, or the buckets of DDP."""
        layout = self.shape.layout
        buckets = (
            self.shape.parallel.data_engine == "ddp"
            and layout.world_size > 1
            and layout.pp == layout.tp == layout.ep == layout.expert_tp == 1
        )
        # A pipeline that has all micro batches in flight is at its fullest before the first backward.
        later = self.shape.micro_batches > max(stage.in_flight for stage in self.stages)
        return self._all_gradients(units) if buckets or later else 0

    def _activations_by_tensor(self) -> dict[str, int]:
        found: dict[str, int] = {}
        for stage in self.stages:
            for layer in stage.layers:
                for name, num_bytes in kept_by_block(self.setting, layer, self.memory).items():
                    found[name] = found.get(name, 0) + round(num_bytes * stage.in_flight)
            if self.shape.layout.pp > 1:
                name = "stage inputs and results"
                found[name] = found.get(name, 0) + round(2 * self._hidden_bytes() * stage.in_flight)
        return found

    def _hidden_bytes(self) -> int:
        """a n D"""
        return self.setting.activation_bytes * self.setting.tokens_between * self.shape.model.d_model

    # Moments of a step; each without parameters and optimizer.

    def _at_loss(self, blocks: dict[int, UnitCount], roots: list[UnitCount], activations: int) -> _Moment:
        """All activations, and for a chunk of C rows over V columns of this rank: its logits (a C V), four float32 tables
        of its terms (in fp32 logits among them; one more where V is cut) and one of booleans, the gradient of the output
        matrix (4 V D) and its cast copy (a V D)."""
        if not self.stages[-1].is_last:
            return _Moment()
        a, tokens, model = self.setting.activation_bytes, self.setting.tokens_inside, self.shape.model
        columns = model.vocab_size // self.shape.layout.tp
        rows = min(_CHUNK_ROWS, max(1, _CHUNK_LOGITS // columns), tokens)
        numbers = rows * columns
        tables = 5 if self.shape.layout.tp > 1 else 4
        terms = numbers * ((4 * FLOAT32 + a if a != FLOAT32 else tables * FLOAT32) + 1)
        product = a * (numbers + columns * model.d_model)
        matrix = FLOAT32 * columns * model.d_model + (a * columns * model.d_model if self._casts_output() else 0)
        hidden = self._final_norm_bytes() + 2 * a * tokens * model.d_model
        return _Moment(
            activations=activations,
            gradients=self._gradients_before([*blocks.values(), *roots]),
            working=matrix + max(terms, product) + hidden + self._gathered(blocks, roots, None),
        )

    def _at_backwards(
        self, blocks: dict[int, UnitCount], roots: list[UnitCount], activations: int
    ) -> Iterator[_Moment]:
        """At the backward of each block: what earlier ones keep, this one's whole activations (recomputed or fetched), what
        its operations need, and the gradients so far; and where FSDP2 sends a block's gradients, at that."""
        gradients = self._gradients_before([*blocks.values(), *roots])
        fresh = gradients == 0
        if fresh:
            gradients = sum(root.head_whole for root in roots) * self.gathered_bytes
        for stage in reversed(self.stages):
            for layer in reversed(stage.layers):
                unit = blocks[layer]
                own = unit.whole * self.gathered_bytes if fresh else 0
                working = self._brought_back(layer, stage) + self._backward_working(layer)
                working += self._gathered(blocks, roots, layer)
                yield _Moment(activations=activations, gradients=gradients + own, working=working)
                activations -= self.kept(layer)
                if self.sharded and not self._accumulates():
                    sent = unit.sharded_whole * (self.gathered_bytes + self.reduce)
                    sent += unit.whole * self.gathered_bytes
                    yield _Moment(activations=activations, gradients=gradients, working=sent)
                    gradients += self._kept_numbers(unit) * self.p
                else:
                    gradients += own

    def _brought_back(self, layer: int, stage: _Stage) -> int:
        """What is recomputed or fetched for a block's backward: all that it saves, in place of what was kept. That is the
        block's input (a part of what is saved, in fp32) or results, of which recomputation takes all but the last one, a g
        D. Offloading fetches the block before as well."""
        if not is_treated(layer, self.memory):
            return 0
        if self.memory.mode == "offload":
            return self.whole(layer) + (self.whole(layer - 1) if layer - 1 in stage.layers else 0)
        setting = self.setting
        left_over = 0 if setting.activation_bytes == FLOAT32 else self._hidden_bytes()
        if self.memory.mode == "selective" and "matmul" in self.memory.save:
            left_over += setting.activation_bytes * setting.tokens_inside * self.shape.model.d_model
        return max(0, self.whole(layer) - self.kept(layer)) + left_over

    def _at_reduction(self, units: list[UnitCount], gradients: int) -> _Moment:
        """After the backward: all gradients; the embedding's, made in one piece (4 V D); the flat copies that are sent."""
        model, layout = self.shape.model, self.shape.layout
        columns = model.vocab_size // layout.tp
        embedding = FLOAT32 * columns * model.d_model if self.stages[0].is_first else 0
        if self.sharded:
            # A pipeline reduces when it is through, unit by unit.
            sent = max(unit.sharded_whole for unit in units) * (self.gathered_bytes + self.reduce)
        elif layout.world_size > 1:
            flat = min(_BUCKET_ELEMENTS, sum(unit.whole for unit in units))
            sent = flat * (FLOAT32 + (self.reduce if self.reduce != FLOAT32 else 0))
        else:
            sent = 0
        return _Moment(gradients=gradients, working=max(embedding, sent))

    def _gathered(self, blocks: dict[int, UnitCount], roots: list[UnitCount], layer: int | None) -> int:
        """Parameters that FSDP2 has gathered: those outside blocks, and one block and the next on its way; or all blocks."""
        if not self.sharded:
            return 0
        numbers = sum(root.sharded_whole for root in roots)
        if not self.shape.parallel.reshard_after_forward:
            numbers += sum(unit.sharded_whole for unit in blocks.values())
        elif layer is not None:
            numbers += blocks[layer].sharded_whole
            numbers += blocks[layer - 1].sharded_whole if layer - 1 in blocks else 0
        return numbers * self.gathered_bytes

    def _backward_working(self, layer: int) -> int:
        """Beside what is kept: gradients of the widest hidden tensors, a (2 g F + 2 g D), or of a norm's float32 steps,
        12 n D; of experts, a (2 R F + 2 R D); and the gradient of the stream, a n D."""
        setting, model = self.setting, self.shape.model
        a, g, n = setting.activation_bytes, setting.tokens_inside, setting.tokens_between
        if model.is_moe_layer(layer):
            assert model.moe is not None
            rows = n * model.moe.top_k * self.shape.layout.expert_tp
            hidden = a * rows * 2 * (model.moe.d_ff // self.shape.layout.expert_tp + model.d_model)
        else:
            hidden = a * g * 2 * (model.d_ff // self.shape.layout.tp + model.d_model)
        return max(hidden, 3 * FLOAT32 * n * model.d_model) + a * n * model.d_model

    def _final_norm_bytes(self) -> int:
        copies = 1 if self.setting.fused_kernels else 2
        return copies * FLOAT32 * self.setting.tokens_between * self.shape.model.d_model

    def _casts_output(self) -> bool:
        return self.gathered_bytes != self.setting.activation_bytes


def in_flight(shape: RunShape, pp_rank: int) -> float:
    """Micro batches whose activations a rank's stages hold at once, mean over its v stages.

    gpipe: all. 1f1b: the stages still to come, pp - r. interleaved (Narayanan et al. 2021, section 2.2): (v - 1) pp +
    2 (pp - r) - 1 forwards of one stage; with zero bubbles (v - 1) pp + pp - r. V schedules: 2 pp, and one more where two
    directions overlap.
    """
    pp, schedule, micro = shape.layout.pp, shape.parallel.pipeline_schedule, shape.micro_batches
    if pp == 1:
        return 1
    held = shape.num_stages // pp
    if schedule == "gpipe":
        return micro
    if schedule == "1f1b":
        return min(micro, pp - pp_rank)
    if schedule in V_SCHEDULES:
        forwards = 2 * pp + (schedule == "dualpipev")
    else:
        forwards = (held - 1) * pp + (2 * (pp - pp_rank) - 1 if schedule == "interleaved_1f1b" else pp - pp_rank)
    return min(micro, forwards / held)
