"""The rank's side of the watch: a thread that tells the host's watcher, once a second, what this rank's collectives do."""

from __future__ import annotations

import logging
import sys
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from cluster.errors import FabricError
from cluster.fabric.watch import flight, stacks
from cluster.fabric.watch.habits import find_breaks
from cluster.fabric.watch.position import Position, main_thread_position
from cluster.fabric.watch.processes import this_process
from cluster.fabric.watch.protocol import (
    Meeting,
    is_readable,
    local_socket,
    rank_name,
    receive_datagrams,
    send_datagram,
    watcher_name,
)
from cluster.fabric.watch.setup import WatchSetup
from cluster.fabric.watch.starting import WatcherSettings, log_file, start_watcher
from cluster.fabric.watch.state import pack_groups

_logger = logging.getLogger(__name__)
_PERIOD_SECONDS = 1.0
_GREET_AGAIN_SECONDS = 0.1
"""Until the host's watcher, which its first rank may still be starting, hears of this one."""
_HELLO_PERIODS = 5
"""A watcher that has been started anew learns of its ranks again."""
_END_SECONDS = 5.0
_UNHEARD_SECONDS = 40.0
"""A watcher may take 30 s to start."""
_UNRECORDED_PERIODS = 120


@dataclass(frozen=True, kw_only=True)
class _Moment:
    """How the rank stood when it was last looked at."""

    counters: object
    since: float
    """When its counters changed last."""
    position: Position


class Watch:
    """One rank's line to the watch. Its methods may be called from any thread; none waits for another rank."""

    def __init__(self, setup: WatchSetup, meeting: Meeting) -> None:
        """Use `start_watch`."""
        own = this_process()
        self._setup = setup
        self._stacks = stacks.StackFile(setup.directory, setup.rank)
        self._token = meeting.token
        self._watcher = watcher_name(meeting.token, setup.host)
        self._hello = {
            "t": "hello",
            "rank": setup.rank,
            "pid": own.pid,
            "start": own.start_ticks,
            "signal": self._stacks.signal,
        }
        self._name = rank_name(meeting.token, setup.rank)
        self._socket = local_socket(self._name)
        self._closed = False
        self._complaints: set[str] = set()
        self._heard_at = time.monotonic()
        self._unrecorded = 0
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._report, name="fabric-watch", daemon=True)
        self._thread.start()

    def send(self, kind: str, payload: Mapping[str, Any]) -> bool:
        """Gives the head's analysers `payload` (plain data for JSON, at most about 100 kB). False: it could not be sent now,
        and is dropped."""
        return self._tell({"t": "say", "rank": self._setup.rank, "kind": kind, "payload": dict(payload)})

    def close(self) -> None:
        """This rank leaves in good order: from now on it cannot be missing. May be called twice."""
        if self._closed:
            return
        self._closed = True
        self._end.set()
        self._tell_calls()  # where it was, if another's end is the reason for its own
        self._tell({"t": "bye", "rank": self._setup.rank})
        send_datagram(self._socket, self._name, self._token, {"t": "end"})  # wakes the thread
        self._thread.join(_END_SECONDS)
        self._socket.close()
        stacks.forget_if_empty(self._setup.directory, self._setup.rank)

    def _tell(self, message: Mapping[str, Any]) -> bool:
        return send_datagram(self._socket, self._watcher, self._token, message)

    def _complain_once(self, what: str, *arguments: object, error: bool = False) -> None:
        if what not in self._complaints:
            self._complaints.add(what)
            _logger.warning(what, *arguments, exc_info=error)

    def _report(self) -> None:
        """The thread. Whatever fails in it, it goes on: a rank whose thread has ended would be taken for silent."""
        moment = _Moment(counters=None, since=time.monotonic(), position=Position(lines=(), waits=False, mark=0))
        period = 0
        is_greeted = False
        while not self._end.is_set():
            try:
                if not is_greeted or period % _HELLO_PERIODS == 0:
                    is_greeted = self._tell(self._hello)
                moment = self._tick(moment)
                self._answer(_PERIOD_SECONDS if is_greeted else _GREET_AGAIN_SECONDS)
            except Exception:
                self._complain_once("the watch of this rank has failed and goes on", error=True)
                self._end.wait(_PERIOD_SECONDS)
            period += 1

    def _tick(self, before: _Moment) -> _Moment:
        """Tells how the rank stands, compared with a moment `before`."""
        now, latest, position, since = time.monotonic(), self._counters(), before.position, before.since
        if latest != before.counters:
            since = now
        else:  # nothing moves: where does it stand?
            position = main_thread_position()
        quiet_s = now - since
        is_heard = self._tell(
            {
                "t": "tick",
                "rank": self._setup.rank,
                "quiet": round(quiet_s, 2),
                "waits": quiet_s > 0 and position.waits,
                "moved": position.mark != before.position.mark,
                "place": list(position.lines) if quiet_s > 0 else [],
            }
        )
        if is_heard:
            self._heard_at = now
        elif now - self._heard_at > _UNHEARD_SECONDS:
            self._complain_once(
                "no watcher hears rank %d on %s: hangs will not be seen here (see %s)",
                self._setup.rank,
                self._setup.host,
                log_file(self._setup.directory, self._setup.host),
            )
        return _Moment(counters=latest, since=since, position=position)

    def _counters(self) -> object:
        """Changes when a collective begins or ends. Where torch's recorders fail or hold nothing yet, this rank seems to move
        all the time: it cannot be told to hang, but must not be taken for silent."""
        try:
            counters = flight.counters()
        except Exception:
            self._complain_once(
                "torch's flight recorder cannot be read: hangs of this rank will not be seen", error=True
            )
            return object()
        if counters is not None:
            return counters
        self._unrecorded += 1
        if self._unrecorded > _UNRECORDED_PERIODS:
            self._complain_once(
                "no collective on NCCL has been recorded so far: until then hangs of this rank will not be seen; "
                "the recorder is off where TORCH_FR_BUFFER_SIZE or TORCH_NCCL_TRACE_BUFFER_SIZE is 0"
            )
        return object()

    def _answer(self, seconds: float) -> None:
        """Hears the watcher for a while: it may ask for all calls, or for stacks."""
        deadline = time.monotonic() + seconds
        while not self._end.is_set() and (left := deadline - time.monotonic()) > 0:
            if not is_readable(self._socket, left):
                return
            # One answer for all that were asked meanwhile.
            asked = {message["t"] for message in receive_datagrams(self._socket, self._token)}
            if "stacks" in asked:
                self._stacks.write()
            if "ask" in asked:
                self._tell_calls()

    def _tell_calls(self) -> None:
        try:
            entries = flight.recorded_calls()
            groups = flight.group_calls(entries, flight.group_members(), time.time_ns())
            breaks = find_breaks(flight.habitual_calls(entries))
        except Exception:
            self._complain_once(
                "torch's flight recorder cannot be read: collectives of this rank are not known", error=True
            )
            return
        self._tell(
            {
                "t": "calls",
                "rank": self._setup.rank,
                "groups": pack_groups(groups),
                "breaks": [vars(each) for each in breaks],
            }
        )


