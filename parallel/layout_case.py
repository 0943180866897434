"""A layout in question, and what a rule says of it. Imports without torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from parallel.config import ParallelConfig
from parallel.layout import Layout, LayoutDemands, filled
from parallel.stages import stages_per_rank

WORLD = "--ranks"
# Where the configuration of a run says what a demand is.
DEMAND_KEYS = {
    "num_layers": "model.num_layers",
    "num_heads": "model.num_heads",
    "num_kv_heads": "model.num_kv_heads",
    "vocab_size": "model.vocab_size",
    "d_ff": "model.d_ff",
    "num_experts": "model.moe.num_experts",
    "expert_d_ff": "model.moe.d_ff",
    "shared_d_ff": "model.moe.num_shared_experts",
    "seq_len": "data.seq_len",
    "global_batch_size": "train.global_batch_size",
    "micro_batch_size": "train.micro_batch_size",
    "compile": "train.compile",
    "optimizer": "train.optimizer.name",
    "device": "run.device",
}
_DEMAND_OF_KEY = {key: name for name, key in DEMAND_KEYS.items()}


@dataclass(frozen=True, kw_only=True)
class Case:
    """A layout that is asked for, by whom, and for how many ranks."""

    config: ParallelConfig
    demands: LayoutDemands
    world_size: int

    @cached_property
    def layout(self) -> Layout:
        """The degrees; they need not make up the world."""
        return filled(self.config, self.world_size)

    @property
    def num_stages(self) -> int:
        """Stages of the pipeline; 1 without one."""
        config = self.config
        held = stages_per_rank(config.pipeline_schedule, config.pipeline_stages_per_rank)
        return config.pp * held if config.pp > 1 else 1

    def value(self, key: str) -> Any:
        """What stands at a key of the run's configuration."""
        if key == WORLD:
            return self.world_size
        if key in _DEMAND_OF_KEY:
            return getattr(self.demands, _DEMAND_OF_KEY[key])
        found: Any = self.config
        for part in key.split(".")[1:]:
            found = getattr(found, part)
        return found

    def with_value(self, key: str, value: Any) -> Case:
        """The same case with another value at a key."""
        if key == WORLD:
            return replace(self, world_size=value)
        if key in _DEMAND_OF_KEY:
            return replace(self, demands=replace(self.demands, **{_DEMAND_OF_KEY[key]: value}))
        *section, name = key.split(".")[1:]
        update: dict[str, Any] = {name: value}
        if section:
            update = {section[0]: getattr(self.config, section[0]).model_copy(update=update)}
        return replace(self, config=self.config.model_copy(update=update))


@dataclass(frozen=True, kw_only=True)
class Violation:
    """What a rule found."""

    keys: tuple[str, ...]
    """What it is about, the key to change first at the head."""
    reason: str
    mend_by: tuple[str, ...] = ()
    """Keys whose change may cure it, the likeliest first; a search finds the values."""
    unit: int = 1
    """The numbers of samples or tokens that do are multiples of this."""
    choices: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    """Values to try first where a key is not a number, or where a rule knows better than a search."""


Rule = Callable[[Case], Violation | None]


def key_of(axis: str) -> str:
    """The key of a degree."""
    return f"parallel.{axis}"


def stated(case: Case, key: str) -> str:
    """A key with its value, as TOML has it."""
    value = case.value(key)
    return f'{key} = "{value}"' if isinstance(value, str) else f"{key} = {str(value).lower()}"
