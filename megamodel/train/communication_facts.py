"""The facts that formulas of communication are about: the run's shape, and what of the model a rank holds."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from megamodel.model.config import ModelConfig
from megamodel.model.decoder import Decoder
from megamodel.train.config import TrainConfig
from parallel.config import ParallelConfig
from parallel.gradients import PlacedParameter, placed_parameters
from parallel.layout import Layout
from parallel.ledger import LedgerKey
from parallel.placement import Placement
from parallel.stages import stages_of_rank, stages_per_rank

DTYPE_NAMES = {"fp32": "float32", "bf16": "bfloat16"}
DTYPE_BYTES = {"float64": 8, "int64": 8, "float32": 4, "int32": 4, "bfloat16": 2}


@dataclass(frozen=True, kw_only=True)
class RunShape:
    """What decides the communication of a run, but for what lies on which rank."""

    model: ModelConfig
    layout: Layout
    parallel: ParallelConfig
    train: TrainConfig
    seq_len: int
    """Tokens of a whole row."""
    rows: int
    """Rows in a micro batch of one rank."""
    document_mask: bool
    """Rows carry document ids."""

    @property
    def activations(self) -> str:
        """Type of activations, as torch names it."""
        return DTYPE_NAMES[self.train.precision]

    @property
    def micro_batches(self) -> int:
        """Micro batches of one rank in a step."""
        return self.train.global_batch_size // (self.layout.num_data_ranks * self.rows)

    @property
    def tokens(self) -> int:
        """Tokens in a micro batch of the ranks of one `tp` group: those of this rank's part of the rows under `cp`."""
        return self.rows * self.seq_len // self.layout.cp

    @property
    def num_stages(self) -> int:
        """Stages of the whole pipeline."""
        held = stages_per_rank(self.parallel.pipeline_schedule, self.parallel.pipeline_stages_per_rank)
        return self.layout.pp * held if self.layout.pp > 1 else 1

    def stages_of(self, pp_rank: int) -> tuple[int, ...]:
        """The stages that a rank of the pipeline holds, in their order."""
        if self.layout.pp == 1:
            return (0,)
        return stages_of_rank(pp_rank, self.layout.pp, self.num_stages, self.parallel.pipeline_schedule)

    def axis_size(self, *names: str) -> int:
        """Ranks along some axes together."""
        return math.prod(self.layout.axis_sizes[name] for name in names)


@dataclass(frozen=True, kw_only=True)
class CutShare:
    """One cut of a parameter: along a dim, in parts, over an axis of some size."""

    dim: int
    parts: int
    axis: str
    size: int


@dataclass(frozen=True, kw_only=True)
class ParameterShare:
    """One parameter on one rank, as tensor and expert parallelism have cut it (before FSDP2)."""

    name: str
    shape: tuple[int, ...]
    whole_shape: tuple[int, ...]
    dtype: str
    """Of its own, as torch names it."""
    cuts: tuple[CutShare, ...]
    is_expert: bool
    sum_axes: tuple[str, ...]
    """Axes of more than one rank over which its gradient is summed beside the data axes."""

    @property
    def numel(self) -> int:
        """Elements."""
        return math.prod(self.shape)


@dataclass(frozen=True, kw_only=True)
class PartShare:
    """One part of the model on one rank: there is one, unless a pipeline has given this rank several stages."""

    stage: int
    layers: tuple[int, ...]
    is_first: bool
    is_last: bool
    parameters: tuple[ParameterShare, ...]


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where a rank stands on the axes along which ranks differ in what they send."""

    pp: int
    shard: int
    """Among the ranks over which FSDP2 shards."""
    expert_shard: int
    """The same for experts on a grid of their own."""


def shares_of(
    shape: RunShape, parts: Sequence[Decoder], placements: Mapping[str, Placement], *, pp_rank: int
) -> tuple[PartShare, ...]:
    """The facts of a rank's parts of the decoder, in the order of its stages."""
    return tuple(
        PartShare(
            stage=stage,
            layers=tuple(int(name) for name, _ in part.layers.named_children()),
            is_first=part.is_first,
            is_last=part.is_last,
            parameters=tuple(_share_of(placed) for placed in placed_parameters([part], placements)),
        )
        for stage, part in zip(shape.stages_of(pp_rank), parts, strict=True)
    )


def _share_of(placed: PlacedParameter) -> ParameterShare:
    placement = placed.placement
    return ParameterShare(
        name=placed.name,
        shape=tuple(placement.local_shape),
        whole_shape=tuple(placement.shape),
        dtype=str(placed.parameter.dtype).removeprefix("torch."),
        cuts=tuple(
            CutShare(dim=cut.dim, parts=cut.parts, axis=cut.axis.name, size=cut.axis.size) for cut in placement.cuts
        ),
        is_expert=placement.is_expert,
        sum_axes=tuple(axis.name for axis in placement.sum_axes if axis.is_split),
    )


@dataclass(frozen=True, kw_only=True)
class Expected:
    """What one rank should have communicated in one step, for one reason."""

    key: LedgerKey
    count: int
    num_bytes: int
    """Payload, as `parallel.ledger.LedgerRow` defines it."""
    purpose: str
    """In words: what is sent, and when."""
    formula: str
    """Bytes in symbols; the legend is in docs/communication.md."""
    on_average: bool = False
    """The bytes of one rank depend on the data (rows routed to its experts): only their sum over the ranks is known, and
    `num_bytes` is the mean."""


def expect(
    axis: str, kind: str, dtype: str, *, count: int, elements: int, purpose: str, formula: str, on_average: bool = False
) -> Expected:
    """`elements` of `dtype` in `count` communications together."""
    return Expected(
        key=LedgerKey(axis=axis, kind=kind, dtype=dtype),
        count=count,
        num_bytes=elements * DTYPE_BYTES[dtype],
        purpose=purpose,
        formula=formula,
        on_average=on_average,
    )
