"""The one table that knows both the decoder's module names and how they are spread over ranks."""

from __future__ import annotations

from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Literal

from torch import nn

Style = Literal["gathered_unit", "full_precision"]


@dataclass(frozen=True, kw_only=True)
class PlanRow:
    """Modules whose name matches `pattern` (a glob in which * stops at dots) are treated in `style`."""

    pattern: str
    style: Style


# gathered_unit: sharded data parallelism gathers this module's parameters in one piece, just before it runs.
# full_precision: this module's parameters are few, and are never rounded to the type of the activations.
SHARDING_PLAN = (
    PlanRow(pattern="layers.*", style="gathered_unit"),
    PlanRow(pattern="layers.*.*_norm", style="full_precision"),
    PlanRow(pattern="layers.*.attention.*_norm", style="full_precision"),
    PlanRow(pattern="layers.*.moe.router", style="full_precision"),
    PlanRow(pattern="final_norm", style="full_precision"),
)


def has_style(name: str, style: Style) -> bool:
    """Whether the plan treats the module called `name` in `style`."""
    return any(
        row.style == style and name.count(".") == row.pattern.count(".") and fnmatchcase(name, row.pattern)
        for row in SHARDING_PLAN
    )


def is_gathered_unit(name: str, module: nn.Module) -> bool:
    """Whether FSDP2 gathers the module called `name` as one."""
    return has_style(name, "gathered_unit")


def is_full_precision(name: str, module: nn.Module) -> bool:
    """Whether the module called `name` computes in float32 whatever the precision of the rest."""
    return has_style(name, "full_precision")
