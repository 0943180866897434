"""The head: what the watchers tell, put together for the whole run; findings are told from here."""

from __future__ import annotations

import importlib
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from cluster.fabric.findings import Finding
from cluster.fabric.watch import hang_findings as told
from cluster.fabric.watch.hang import Patience, find_hangs, waiting_ranks
from cluster.fabric.watch.protocol import Message
from cluster.fabric.watch.records import Records
from cluster.fabric.watch.setup import HeadAnalyser, HeadContext
from cluster.fabric.watch.state import Activity, Break, GroupCalls, Life, RankState, unpack_groups
from cluster.fabric.watch.status import RankStatus

_ASK_SHARE = 0.5
"""Of `hang_seconds`: after such a wait the ranks are asked for all their calls."""
_ASK_AGAIN_SECONDS = 3.0
_ASK_SELDOM_SECONDS = 15.0
"""Answering costs a rank up to 0.2 s: while one computes for long, it is asked less and less often."""
_FRESH_SECONDS = 6.0
"""Calls that are older say nothing about a rank that has gone on since."""
_SETTLE_SECONDS = 1.0
"""Deaths follow one another: the first one is the cause, and word of it may come late."""
_SAME_MOMENT_SECONDS = 0.05
_WRITE_SECONDS = 2.0
_UNREACHABLE_SHARE = 0.75


@dataclass(kw_only=True)
class _Rank:
    """One rank by what has come so far; moments are of the head's clock."""

    host: str | None = None
    life: Life = "starting"
    life_since: float = 0.0
    quiet_since: float = 0.0
    activity: Activity = "working"
    place: tuple[str, ...] = ()
    groups: list[Mapping[str, Any]] = field(default_factory=list)
    breaks: tuple[Break, ...] = ()
    calls_at: float | None = None
    heard_at: float = 0.0

    @property
    def is_here(self) -> bool:
        """It is still part of the run."""
        return self.life not in ("dead", "ended")


