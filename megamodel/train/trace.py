"""Watches what the first steps send, and holds it against the formulas."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from megamodel.train.batch import TokenBatch
from megamodel.train.build import BuiltModel
from megamodel.train.callbacks.base import Callback
from megamodel.train.communication import Expected, StepCommunication, compare, expected_communication
from megamodel.train.communication_facts import Place, RunShape, shares_of
from megamodel.train.job import TrainingJob
from megamodel.train.step import StepResult, TrainStep
from parallel.ledger import CommunicationLedger

TRACED_STEPS = 2
"""The first step of a start may do what no other does, so the one after it is watched too."""


class CommunicationTrace:
    """A `Step` that does what another does, and records its first calls. Every rank has one; the `callbacks` of each hear
    of the event "communication".

    `first_step` is the number of the first call. `told` holds what was counted and expected, the same on every rank. A step
    that is skipped has no update and so sends less: the next one is taken in its place.
    """

    def __init__(self, job: TrainingJob, step: TrainStep, callbacks: Sequence[Callback], *, first_step: int) -> None:
        self.told: list[StepCommunication] = []
        self._step = step
        self._callbacks = callbacks
        self._number = first_step
        self._ledger = CommunicationLedger(step.world)
        self._expected = expectation(job, step.built)

    def __call__(
        self, micro_batches: Sequence[TokenBatch], *, lr_factor: float, stop_requested: Callable[[], bool]
    ) -> StepResult:
        """See `TrainStep`."""
        if len(self.told) == TRACED_STEPS:
            return self._step(micro_batches, lr_factor=lr_factor, stop_requested=stop_requested)
        with self._ledger.step():
            result = self._step(micro_batches, lr_factor=lr_factor, stop_requested=stop_requested)
        if not result.skipped:
            pages = self._step.world.all_gather_object((self._ledger.rows, self._expected))
            rows = compare([counted for counted, _ in pages], [expected for _, expected in pages])
            self.told.append(StepCommunication(step=self._number, rows=rows))
            for callback in self._callbacks:
                callback.on_event("communication", **self.told[-1].as_data())
        self._number += 1
        return result


def expectation(job: TrainingJob, built: BuiltModel) -> tuple[Expected, ...] | None:
    """What this rank should communicate in each step; None where there are no formulas. No communication."""
    if job.parallel.data_engine == "deepspeed":
        return None
    mesh = built.mesh
    shape = RunShape(
        model=job.model,
        layout=mesh.layout,
        parallel=job.parallel,
        train=job.train,
        seq_len=job.data.seq_len,
        rows=built.micro_batch_size,
        document_mask=job.data.document_mask,
    )
    place = Place(
        pp=mesh.coordinate("pp"),
        shard=mesh.coordinate("dp_shard") * mesh.size("cp") + mesh.coordinate("cp"),
        expert_shard=mesh.coordinate("edp_shard"),
    )
    parts = shares_of(shape, built.parts, built.data_parallel.placements, pp_rank=place.pp)
    return expected_communication(shape, parts, place)
