"""Watches what the first steps send, and holds it against the formulas."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from megamodel.train.batch import TokenBatch
from megamodel.train.build import BuiltModel
from megamodel.train.communication import Expected, StepCommunication, compare, expected_communication
from megamodel.train.communication_facts import Place, RunShape, shares_of
from megamodel.train.step import StepResult, TrainStep
from parallel.ledger import CommunicationLedger

TRACED_STEPS = 2
"""The first step of a start may do what no other does, so the one after it is watched too."""


class TracedStep:
    """A `TrainStep` whose first calls are recorded. Calling it is a collective over all ranks, as that is.

    `first_step` is the number of the first call. `tell` gets what was counted and expected over all ranks, on each of them.
    """

    def __init__(
        self,
        step: TrainStep,
        *,
        shape: RunShape,
        first_step: int,
        tell: Callable[[StepCommunication], None],
    ) -> None:
        self._step = step
        self._number = first_step
        self._left = TRACED_STEPS
        self._ledger = CommunicationLedger(step.world)
        self._expected = expectation(step.built, shape)
        self._tell = tell

    def __call__(
        self, micro_batches: Sequence[TokenBatch], *, lr_factor: float, stop_requested: Callable[[], bool]
    ) -> StepResult:
        """See `TrainStep`."""
        if self._left == 0:
            return self._step(micro_batches, lr_factor=lr_factor, stop_requested=stop_requested)
        with self._ledger.step():
            result = self._step(micro_batches, lr_factor=lr_factor, stop_requested=stop_requested)
        if not result.skipped:  # a skipped step has no update, and so sends less
            pages = self._step.world.all_gather_object((self._ledger.rows, self._expected))
            rows = compare([counted for counted, _ in pages], [expected for _, expected in pages])
            self._tell(StepCommunication(step=self._number, rows=rows))
            self._left -= 1
        self._number += 1
        return result


def expectation(built: BuiltModel, shape: RunShape) -> tuple[Expected, ...]:
    """What this rank should communicate in each step. No communication."""
    mesh = built.mesh
    place = Place(
        pp=mesh.coordinate("pp"),
        shard=mesh.coordinate("dp_shard") * mesh.size("cp") + mesh.coordinate("cp"),
        expert_shard=mesh.coordinate("edp_shard"),
    )
    parts = shares_of(shape, built.parts, built.data_parallel.placements, pp_rank=place.pp)
    return expected_communication(shape, parts, place)