class Head:
    """Takes messages of watchers, and is asked about once a second (`tick`) what it has found.

    `ask` requests all ranks' calls of all watchers, `stacks` their stacks.
    """

    def __init__(
        self,
        *,
        directory: Path,
        world_size: int,
        hang_seconds: float,
        analysers: Sequence[Mapping[str, Any]],
        ask: Callable[[], None],
        stacks: Callable[[], None],
        now: float,
    ) -> None:
        self._hang_seconds = hang_seconds
        self._ask = ask
        self._stacks = stacks
        self._ranks = {rank: _Rank(life_since=now, quiet_since=now, heard_at=now) for rank in range(world_size)}
        self._records = Records(directory)
        self._usual_wait_s = 0.0
        self._asked_at = now - _ASK_AGAIN_SECONDS
        self._written_at = now - _WRITE_SECONDS
        self._told: set[tuple[Any, ...]] = set()
        self._told_at: float | None = None
        self._death_seen = False
        self._deaths_told = False
        self._analysers: dict[str, HeadAnalyser] = {}
        for spec in analysers:
            self._guarded(spec["factory"], partial(self._plug_in, spec, directory, world_size))

    @property
    def is_over(self) -> bool:
        """All ranks of the run have ended in good order."""
        return all(rank.life == "ended" for rank in self._ranks.values())

    def on_message(self, message: Message, now: float) -> None:
        """One word of a watcher."""
        if message["t"] == "ranks":
            for each in message["ranks"]:
                self._update(each, message["host"], now)
        elif message["t"] == "calls":
            rank = self._ranks[message["rank"]]
            rank.groups, rank.calls_at = message["groups"], now
            rank.breaks = tuple(Break(**each) for each in message["breaks"])
        elif message["t"] == "say":
            for name, analyser in list(self._analysers.items()):
                arguments = (message["rank"], message["kind"], message["payload"], now)
                self._guarded(name, partial(analyser.on_message, *arguments))

    def tick(self, now: float) -> None:
        """Looks for hangs, lets analysers speak, and writes down what is new."""
        states = self._states(now)
        findings = [*self._first_deaths(states, now), *self._hangs(states, now)]
        for finding in findings:
            self._tell(finding, now)
        for name, analyser in list(self._analysers.items()):
            for finding in self._guarded(name, partial(analyser.tick, now)) or ():
                self._records.append_finding(finding)
        if now >= self._written_at + _WRITE_SECONDS:
            self._written_at = now
            self._write(states, ended=False)

    def close(self, now: float) -> None:
        """The last word."""
        self.tick(now)
        for name, analyser in list(self._analysers.items()):
            self._guarded(name, analyser.close)
        self._write(self._states(now), ended=True)

    def _plug_in(self, spec: Mapping[str, Any], directory: Path, world_size: int) -> None:
        module, _, function = spec["factory"].partition(":")
        self._analysers[spec["factory"]] = getattr(importlib.import_module(module), function)(
            HeadContext(
                directory=directory,
                world_size=world_size,
                options=spec["options"],
                host_of=self._host_of,
                event=self._records.append_event,
            )
        )

    def _guarded(self, name: str, act: Callable[[], Any]) -> Any:
        """What `act` returns; an analyser that raises is out, and the watch goes on."""
        try:
            return act()
        except Exception as error:
            self._analysers.pop(name, None)
            where = traceback.format_exception(error)
            self._records.append_event(
                "analyser_failed", {"analyser": name, "error": str(error), "traceback": "".join(where)}
            )
            return None

    def _host_of(self, rank: int) -> str:
        return self._ranks[rank].host or f"rank {rank}"

    def _update(self, each: Mapping[str, Any], host: str, now: float) -> None:
        rank = self._ranks[each["rank"]]
        rank.host, rank.heard_at = host, now
        quiet_since = now - each["quiet_s"]
        if quiet_since > rank.quiet_since + 0.5:  # it has moved
            waited = quiet_since - rank.quiet_since
            if rank.activity == "waiting" and rank.life == "running" and not self._told:
                self._usual_wait_s = max(self._usual_wait_s, waited)
            rank.quiet_since = quiet_since
        if rank.life != each["life"]:
            rank.life, rank.life_since = each["life"], now - each["life_s"]
        rank.activity = each["activity"]
        rank.place = tuple(each["place"])

    def _states(self, now: float) -> dict[int, RankState]:
        return {number: self._state(number, rank, now) for number, rank in self._ranks.items()}

    def _state(self, number: int, rank: _Rank, now: float) -> RankState:
        life, since = rank.life, rank.life_since
        if life == "running" and now - rank.heard_at > _UNREACHABLE_SHARE * self._hang_seconds:
            life, since = "unreachable", rank.heard_at
        groups: tuple[GroupCalls, ...] = ()
        if rank.calls_at is not None and self._is_fresh(rank, now):
            groups = unpack_groups(rank.groups, later_s=now - rank.calls_at)
        return RankState(
            rank=number,
            host=self._host_of(number),
            life=life,
            life_s=now - since,
            quiet_s=now - rank.quiet_since,
            activity=rank.activity,
            place=rank.place,
            groups=groups,
            breaks=rank.breaks if groups else (),
        )

    def _is_fresh(self, rank: _Rank, now: float) -> bool:
        """Its calls are those that it has made: told after it moved last, or a moment ago."""
        assert rank.calls_at is not None
        return rank.calls_at >= rank.quiet_since or now - rank.calls_at < _FRESH_SECONDS

    def _first_deaths(self, states: Mapping[int, RankState], now: float) -> list[Finding]:
        """The ranks that went without a word before anybody else went at all."""
        dead = {number: rank for number, rank in self._ranks.items() if rank.life == "dead"}
        if not dead or self._deaths_told:
            return []
        if not self._death_seen:
            self._death_seen = True
            self._ask()  # what the others are in
        first = min(rank.life_since for rank in dead.values())
        if now < first + _SETTLE_SECONDS:
            return []
        self._deaths_told = True
        if any(rank.life == "ended" and rank.life_since < first - _SETTLE_SECONDS for rank in self._ranks.values()):
            self._records.append_event("ranks_gone", {"ranks": sorted(dead), "reason": "after others had ended"})
            return []
        if self._told_at is not None and all(rank.quiet_since <= self._told_at for rank in self._ranks.values()):
            self._records.append_event("ranks_gone", {"ranks": sorted(dead), "reason": "ended while the run hung"})
            return []
        at_once = [number for number, rank in dead.items() if rank.life_since <= first + _SAME_MOMENT_SECONDS]
        if len(at_once) == len(self._ranks) > 1:
            self._records.append_event("ranks_gone", {"ranks": at_once, "reason": "all at once: the run was ended"})
            return []
        others = {number: state for number, state in states.items() if number not in at_once}
        return [told.died(states[number], others) for number in at_once]

    def _hangs(self, states: Mapping[int, RankState], now: float) -> tuple[Finding, ...]:
        if self._death_seen:  # what follows, follows from it
            return ()
        # A rank may wait in native code, where nothing but its calls shows it.
        quiet_s = max((state.quiet_s for state in states.values() if state.life == "running"), default=0.0)
        if quiet_s < _ASK_SHARE * self._hang_seconds:
            return ()
        if now >= self._asked_at + min(max(_ASK_AGAIN_SECONDS, _ASK_SHARE * quiet_s), _ASK_SELDOM_SECONDS):
            self._asked_at = now
            self._ask()
        if not waiting_ranks(states, self._hang_seconds) or not self._all_have_answered(now):
            return ()
        return find_hangs(states, Patience(hang_seconds=self._hang_seconds, usual_wait_s=self._usual_wait_s))

    def _all_have_answered(self, now: float) -> bool:
        """Of those that can."""
        return all(
            rank.calls_at is not None and self._is_fresh(rank, now)
            for rank in self._ranks.values()
            if rank.life == "running" and now - rank.heard_at < _ASK_AGAIN_SECONDS
        )

    def _tell(self, finding: Finding, now: float) -> None:
        """Writes a finding down, once, and has all ranks say where they are."""
        place = (finding.evidence.get("group"), finding.evidence.get("number"))
        key = (finding.kind, finding.ranks, place)
        if key in self._told:
            return
        self._told.add(key)
        self._told_at = now
        self._records.append_finding(finding)
        self._stacks()

    def _write(self, states: Mapping[int, RankState], *, ended: bool) -> None:
        self._records.write_state([_status(state) for state in states.values()], ended=ended)


def _status(state: RankState) -> RankStatus:
    pending = [call.text + f" on {group.axis}" for group in state.groups for call in group.calls if not call.done]
    is_waiting = state.life == "running" and (state.activity == "waiting" or bool(pending))
    return RankStatus(
        rank=state.rank,
        host=state.host,
        state="waiting" if is_waiting else "training" if state.life == "running" else state.life,
        quiet_s=round(state.quiet_s, 1),
        doing=pending[0] if pending else (state.place[0] if state.place else ""),
    )
