"""A fabric of real ranks: rank 0 asks, all ranks measure."""

from __future__ import annotations

import contextlib
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, TypeVar

import numpy as np

from cluster.errors import FabricError
from cluster.fabric.measured import mpi_world
from cluster.fabric.measured.agent import Agent, Answer
from cluster.fabric.measured.control import Hub, Message
from cluster.fabric.measured.meeting import meet
from cluster.fabric.measured.place import FabricPlace, MeasureOptions
from cluster.fabric.measured.trains import plan_train
from cluster.fabric.measured.transport import COLLECTIVE_KINDS, DTYPE_BYTES, CollectiveCall, CollectiveKind
from cluster.fabric.measured.world import choose_transport, endpoints_of, network_addresses, require_agreement
from cluster.fabric.probing import Endpoint, Figures, Flows, StalledError, UnresponsiveError

T = TypeVar("T")
_REST_SHARE = 0.08
"""Of the time of a turn of compute, where ranks share a machine."""


@dataclass(frozen=True, kw_only=True)
class CollectiveTimes:
    """What all ranks of all groups saw of a collective."""

    ranks: tuple[int, ...]
    """World ranks of the rows, group after group."""
    seconds: Figures
    """(ranks, iterations): of each iteration, from the end of the one before."""
    correct: bool
    """Whether every rank's checked result was right."""


