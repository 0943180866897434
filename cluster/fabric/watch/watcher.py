"""The watcher of one host: a process that hears the host's ranks, looks after their processes, and reports to the head.

On rank 0's host it is the head as well. It imports no torch, uses no collective library, and has a session of its own:
what stops or kills a rank does not touch it. It ends by itself soon after its ranks.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import resource
import secrets
import selectors
import signal
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from cluster.fabric.watch import stacks
from cluster.fabric.watch.head import Head
from cluster.fabric.watch.links import HeadLink, HeadServer, LocalHead
from cluster.fabric.watch.lost_head import LostHead
from cluster.fabric.watch.processes import ProcessId, Usage, is_starved, is_working, lives, usages
from cluster.fabric.watch.protocol import (
    Meeting,
    Message,
    local_socket,
    rank_name,
    receive_datagrams,
    send_datagram,
    watcher_name,
)
from cluster.fabric.watch.starting import WatcherSettings, log_file
from cluster.fabric.watch.state import Activity, Life

_logger = logging.getLogger(__name__)
_TICK_SECONDS = 0.5
_REPORT_SECONDS = 1.0
_REST_SECONDS = 0.1
"""After a failure, lest one that comes back at once takes a whole core."""
_LINGER_SECONDS = 2.5
"""After the last of its ranks: long enough to see who went first, and to say so."""
_QUIET_SECONDS = 2.0
"""A rank that has done nothing for so long is looked at."""
_SILENT_SECONDS = 5.0
"""A thread that speaks once a second and has not for so long cannot run."""
_STACKS_SECONDS = 3.0
"""A thread that is asked for stacks and has not written them by then cannot run."""
_STARVED_SECONDS = 20.0
"""The same where the machine has no time for the rank."""


@dataclass(kw_only=True)
class _Rank:
    """One rank of this host."""

    process: ProcessId
    signal: int
    pid_file: int | None
    since: float
    life: Life = "running"
    heard: float
    quiet_s: float = 0.0
    waits: bool = False
    moved: bool = False
    is_working: bool = True
    place: list[str] = field(default_factory=list)
    usage: tuple[float, Usage] | None = None
    stacks_due: tuple[float, int] | None = None
    """When its own thread should have written its stacks, and the size of their file before."""

    @property
    def is_here(self) -> bool:
        """Its process is part of the run."""
        return self.life not in ("dead", "ended")


class Watcher:
    """The loop of a watcher's process."""

    def __init__(self, settings: WatcherSettings, meeting: Meeting, server: HeadServer | None) -> None:
        self._settings = settings
        self._token = meeting.token
        self._directory = Path(settings.directory)
        self._selector = selectors.DefaultSelector()
        self._socket = local_socket(watcher_name(meeting.token, settings.host))
        self._selector.register(self._socket, selectors.EVENT_READ, self._hear)
        self._ranks: dict[int, _Rank] = {}
        now = time.monotonic()
        self._server = server
        self._head: LocalHead | HeadLink
        if server is not None:
            head = Head(
                directory=self._directory,
                world_size=settings.world_size,
                hang_seconds=settings.hang_seconds,
                analysers=settings.analysers,
                ask=lambda: self._order("ask"),
                stacks=lambda: self._order("stacks"),
                now=now,
            )
            self._head = server.serve(head, self._selector)
        else:
            self._head = HeadLink(meeting, self._selector, self._obey)
        self._lost_head = LostHead(self._directory, settings.host, meeting)
        self._failures: set[str] = set()
        self._reported = now - _REPORT_SECONDS
        self._add(settings.rank, ProcessId(pid=settings.pid, start_ticks=settings.start_ticks), 0, now)

    def run(self) -> None:
        """Until the ranks of this host are gone, and what there is to say is said."""
        last_here = time.monotonic()
        while True:
            self._guarded(self._listen)
            now = time.monotonic()
            self._guarded(self._look_after, now)
            if now >= self._reported + _REPORT_SECONDS:
                self._guarded(self._report, now)
            self._guarded(self._head.tick, now)
            self._guarded(self._miss_head, now)
            if any(rank.is_here for rank in self._ranks.values()):
                last_here = now
            elif self._all_is_said or now > last_here + _LINGER_SECONDS:
                break
        self._guarded(self._head.close, time.monotonic())

    def _guarded(self, act: Callable[..., None], *arguments: float) -> None:
        """Whatever fails is told once and tried again: a watcher that has ended sees nothing more."""
        try:
            act(*arguments)
        except Exception as error:
            what = "".join(traceback.format_tb(error.__traceback__)[-1:])
            if what not in self._failures:
                self._failures.add(what)
                _logger.exception("the watcher of %s has failed and goes on", self._settings.host)
            time.sleep(_REST_SECONDS)

    def _listen(self) -> None:
        for key, mask in self._selector.select(_TICK_SECONDS):
            key.data(mask)

    def _miss_head(self, now: float) -> None:
        """The run goes on without its head, or hangs with nobody else to say so."""
        is_running = any(rank.is_here for rank in self._ranks.values())
        if is_running and self._lost_head.judge(self._head.silent_s(now), self._settings.hang_seconds):
            self._obey({"t": "stacks"})

    @property
    def _all_is_said(self) -> bool:
        """Every rank has left in good order: here, and at the head in the whole run."""
        here = all(rank.life == "ended" for rank in self._ranks.values())
        return here and self._head.is_over

    def _hear(self, mask: int) -> None:
        now = time.monotonic()
        for message in receive_datagrams(self._socket, self._token):
            self._guarded(partial(self._on_message, message), now)

    def _on_message(self, message: Message, now: float) -> None:
        number = message["rank"]
        if message["t"] == "hello":
            process = ProcessId(pid=message["pid"], start_ticks=message["start"])
            self._add(number, process, message["signal"], now)
        elif message["t"] == "tick":
            self._on_tick(number, message, now)
        elif message["t"] == "bye":
            self._set_life(number, "ended", now)
        else:
            self._head.put(message)

    def _add(self, number: int, process: ProcessId, signal_number: int, now: float) -> None:
        known = self._ranks.get(number)
        if known is not None and known.process == process:
            known.signal = signal_number or known.signal
            return
        rank = _Rank(process=process, signal=signal_number, pid_file=_open_process(process), since=now, heard=now)
        self._ranks[number] = rank
        if rank.pid_file is not None:
            self._selector.register(rank.pid_file, selectors.EVENT_READ, lambda mask: self._on_end(number))

    def _on_end(self, number: int) -> None:
        """The kernel says that the process has ended. What it said before, it said in good order."""
        self._hear(selectors.EVENT_READ)
        rank = self._ranks[number]
        if rank.pid_file is not None:
            self._selector.unregister(rank.pid_file)
            os.close(rank.pid_file)
            rank.pid_file = None
        if rank.life != "ended":
            self._set_life(number, "dead", time.monotonic())

    def _on_tick(self, number: int, message: Message, now: float) -> None:
        rank = self._ranks.get(number)
        if rank is None:
            return
        rank.heard = now
        rank.quiet_s, rank.waits, rank.moved = message["quiet"], message["waits"], message["moved"]
        rank.place = message["place"] or rank.place
        if rank.life in ("silent", "stopped"):
            self._set_life(number, "running", now)

    def _set_life(self, number: int, life: Life, now: float) -> None:
        rank = self._ranks.get(number)
        if rank is not None and rank.life != life:
            rank.life, rank.since = life, now
            self._report(now)

    def _look_after(self, now: float) -> None:
        """Deaths where the kernel gives no word of them, and what ranks do that do not call collectives."""
        looked_at: dict[int, _Rank] = {}
        for number, rank in self._ranks.items():
            if not rank.is_here:
                continue
            if rank.stacks_due is not None and now >= rank.stacks_due[0]:
                if stacks.size(self._directory, number) == rank.stacks_due[1]:
                    stacks.ask(rank.process, rank.signal)
                rank.stacks_due = None
            if rank.pid_file is None and not lives(rank.process):
                self._set_life(number, "dead", now)
            elif max(rank.quiet_s, now - rank.heard) >= _QUIET_SECONDS:
                looked_at[number] = rank
            else:
                rank.usage, rank.is_working = None, True
        due = {
            number: rank
            for number, rank in looked_at.items()
            if rank.usage is None or now >= rank.usage[0] + _QUIET_SECONDS
        }
        if due:
            self._look_at(due, now)

    def _look_at(self, ranks: dict[int, _Rank], now: float) -> None:
        found = usages([rank.process for rank in ranks.values()])
        for number, rank in ranks.items():
            if (usage := found.get(rank.process)) is None:
                continue
            starved = False
            if rank.usage is not None:
                before_at, before = rank.usage
                starved = is_starved(before, usage, now - before_at)
                rank.is_working = rank.moved or is_working(before, usage, now - before_at)
            rank.usage = (now, usage)
            if usage.stopped:
                self._set_life(number, "stopped", now)
            elif now - rank.heard >= (_STARVED_SECONDS if starved else _SILENT_SECONDS):
                self._set_life(number, "silent", now)

    def _report(self, now: float) -> None:
        self._reported = now
        ranks: list[dict[str, Any]] = []
        for number, rank in self._ranks.items():
            silence = now - rank.heard
            activity: Activity = "waiting" if rank.waits else "working" if rank.is_working else "idle"
            ranks.append(
                {
                    "rank": number,
                    "life": rank.life,
                    "life_s": round(now - rank.since, 3),
                    "quiet_s": round(rank.quiet_s + silence, 2),
                    "activity": activity,
                    "place": rank.place if rank.quiet_s >= _QUIET_SECONDS or silence >= _QUIET_SECONDS else [],
                }
            )
        self._head.put({"t": "ranks", "host": self._settings.host, "ranks": ranks})

    def _order(self, what: str) -> None:
        """The head wants something of all ranks of the run."""
        assert self._server is not None
        self._server.order({"t": what})
        self._obey({"t": what})

    def _obey(self, message: Message) -> None:
        for number, rank in self._ranks.items():
            if message["t"] == "ask" and rank.is_here:
                send_datagram(self._socket, rank_name(self._token, number), self._token, {"t": "ask"})
            elif message["t"] == "stacks":
                self._take_stacks(number, rank, time.monotonic())

    def _take_stacks(self, number: int, rank: _Rank, now: float) -> None:
        if rank.life in ("stopped", "dead"):
            why = f"the process is {rank.life}, so that it cannot write them"
            stacks.account_for(self._directory, number, why, rank.place)
        elif rank.life != "ended" and rank.signal:
            rank.stacks_due = now + _STACKS_SECONDS, stacks.size(self._directory, number)
            send_datagram(self._socket, rank_name(self._token, number), self._token, {"t": "stacks"})


