"""What every rank does, rank 0 too: takes rank 0's commands, measures, answers."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist

from cluster.errors import FabricError
from cluster.fabric.counters import Snapshot, growth, read_counters
from cluster.fabric.measured.compute import Workpiece
from cluster.fabric.measured.control import Line, Message
from cluster.fabric.measured.meeting import Meeting
from cluster.fabric.measured.place import FabricPlace, MeasureOptions, machine_id
from cluster.fabric.measured.torch_transport import TorchPlace, TorchTransport
from cluster.fabric.measured.transport import CollectiveCall, Flow, Train, Transport, TransportStalledError

Answer = Callable[[Message], Message]
"""What this rank says to questions that are none of measuring. Both are plain data for JSON."""

_GOODBYE_S = 1.0
"""How long rank 0 waits at the end for its own last measurement, which may hang. Others wait for its time-out: they have
no verdict to give."""


class Agent:
    """One rank's measuring side. Its thread works; the process's main thread waits in `join`, open to signals."""

    def __init__(
        self, meeting: Meeting, place: FabricPlace, options: MeasureOptions, answer: Answer | None = None
    ) -> None:
        self._meeting = meeting
        self._place = place
        self._options = options
        self._answer = answer
        self._workpiece = Workpiece(torch.device("cpu"))
        self._transport: Transport | None = None
        self._snapshot: Snapshot | None = None
        self._failure: BaseException | None = None
        self.sent_home_in_order = False
        """Whether rank 0 has let this rank go with nobody lost."""
        self._line = Line(meeting.connection, self._hello(), silence_s=options.silence_s, interrupt=self._interrupt)
        self._thread = threading.Thread(target=self._serve, name="fabric-agent", daemon=True)
        self._thread.start()

    def join(self) -> None:
        """Serves until rank 0 sends this rank home. Raises FabricError where rank 0 is lost or refuses this rank."""
        while not self._line.ended.wait(1.0) and self._thread.is_alive():
            pass
        self.end()
        if not self._line.stopped:
            raise FabricError(self._line.loss)

    def end(self) -> None:
        """Lets go of rank 0, once the last measurement has ended or its time is up. Raises what no measurement may raise."""
        own_hub = self._meeting.hub is not None
        self._thread.join(_GOODBYE_S if own_hub else self._options.round_timeout_s + _GOODBYE_S)
        if self._thread.is_alive() and self._transport is not None:
            self._transport.close(clean=False)
        self._line.close()
        if self._failure is not None:
            raise self._failure

    def _hello(self) -> Message:
        versions = {} if self._options.lazy else {"torch": torch.__version__}
        return {
            "token": self._meeting.token,
            "rank": self._place.rank,
            "host": self._place.host,
            "machine": machine_id(),
            "local_rank": self._place.local_rank,
            "leaf": self._place.leaf,
            "address": _address(self._meeting),
            "has_device": torch.cuda.is_available() and self._place.local_rank < torch.cuda.device_count(),
            "agreed": {**versions, "ranks": self._place.world_size, **self._options.agreed},
        }

    def _serve(self) -> None:
        try:
            while True:
                command = self._line.next_command()
                if command["do"] == "stop":
                    self.sent_home_in_order = command["clean"]
                    if self._transport is not None:
                        self._transport.close(clean=command["clean"])
                    self._line.reply(command["number"], {})
                    return
                self._line.reply(command["number"], self._measure(command))
        except FabricError:  # rank 0 is lost; `join` says so
            return
        except BaseException as error:  # a bug: the process must end with it, and rank 0 must not wait for this rank
            self._failure = error
            self._line.close()

    def _interrupt(self) -> None:
        if self._transport is not None:
            self._transport.abort()

    def _measure(self, command: Message) -> Message:
        """The answer to a command. `stalled` and `refused` say why there is none, `unfinished` which flows did not come."""
        try:
            if command["do"] == "question":
                assert self._answer is not None
                return {"answer": self._answer(command["question"])}
            if command["do"] == "open":
                self._open(command)
                return {}
            if command["do"] == "counters":
                return {"growth": self._counters()}
            if command["do"] == "calibrate":
                return {"seconds": self._workpiece.unit_seconds()}
            if command["do"] == "compute":
                return {"seconds": self._workpiece.seconds(command["units"])}
            return self._communicate(command)
        except TransportStalledError as error:
            return {"stalled": str(error)}
        except FabricError as error:
            return {"refused": str(error)}

    def _communicate(self, command: Message) -> Message:
        assert self._transport is not None
        timeout_s = command["timeout_s"]
        if command["do"] == "collective":
            call = CollectiveCall(**{**command["call"], "group": tuple(command["call"]["group"])})
            outcome = self._transport.collective(call, timeout_s=timeout_s)
            return {"seconds": outcome.seconds, "correct": outcome.correct}
        flows = [Flow(index=index, sender=sender, receiver=receiver) for index, sender, receiver in command["flows"]]
        if command["do"] == "round_trip":
            medians = self._transport.round_trip(
                flows, num_bytes=command["num_bytes"], repeats=command["repeats"], timeout_s=timeout_s
            )
            return {"figures": list(medians.items())}
        moved = self._transport.transfer(flows, Train(**command["train"]), timeout_s=timeout_s)
        return {"figures": list(moved.rates.items()), "unfinished": moved.unfinished}

    def _open(self, command: Message) -> None:
        if command["transport"] == "mpi":
            from cluster.fabric.measured.mpi_transport import MpiTransport

            self._transport = MpiTransport(self._place.rank, self._place.world_size, self._workpiece)
            return
        device = torch.device("cpu")
        if command["transport"] == "nccl":
            device = torch.device("cuda", self._place.local_rank)
            torch.cuda.set_device(device)
            self._workpiece = Workpiece(device)
        here = TorchPlace(
            backend=command["transport"],
            rank=self._place.rank,
            peers=tuple(command["peers"]),
            device=device,
            store=dist.PrefixStore(self._meeting.token, self._meeting.store),
            address=command["address"],
            interface=self._options.interface,
            timeout_s=self._options.round_timeout_s,
        )
        try:
            self._transport = TorchTransport(here, self._workpiece)
        except RuntimeError as error:
            raise TransportStalledError((str(error).strip() or "no connection").splitlines()[0]) from error

    def _counters(self) -> dict[str, float]:
        if self._options.counter_root is None:
            return {}
        before, self._snapshot = self._snapshot, read_counters(Path(self._options.counter_root))
        return {} if before is None else growth(before, self._snapshot)


def _address(meeting: Meeting) -> str:
    """Of this host, on the way to rank 0; empty on rank 0, which has no way to itself."""
    return "" if meeting.hub is not None else str(meeting.connection.getsockname()[0])
