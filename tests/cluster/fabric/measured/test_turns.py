"""What rank 0 asks of whom, and what it makes of answers: without any ranks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pytest

from cluster.fabric.measured.fabric import MeasuredFabric
from cluster.fabric.measured.place import FabricPlace, MeasureOptions
from cluster.fabric.probing import StalledError

Said = dict[str, Any]


class RanksInWords:
    """A hub whose ranks answer at once. `log`: what was done, in order."""

    def __init__(self, machines: Sequence[str], log: list[str], stalled: Mapping[int, str] | None = None) -> None:
        self.hellos: dict[int, Said] = {
            rank: {
                "host": f"n{rank}",
                "machine": machine,
                "local_rank": 0,
                "leaf": None,
                "address": "",
                "has_device": False,
                "agreed": {},
            }
            for rank, machine in enumerate(machines)
        }
        self.reached_at: dict[int, str] = {}
        self._log = log
        self._stalled = stalled or {}

    def gather(self, timeout_s: float) -> tuple[int, ...]:
        return ()

    def ask(self, commands: Mapping[int, Said], *, timeout_s: float, during: str) -> dict[int, Said]:
        what = {command["do"] for command in commands.values()}
        self._log.append(f"{what.pop()} {sorted(commands)}")
        if "open" in self._log[-1]:
            return {rank: {} for rank in commands}
        return {
            rank: {"stalled": self._stalled[rank]} if rank in self._stalled else {"seconds": 0.01, "correct": True}
            for rank in commands
        }


def fabric_of(hub: Any) -> MeasuredFabric:
    place = FabricPlace(
        rank=0, world_size=len(hub.hellos), local_rank=0, local_world_size=1, address="127.0.0.1:1", host="n0"
    )
    return MeasuredFabric(hub, place, MeasureOptions())


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    entries: list[str] = []
    monkeypatch.setattr(
        "cluster.fabric.measured.fabric.time.sleep",
        lambda seconds: entries.append(f"rest {seconds:.3f}") if seconds else None,
    )
    return entries


def test_ranks_of_one_machine_compute_in_turns_with_a_rest_after_each(log: list[str]) -> None:
    fabric = fabric_of(RanksInWords(["one", "one", "two"], log))
    fabric.compute([1, 0, 2], work_s=0.2)
    first = log.index("compute [1, 2]")
    assert log[first:] == ["compute [1, 2]", "rest 0.016", "compute [0]", "rest 0.016"]
    log.clear()
    # A rank that is asked alone: the next call may ask another one of its machine.
    fabric.compute([1], work_s=0.2)
    assert log == ["compute [1]", "rest 0.016"]


def test_ranks_with_machines_of_their_own_have_no_reason_to_rest(log: list[str]) -> None:
    fabric_of(RanksInWords(["one", "two"], log)).compute([0, 1], work_s=0.2)
    assert log[-1] == "compute [0, 1]"


def test_a_collective_that_stalls_names_the_ranks_that_waited(log: list[str]) -> None:
    fabric = fabric_of(RanksInWords(["one", "two", "three"], log, stalled={2: "its time was up", 1: "its time was up"}))
    with pytest.raises(StalledError) as caught:
        fabric.collective("all_reduce", 64, [[0, 1, 2]], iterations=1, warmup=0)
    assert (caught.value.flows, caught.value.ranks) == ((), (1, 2))
    assert str(caught.value).startswith("rank(s) 1, 2 waited in vain during all_reduce of 64 bytes")