class MeasuredFabric:
    """`cluster.fabric.probing.Fabric` on real ranks, and the collectives of the sweep. Lives on rank 0.

    Every measurement raises `UnresponsiveError` or `StalledError`; after the first of them the fabric measures no more,
    and raises that error again.
    """

    def __init__(self, hub: Hub, place: FabricPlace, options: MeasureOptions) -> None:
        """Waits for all ranks, and connects them unless `options.lazy`. Raises FabricError where they differ in what must be
        the same."""
        self._hub = hub
        self._options = options
        self._world_size = place.world_size
        self._hosts_told = place.hosts
        self._failure: UnresponsiveError | StalledError | None = None
        self._unit_seconds: float | None = None
        missing = hub.gather(options.start_timeout_s)
        require_agreement(hub.hellos)
        self._transport = choose_transport(hub.hellos, options.transport)
        self._endpoints = endpoints_of(hub.hellos, rails=options.rails, missing=missing, hosts=place.hosts)
        self._begin = time.monotonic()
        self._connected = False
        if missing:
            self._failure = UnresponsiveError(missing, "the start")
        elif not options.lazy:
            with contextlib.suppress(
                UnresponsiveError, StalledError
            ):  # waits for the first measurement, as a missing rank
                self._connect()

    @property
    def endpoints(self) -> tuple[Endpoint, ...]:
        """One rank of each host; with `rails`, and where all ranks are on one host, every rank.

        Ranks that never came are among them where the launcher knew their hosts.
        """
        return self._endpoints

    @property
    def hosts(self) -> Mapping[int, str]:
        """Host of each rank that came, and of those that did not where the launcher knew it."""
        came = {rank: hello["host"] for rank, hello in self._hub.hellos.items()}
        return dict(sorted({**dict(enumerate(self._hosts_told)), **came}.items()))

    @property
    def seconds(self) -> float:
        """Since the ranks began to connect."""
        return time.monotonic() - self._begin

    @property
    def transport(self) -> str:
        """gloo, nccl or mpi."""
        return self._transport

    @property
    def world_size(self) -> int:
        """Ranks in all, endpoints or not."""
        return self._world_size

    @property
    def intact(self) -> bool:
        """False after an error: nothing more can be measured."""
        return self._failure is None

    def question(self, questions: Mapping[int, Message], *, timeout_s: float, during: str) -> dict[int, Message]:
        """What ranks say to a question each, by their `answer` of `run_on_fabric`. Goes the side way: connects nobody."""
        commands: dict[int, Message] = {rank: {"do": "question", "question": said} for rank, said in questions.items()}
        return {rank: reply["answer"] for rank, reply in self._exchange(commands, timeout_s, during).items()}

    def announce(self, message: Message) -> None:
        """A question to all ranks that wants no answer, and goes to those that are still there after an error too."""
        for rank in self._hub.hellos:
            self._hub.tell(rank, {"do": "question", "question": message, "number": 0})

    def compute(self, who: Sequence[int], *, work_s: float) -> Figures:
        """See `Fabric.compute`. Ranks of one machine take turns, with a rest after each.

        A kernel takes cores for a while from who has left none of a period's time to others: real-time processes 50 ms
        in each second, containers with a quota what they have used too much. It must not do so within the next one's turn.

        A quota of CPU time shows in wall-clock time only where `work_s` is a few of its periods (100 ms by default) long.
        """
        if self._unit_seconds is None:
            everybody = range(len(self._endpoints))
            calibrated = self._in_turns(everybody, {"do": "calibrate"}, timeout_s=5.0, rest_s=0.0)
            self._unit_seconds = float(min(calibrated))
        units = max(1, round(work_s / self._unit_seconds))
        command = {"do": "compute", "units": units}
        return np.array(self._in_turns(who, command, timeout_s=50 * work_s, rest_s=_REST_SHARE * work_s))

    def transfer(self, flows: Flows, *, num_bytes: int) -> Figures:
        """See `Fabric.transfer`."""
        train = asdict(plan_train(num_bytes))
        return self._flow_figures(flows, {"do": "transfer", "train": train}, f"a transfer of {num_bytes} bytes")

    def round_trip(self, pairs: Flows, *, repeats: int, num_bytes: int = 8) -> Figures:
        """See `Fabric.round_trip`; the message has `num_bytes`."""
        command = {"do": "round_trip", "repeats": repeats, "num_bytes": num_bytes}
        return self._flow_figures(pairs, command, "round trips")

    def counters(self) -> Sequence[Mapping[str, float]]:
        """See `Fabric.counters`."""
        commands = {endpoint.rank: {"do": "counters"} for endpoint in self._endpoints}
        answers = self._ask(commands, self._options.round_timeout_s, "reading counters")
        return [answers[endpoint.rank]["growth"] for endpoint in self._endpoints]

    def collective(
        self,
        kind: CollectiveKind,
        num_bytes: int,
        groups: Sequence[Sequence[int]],
        *,
        iterations: int,
        warmup: int,
        dtype: str = "float32",
        with_compute: bool = False,
        check: bool = True,
    ) -> CollectiveTimes:
        """Runs a collective in each of `groups` (disjoint lists of world ranks) at the same time.

        `num_bytes` is the size as nccl-tests defines it for each kind: of all that a rank ends up with for all_gather, of
        all that it gives for reduce_scatter and all_to_all, of the buffer for the others. send_recv: each rank sends to
        the next of its group and receives from the one before. `with_compute`: ranks compute at the same time.
        `check`: data are compared with what they must be, once, outside the timing. Raises ValueError where the
        arguments make no sense.
        """
        ranks = [rank for group in groups for rank in group]
        if len(set(ranks)) != len(ranks) or not set(ranks) <= set(range(self._world_size)) or not ranks:
            raise ValueError(f"groups must be disjoint lists of ranks below {self._world_size}, not {groups}")
        if kind not in COLLECTIVE_KINDS or dtype not in DTYPE_BYTES:
            raise ValueError(f"{kind} of {dtype}: kinds are {COLLECTIVE_KINDS}, dtypes {tuple(DTYPE_BYTES)}")
        commands: dict[int, Message] = {}
        for group in groups:
            call = CollectiveCall(
                kind=kind,
                num_bytes=num_bytes,
                group=tuple(group),
                iterations=iterations,
                warmup=warmup,
                dtype=dtype,
                with_compute=with_compute,
                check=check,
            )
            commands |= {rank: {"do": "collective", "call": asdict(call)} for rank in group}
        answers = self._ask(commands, self._options.round_timeout_s, f"{kind} of {num_bytes} bytes")
        return CollectiveTimes(
            ranks=tuple(ranks),
            seconds=np.array([answers[rank]["seconds"] for rank in ranks], dtype=np.float64),
            correct=all(answers[rank]["correct"] for rank in ranks),
        )

    def _connect(self) -> None:
        """Once, at the first call."""
        if self._connected:
            return
        self._connected = True
        self._begin = time.monotonic()
        peers = [endpoint.rank for endpoint in self._endpoints]
        addresses = network_addresses(self._hub)
        commands: dict[int, Message] = {
            rank: {"do": "open", "transport": self._transport, "peers": peers, "address": address}
            for rank, address in addresses.items()
        }
        self._exchange(commands, self._options.start_timeout_s, "connecting")

    def _in_turns(self, who: Sequence[int], command: Message, *, timeout_s: float, rest_s: float) -> list[float]:
        """Each endpoint's seconds. Machines work at the same time, ranks of one machine one after another.

        After each turn all rest for `rest_s`, where any two endpoints share a machine.
        """
        are_shared = len({endpoint.machine for endpoint in self._endpoints}) < len(self._endpoints)
        turns: list[list[int]] = []
        taken: Counter[str] = Counter()
        for place, index in enumerate(who):
            machine = self._endpoints[index].machine
            if taken[machine] == len(turns):
                turns.append([])
            turns[taken[machine]].append(place)
            taken[machine] += 1
        seconds = [0.0] * len(who)
        for turn in turns:
            ranks = {self._endpoints[who[place]].rank: place for place in turn}
            wait_s = max(timeout_s, self._options.round_timeout_s)
            for rank, answer in self._ask(dict.fromkeys(ranks, command), wait_s, "computing").items():
                seconds[ranks[rank]] = answer["seconds"]
            if are_shared:
                time.sleep(rest_s)
        return seconds

    def _flow_figures(self, flows: Flows, command: Message, during: str) -> Figures:
        """One figure for each flow, from a command that every rank gets with its own flows."""
        parts: dict[int, list[tuple[int, int, int]]] = {}
        for index, (begin, end) in enumerate(np.asarray(flows).reshape(-1, 2).tolist()):
            sender, receiver = self._endpoints[begin].rank, self._endpoints[end].rank
            if sender == receiver:
                raise ValueError(f"a flow needs two ends: endpoint {begin} was to send to itself")
            for rank in (sender, receiver):
                parts.setdefault(rank, []).append((index, sender, receiver))
        timeout_s = self._options.round_timeout_s
        commands: dict[int, Message] = {rank: {**command, "flows": part} for rank, part in parts.items()}
        figures = np.full(len(flows), np.nan)
        for answer in self._ask(commands, timeout_s, during).values():
            for index, figure in answer["figures"]:
                figures[index] = figure
        return figures

    def _ask(self, commands: Mapping[int, Message], timeout_s: float, during: str) -> dict[int, Message]:
        """The answers of all ranks that were asked to measure; or the error that ends this fabric."""
        self._connect()
        return self._exchange(commands, timeout_s, during)

    def _exchange(self, commands: Mapping[int, Message], timeout_s: float, during: str) -> dict[int, Message]:
        if self._failure is not None:
            raise self._failure
        try:
            timed = {rank: {**command, "timeout_s": timeout_s} for rank, command in commands.items()}
            answers = self._hub.ask(timed, timeout_s=timeout_s, during=during)
            _require_completion(commands, answers, during)
        except (UnresponsiveError, StalledError) as error:
            self._failure = error
            raise
        return answers


