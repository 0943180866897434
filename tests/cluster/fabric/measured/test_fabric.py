"""A fabric of four gloo ranks on the loopback device: figures, collectives, and ranks and flows that fail."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Sequence
from typing import Any
from unittest import mock

import numpy as np
import pytest

from cluster.errors import FabricError
from cluster.fabric.measured import torch_transport
from cluster.fabric.measured.fabric import MeasuredFabric, run_on_fabric
from cluster.fabric.measured.place import FabricPlace, MeasureOptions
from cluster.fabric.measured.transport import COLLECTIVE_KINDS
from cluster.fabric.probing import StalledError, UnresponsiveError
from parallel.world import World
from tests.gloo_pool import GlooPool

PAIRS = np.array([[0, 1], [1, 0], [2, 3], [3, 2]])
QUICK = MeasureOptions(transport="gloo", start_timeout_s=30.0, silence_s=5.0, round_timeout_s=15.0)


def _place(world: World) -> FabricPlace:
    return FabricPlace(
        rank=world.rank,
        world_size=world.world_size,
        local_rank=0,
        local_world_size=1,
        address=f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}",
        host=f"n{world.rank}",
        agent_store=True,
    )


def _run(world: World, work: Callable[[MeasuredFabric], Any], options: MeasureOptions = QUICK) -> Any:
    """What `run_on_fabric` gave on this rank, or its error in words."""
    try:
        return run_on_fabric(_place(world), options, work)
    except FabricError as error:
        return str(error)


def _figures(world: World) -> Any:
    def work(fabric: MeasuredFabric) -> dict[str, Any]:
        fabric.counters()
        return {
            "hosts": [endpoint.host for endpoint in fabric.endpoints],
            "transport": fabric.transport,
            "compute": [fabric.compute([3, 0, 1, 2], work_s=0.02).tolist() for _ in range(2)],
            "rates": fabric.transfer(PAIRS, num_bytes=4 << 20).tolist(),
            "incast": fabric.transfer(np.array([[0, 3], [1, 3], [2, 3], [3, 0]]), num_bytes=1 << 20).tolist(),
            "trips": fabric.round_trip(PAIRS[[0, 2]], repeats=9).tolist(),
            "empty": fabric.transfer(PAIRS[:0], num_bytes=1).tolist(),
            "counters": [len(growth) for growth in fabric.counters()],
            "seconds": fabric.seconds,
        }

    return _run(world, work)


def test_figures_are_there_for_every_flow_and_plausible(gloo_ranks: GlooPool) -> None:
    measured, *others = gloo_ranks(4, _figures)
    assert others == [None] * 3
    assert measured["hosts"] == ["n0", "n1", "n2", "n3"]
    assert measured["transport"] == "gloo"
    # Loopback: between 1 MB/s and what no memory gives.
    for rate in measured["rates"] + measured["incast"]:
        assert 1e6 < rate < 1e12
    assert all(0 < seconds < 5 for seconds in measured["trips"])
    assert all(0 < seconds < 10 for row in measured["compute"] for seconds in row)
    assert measured["empty"] == []
    assert all(count > 0 for count in measured["counters"])
    assert measured["seconds"] > 0


def _collectives(world: World) -> Any:
    def work(fabric: MeasuredFabric) -> list[tuple[str, tuple[int, ...], tuple[int, ...], bool]]:
        found = []
        for kind in COLLECTIVE_KINDS:
            for groups in ([[0, 1, 2, 3]], [[2, 0], [1, 3]]):
                times = fabric.collective(
                    kind, 40_000, groups, iterations=3, warmup=1, with_compute=len(groups) == 2, dtype="bfloat16"
                )
                assert (times.seconds > 0).all()
                found.append((kind, times.ranks, times.seconds.shape, times.correct))
        return found

    return _run(world, work)


def test_collectives_of_the_world_and_of_groups_at_once(gloo_ranks: GlooPool) -> None:
    found = gloo_ranks(4, _collectives)[0]
    expected = [(kind, ranks, (4, 3), True) for kind in COLLECTIVE_KINDS for ranks in ((0, 1, 2, 3), (2, 0, 1, 3))]
    assert found == expected


def _corrupted(world: World, kind: str) -> Any:
    from cluster.fabric.measured.torch_collectives import Exchange

    honest = Exchange.run

    def spoiling(self: Any, deadline: float) -> tuple[float, ...]:
        seconds = honest(self, deadline)
        start = self._start

        def start_and_spoil() -> Sequence[Any]:
            for work in start():
                work.wait()
            self._taken[-1] += 1
            return []

        self._start = start_and_spoil
        return seconds

    with mock.patch.object(Exchange, "run", spoiling if world.rank == 2 else honest):
        return _run(
            world,
            lambda fabric: [
                fabric.collective(kind, 4096, [[0, 1], [2, 3]], iterations=1, warmup=0, check=check).correct  # type: ignore[arg-type]
                for check in (True, False)
            ],
        )


@pytest.mark.parametrize("kind", ["all_reduce", "all_to_all"])
def test_one_wrong_element_on_one_rank_is_noticed(gloo_ranks: GlooPool, kind: str) -> None:
    assert gloo_ranks(4, _corrupted, kind)[0] == [False, True]


def _stopped(world: World) -> Any:
    pids = world.all_gather_object(os.getpid())

    def work(fabric: MeasuredFabric) -> Any:
        before = fabric.transfer(PAIRS, num_bytes=1 << 20)
        os.kill(pids[3], signal.SIGSTOP)
        named = []
        try:
            for flows in (PAIRS, PAIRS[:1]):
                try:
                    fabric.transfer(flows, num_bytes=1 << 20)
                except UnresponsiveError as error:
                    named.append(error.ranks)
        finally:
            os.kill(pids[3], signal.SIGCONT)
        return (before > 0).all(), named, fabric.intact

    return _run(world, work)


def test_a_stopped_rank_is_named_and_holds_nobody_up(gloo_ranks: GlooPool) -> None:
    found, *others = gloo_ranks(4, _stopped)
    assert found == (True, [(3,), (3,)], False)
    assert others[:2] == [None, None]


def _stalled(world: World) -> Any:
    from cluster.fabric.measured.torch_transport import TorchTransport

    def sends_nothing(*_: Any) -> list[int]:
        return []

    def work(fabric: MeasuredFabric) -> Any:
        try:
            return fabric.transfer(PAIRS, num_bytes=1 << 20)
        except StalledError as error:
            return error.flows, str(error)

    send = sends_nothing if world.rank == 2 else TorchTransport._send
    options = MeasureOptions(transport="gloo", start_timeout_s=30.0, silence_s=5.0, round_timeout_s=6.0)
    with mock.patch.object(TorchTransport, "_send", send):
        return _run(world, work, options)


def test_a_flow_that_does_not_come_through_is_named_where_all_ranks_answer(gloo_ranks: GlooPool) -> None:
    flows, words = gloo_ranks(4, _stalled)[0]
    assert flows == ((2, 3),)
    assert words == "transfers 2->3 did not complete during a transfer of 1048576 bytes"


def _without_a_mesh(world: World) -> Any:
    make = torch_transport._gloo_group
    opened: list[int] = []

    def counting(*arguments: Any) -> Any:
        before = _num_sockets()
        group = make(*arguments)
        opened.append(_num_sockets() - before)
        return group

    def work(fabric: MeasuredFabric) -> Any:
        assert (fabric.transfer(PAIRS, num_bytes=1 << 20) > 0).all()
        assert (fabric.round_trip(PAIRS[[0, 2]], repeats=3) > 0).all()
        times = fabric.collective("all_reduce", 4096, [[0, 1, 2, 3]], iterations=2, warmup=1)
        return times.correct

    with (
        mock.patch.object(torch_transport, "_MOST_IN_MESH", 2),
        mock.patch.object(torch_transport, "_gloo_group", counting),
    ):
        return _run(world, work), opened[0]


def _num_sockets() -> int:
    return sum("socket:" in os.path.realpath(f"/proc/self/fd/{name}") for name in os.listdir("/proc/self/fd"))


def test_a_large_group_connects_where_it_first_needs_to(gloo_ranks: GlooPool) -> None:
    only_where_it_listens = 1
    assert gloo_ranks(4, _without_a_mesh) == [(correct, only_where_it_listens) for correct in (True, None, None, None)]


def _differing(world: World) -> Any:
    options = MeasureOptions(transport="gloo", silence_s=5.0, rails=world.rank == 1)
    return _run(world, lambda fabric: "measured", options)


def test_ranks_with_other_options_are_told(gloo_ranks: GlooPool) -> None:
    assert gloo_ranks(2, _differing)[0] == (
        "ranks differ, and would not understand one another: rails is True on rank(s) 1 (n1), and False on rank 0 (n0)"
    )


def _asked_wrongly(world: World) -> Any:
    def work(fabric: MeasuredFabric) -> list[str]:
        words = []
        for ask in (
            lambda: fabric.transfer(np.array([[1, 1]]), num_bytes=1),
            lambda: fabric.collective("all_reduce", 8, [[0, 1], [1]], iterations=1, warmup=0),
            lambda: fabric.collective("all_reduce", 8, [[0, 1]], iterations=1, warmup=0, dtype="int7"),
        ):
            with pytest.raises(ValueError) as caught:
                ask()
            words.append(str(caught.value))
        return words

    return _run(world, work)


def test_what_makes_no_sense_is_refused_before_anybody_is_asked(gloo_ranks: GlooPool) -> None:
    own, overlapping, unknown = gloo_ranks(2, _asked_wrongly)[0]
    assert own == "a flow needs two ends: endpoint 1 was to send to itself"
    assert overlapping == "groups must be disjoint lists of ranks below 2, not [[0, 1], [1]]"
    assert unknown.startswith("all_reduce of int7: kinds are")


def _work_fails(world: World) -> Any:
    def work(fabric: MeasuredFabric) -> None:
        raise KeyError("its own")

    try:
        return _run(world, work)
    except KeyError as error:
        return repr(error)


def test_an_error_of_the_work_itself_ends_all_ranks(gloo_ranks: GlooPool) -> None:
    assert gloo_ranks(2, _work_fails) == ["KeyError('its own')", None]
