"""The one table that knows both the decoder's module names and how they are spread over ranks."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Literal, get_args

from torch import nn

from megamodel.model.config import ModelConfig
from parallel.tensor_parallel import CutModule, CutStyle

Style = Literal["gathered_unit", "full_precision"] | CutStyle


@dataclass(frozen=True, kw_only=True)
class PlanRow:
    """Modules whose name matches `pattern` (a glob in which * stops at dots) are treated in `style`.

    `whole_heads`: a matrix whose rows are key and value heads, none of which may be cut in two.
    """

    pattern: str
    style: Style
    whole_heads: bool = False


# gathered_unit: sharded data parallelism gathers this module's parameters in one piece, just before it runs.
# full_precision: this module's parameters are few, and are never rounded to the type of the activations.
# The others: see CutModule. A matrix that is in none of them is whole on every rank of `tp`.
SHARDING_PLAN = (
    PlanRow(pattern="layers.*", style="gathered_unit"),
    PlanRow(pattern="layers.*.*_norm", style="full_precision"),
    PlanRow(pattern="layers.*.attention.*_norm", style="full_precision"),
    PlanRow(pattern="layers.*.moe.router", style="full_precision"),
    PlanRow(pattern="final_norm", style="full_precision"),
    PlanRow(pattern="embedding", style="vocabulary"),
    PlanRow(pattern="layers.*.attention", style="gathers_sequence"),
    PlanRow(pattern="layers.*.attention.q_proj", style="columns"),
    PlanRow(pattern="layers.*.attention.k_proj", style="columns", whole_heads=True),
    PlanRow(pattern="layers.*.attention.v_proj", style="columns", whole_heads=True),
    PlanRow(pattern="layers.*.attention.*_up", style="columns"),
    PlanRow(pattern="layers.*.attention.o_proj", style="rows"),
    PlanRow(pattern="layers.*.mlp", style="gathers_sequence"),
    PlanRow(pattern="layers.*.mlp.gate_proj", style="columns"),
    PlanRow(pattern="layers.*.mlp.up_proj", style="columns"),
    PlanRow(pattern="layers.*.mlp.down_proj", style="rows"),
    PlanRow(pattern="layers.*.moe.shared", style="gathers_sequence"),
    PlanRow(pattern="layers.*.moe.shared.gate_proj", style="columns"),
    PlanRow(pattern="layers.*.moe.shared.up_proj", style="columns"),
    PlanRow(pattern="layers.*.moe.shared.down_proj", style="rows"),
    PlanRow(pattern="layers.*.moe.experts", style="experts"),
    PlanRow(pattern="final_norm", style="gathers_output"),
    PlanRow(pattern="lm_head", style="vocabulary"),
)

# Of each stack of the experts' matrices, the dim that is the experts' hidden width.
_EXPERT_HIDDEN_DIM = {"w_gate_EDF": 2, "w_up_EDF": 2, "w_down_EFD": 1}


def _rows_of(name: str) -> Iterator[PlanRow]:
    for row in SHARDING_PLAN:
        if name.count(".") == row.pattern.count(".") and fnmatchcase(name, row.pattern):
            yield row


def has_style(name: str, style: Style) -> bool:
    """Whether the plan treats the module called `name` in `style`."""
    return any(row.style == style for row in _rows_of(name))


def is_gathered_unit(name: str, module: nn.Module) -> bool:
    """Whether FSDP2 gathers the module called `name` as one."""
    return has_style(name, "gathered_unit")


def is_full_precision(name: str, module: nn.Module) -> bool:
    """Whether the module called `name` computes in float32 whatever the precision of the rest."""
    return has_style(name, "full_precision")


def is_expert(name: str, module: nn.Module) -> bool:
    """Whether the module called `name` lies on the experts' grid."""
    return has_style(name, "experts")


def modules_to_cut(model: nn.Module, config: ModelConfig) -> Iterator[CutModule]:
    """What the plan says about tensor and expert parallelism of a decoder's modules."""
    for name, module in model.named_modules():
        for row in _rows_of(name):
            if row.style in get_args(CutStyle):
                yield CutModule(
                    name=name,
                    module=module,
                    style=row.style,  # type: ignore[arg-type]
                    parts=config.num_kv_heads if row.whole_heads else None,
                    hidden_dim=_EXPERT_HIDDEN_DIM if row.style == "experts" else None,
                )