def _require_completion(commands: Mapping[int, Message], answers: Mapping[int, Message], during: str) -> None:
    """Raises StalledError where a rank says that something did not come through, FabricError where it cannot be done."""
    if refusals := {rank: answer["refused"] for rank, answer in answers.items() if "refused" in answer}:
        rank, reason = next(iter(refusals.items()))
        raise FabricError(f"rank {rank}: {reason}")
    flows = {(flow[1], flow[2]): None for rank in commands for flow in _unfinished(commands[rank], answers[rank])}
    reasons = {rank: answer["stalled"] for rank, answer in answers.items() if "stalled" in answer}
    if reasons and not flows:
        rank, reason = next(iter(reasons.items()))
        raise StalledError([], f"{during} (rank {rank}: {reason})", ranks=sorted(reasons))
    if flows:
        raise StalledError(list(flows), during, ranks=sorted(reasons))


def _unfinished(command: Message, answer: Message) -> list[Any]:
    """A command's flows (index, sender, receiver) that were not through."""
    if "stalled" in answer:
        return list(command.get("flows", []))
    return [flow for flow in command.get("flows", []) if flow[0] in answer.get("unfinished", [])]


def run_on_fabric(
    place: FabricPlace, options: MeasureOptions, work: Callable[[MeasuredFabric], T], *, answer: Answer | None = None
) -> T | None:
    """Runs `work` on rank 0, with all other ranks serving its measurements, and returns its result there, None elsewhere.

    Called once by every rank. `work` may diagnose as often as it likes: ranks serve until it returns. Where ranks have
    not come in `start_timeout_s`, `work` runs all the same, and its first measurement raises `UnresponsiveError` naming them.
    `answer` is what this rank says to `MeasuredFabric.question`, in a thread of its own.
    Raises FabricError on a rank that cannot reach rank 0 or loses it, that came too late, or that differs from rank 0
    in versions or options, and on rank 0 where ranks differ or a transport is not there.
    """
    meeting = meet(place, options)
    agent = Agent(meeting, place, options, answer)
    if meeting.hub is None:
        agent.join()
        if agent.sent_home_in_order:
            mpi_world.leave()
        return None
    fabric = None
    try:
        fabric = MeasuredFabric(meeting.hub, place, options)
        return work(fabric)
    finally:
        meeting.close()
        in_order = fabric is not None and fabric.intact
        meeting.hub.stop(clean=in_order)
        agent.end()
        if in_order:
            mpi_world.leave()
