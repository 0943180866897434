"""Work that one rank or each rank does for all, with one outcome: all ranks get the results, or all raise.

Without this an error on one rank (a full disk, say) would leave the others waiting for it in the next collective.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from parallel.errors import CheckpointError
from parallel.world import World

T = TypeVar("T")


@dataclass(frozen=True)
class _Outcome(Generic[T]):
    value: T | None
    error: CheckpointError | None


def on_main(world: World, work: Callable[[], T]) -> T:
    """What `work` returns on rank 0, on all ranks. A collective over the world. Raises `CheckpointError` on all."""
    outcome = _attempt(world, work) if world.is_main else None
    return _unwrap(world.broadcast_object(outcome))


def on_every_rank(world: World, work: Callable[[], T]) -> list[T]:
    """What `work` returns on each rank, in order. A collective over the world. Raises `CheckpointError` on all."""
    return [_unwrap(outcome) for outcome in world.all_gather_object(_attempt(world, work))]


def _attempt(world: World, work: Callable[[], T]) -> _Outcome[T]:
    try:
        return _Outcome(work(), None)
    except CheckpointError as error:
        return _Outcome(None, error)
    except Exception as error:  # whatever it is, the other ranks must hear of it; not every exception can be sent
        reason = f"rank {world.rank}: {type(error).__name__}: {error}"
        return _Outcome(None, CheckpointError(f"the checkpoint could not be written or read ({reason})"))


def _unwrap(outcome: _Outcome[Any]) -> Any:
    if outcome.error is not None:
        raise outcome.error
    return outcome.value