def _open_process(process: ProcessId) -> int | None:
    """A file that can be read once the process has ended. None: this kernel has no such thing, or it has ended."""
    try:
        opened = os.pidfd_open(process.pid)
    except OSError:
        return None
    if lives(process):
        return opened
    os.close(opened)
    return None


def _allow_many_files() -> None:
    """As many as this process may have: the head has one for each other host."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def main() -> None:
    """A watcher's process: settings come on its standard input, where the head is goes to its standard output."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)  # meant for the ranks, which may save for long after it
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    _allow_many_files()
    settings = WatcherSettings(**json.loads(sys.stdin.read()))
    server: HeadServer | None = None
    if settings.meeting is None:
        token = secrets.token_hex(16)
        server = HeadServer(settings.address, token)
        meeting = Meeting(address=settings.address, port=server.port, token=token, host=settings.host)
    else:
        meeting = Meeting.from_text(settings.meeting)
    watcher = Watcher(settings, meeting, server)
    sys.stdout.write(meeting.as_text() + "\n")
    sys.stdout.flush()
    with open(os.devnull, "wb") as nowhere:
        os.dup2(nowhere.fileno(), sys.stdout.fileno())
    watcher.run()
    log = log_file(Path(settings.directory), settings.host)
    if log.exists() and log.stat().st_size == 0:
        log.unlink()