def start_watch(setup: WatchSetup) -> Watch:
    """Starts this rank's part of the watch, and on local rank 0 the watcher of the host.

    A collective over all ranks by way of `setup.exchange`; to be called from the main thread, once the first process group
    exists. Raises FabricError where the watch cannot be had: on every rank when rank 0's watcher does not start or the
    machine has no Linux, on one rank when its own part fails. A caller may train on without. `close` belongs into a
    `finally`.
    """
    if sys.platform != "linux":
        raise FabricError('the watch needs Linux; set fabric.monitor = "off"')
    meeting: Meeting | None = None
    problem = ""
    if setup.rank == 0:
        try:
            meeting = start_watcher(WatcherSettings.of(setup, this_process()), None)
        except Exception as error:  # whatever it is, the others must hear of it: they wait in the exchange
            problem = str(error)
    text = setup.exchange((meeting.as_text() if meeting else "") if setup.rank == 0 else None)
    if not text:
        raise FabricError(f"rank 0's watcher did not start{': ' + problem if problem else ' (rank 0 says why)'}")
    try:
        meeting = Meeting.from_text(text)
        if setup.rank != 0 and setup.local_rank == 0:
            start_watcher(WatcherSettings.of(setup, this_process()), meeting)
        return Watch(setup, meeting)
    except FabricError:
        raise
    except Exception as error:
        raise FabricError(f"rank {setup.rank} on {setup.host} has no watch: {error}") from error
