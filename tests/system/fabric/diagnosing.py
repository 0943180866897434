"""A world of ranks on made-up hosts that diagnoses its fabric as often as it is asked to."""

from __future__ import annotations

import contextlib
import itertools
import time
from collections.abc import Sequence
from types import TracebackType
from typing import Any, Self

import numpy as np

from cluster.fabric.diagnose import diagnose
from cluster.fabric.findings import Finding
from cluster.fabric.measured.fabric import MeasuredFabric, run_on_fabric
from cluster.fabric.measured.place import FabricPlace, MeasureOptions
from cluster.fabric.probing import Endpoint, Figures, Flows
from tests.system.fabric.faults import Fault
from tests.system.fabric.hosts import FabricOfHosts
from tests.system.fabric.ranks import HostRank, Ranks

DIAGNOSIS_SECONDS = 180.0
"""Six times what a diagnosis may take, for a busy machine."""


class DiagnosingRanks:
    """A context: ranks on all hosts of `fabric`, which have met. `ranks` are those of the faults."""

    def __init__(self, fabric: FabricOfHosts) -> None:
        self.ranks = Ranks(fabric, serve)
        self._cleanup = contextlib.ExitStack()
        self._numbers = itertools.count()

    def __enter__(self) -> Self:
        with contextlib.ExitStack() as stack:
            stack.enter_context(self.ranks)
            self.ranks.hear(0, timeout_s=DIAGNOSIS_SECONDS)
            self._cleanup = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._cleanup.close()

    def diagnose(self) -> dict[str, Any]:
        """`verdict` as for JSON, `measurements` as a list of what was asked and answered. Raises RankFailureError."""
        number = next(self._numbers)
        self.ranks.tell(0, number)
        # One that took too long for who asked for it may still answer.
        while (answer := self.ranks.hear(0, timeout_s=DIAGNOSIS_SECONDS))["number"] != number:
            pass
        return answer


def serve(rank: HostRank) -> None:
    """What each rank runs: rank 0 diagnoses whenever its parent says so, until it says None."""
    place = FabricPlace(
        rank=rank.rank,
        world_size=rank.world_size,
        local_rank=0,
        local_world_size=1,
        address=rank.address,
        host=rank.host.name,
    )

    def work(fabric: MeasuredFabric) -> None:
        rank.parent.send("all have met")
        while (number := rank.parent.recv()) is not None:
            recorded = Recording(fabric)
            verdict = diagnose(recorded)
            rank.parent.send({"number": number, "verdict": verdict.as_data(), "measurements": recorded.measurements})

    run_on_fabric(place, MeasureOptions(), work)


class Recording:
    """A fabric whose clock starts now, and that keeps what was measured for those who wonder about a verdict."""

    def __init__(self, fabric: MeasuredFabric) -> None:
        self._fabric = fabric
        self._begin = time.monotonic()
        self.measurements: list[dict[str, Any]] = []

    @property
    def endpoints(self) -> tuple[Endpoint, ...]:
        """See `Fabric`."""
        return self._fabric.endpoints

    @property
    def seconds(self) -> float:
        """See `Fabric`."""
        return time.monotonic() - self._begin

    def compute(self, who: Sequence[int], *, work_s: float) -> Figures:
        """See `Fabric`."""
        seconds = self._fabric.compute(who, work_s=work_s)
        return self._keep("compute", [int(one) for one in who], seconds, work_s=work_s)

    def transfer(self, flows: Flows, *, num_bytes: int) -> Figures:
        """See `Fabric`."""
        rates = self._fabric.transfer(flows, num_bytes=num_bytes)
        return self._keep("transfer", np.asarray(flows).tolist(), rates, num_bytes=num_bytes)

    def round_trip(self, pairs: Flows, *, repeats: int) -> Figures:
        """See `Fabric`."""
        seconds = self._fabric.round_trip(pairs, repeats=repeats)
        return self._keep("round_trip", np.asarray(pairs).tolist(), seconds, repeats=repeats)

    def counters(self) -> Any:
        """See `Fabric`."""
        return self._fabric.counters()

    def _keep(self, what: str, where: list[Any], figures: Figures, **settings: float) -> Figures:
        numbers = [float(f"{figure:.5g}") for figure in figures]
        self.measurements.append({"do": what, "at_s": round(self.seconds, 3), "of": where, "got": numbers, **settings})
        return figures


def is_told(faults: Sequence[Fault], findings: Sequence[Finding]) -> bool:
    """Whether the first findings, one a fault, tell them all; and nothing is told where nothing is wrong.

    A path that is bad both ways may be told as two findings: the second repeats a fault, and does not count.
    """
    untold = [fault for fault in faults if fault.expected]
    if not untold:
        return not findings
    told: list[Fault] = []
    for finding in findings:
        if any(fault.is_met_by(finding) for fault in told):
            continue
        met = [fault for fault in untold if fault.is_met_by(finding)]
        if not met:
            return False
        told.append(met[0])
        untold.remove(met[0])
        if not untold:
            return True
    return False
