"""What the head makes of what watchers tell, on a clock of the test's own."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from cluster.errors import FabricError
from cluster.fabric.findings import Finding
from cluster.fabric.watch.head import Head
from cluster.fabric.watch.setup import HeadContext
from cluster.fabric.watch.state import pack_groups
from cluster.fabric.watch.status import status
from tests.cluster.fabric.watch.states import LOOP, play

HEALTHY = {"life": "running", "life_s": 50.0, "quiet_s": 0.1, "activity": "working", "place": []}


class _Run:
    """A head, the orders that it gave, and four ranks that report to it."""

    def __init__(self, directory: Path, analysers: Sequence[Mapping[str, Any]] = ()) -> None:
        self.directory = directory
        self.orders: list[str] = []
        self.now = 1000.0
        self.head = Head(
            directory=directory,
            world_size=4,
            hang_seconds=8.0,
            analysers=analysers,
            ask=lambda: self.orders.append("ask"),
            stacks=lambda: self.orders.append("stacks"),
            now=self.now,
        )

    def report(self, **by_rank: Mapping[str, Any]) -> None:
        """A second later: `r2={...}` changes what is said of rank 2."""
        self.now += 1.0
        for host in (0, 1):
            ranks = [{"rank": rank, **HEALTHY, **by_rank.get(f"r{rank}", {})} for rank in (2 * host, 2 * host + 1)]
            self.head.on_message({"t": "ranks", "host": f"host-{host}", "ranks": ranks}, self.now)
        self.head.tick(self.now)

    def tell_calls(self, states: Mapping[int, Any]) -> None:
        for rank, state in states.items():
            breaks = [vars(each) for each in state.breaks]
            message = {"t": "calls", "rank": rank, "groups": pack_groups(state.groups), "breaks": breaks}
            self.head.on_message(message, self.now)

    @property
    def findings(self) -> list[Finding]:
        self.head.tick(self.now)
        return [each.finding for each in status(self.directory).findings]

    @property
    def events(self) -> list[dict[str, Any]]:
        path = self.directory / "events.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def _hang(run: _Run, *, missing: int = 2, activity: str = "idle") -> None:
    programs = {rank: list(LOOP) * 4 for rank in range(4)}
    del programs[missing][-4:]
    run.report()
    start = run.now
    asked = False
    for _ in range(12):
        quiet = run.now + 1.0 - start
        waiting = {"quiet_s": quiet, "activity": "waiting"}
        run.report(
            **{
                f"r{rank}": waiting if rank != missing else {"quiet_s": quiet, "activity": activity}
                for rank in range(4)
            }
        )
        if "ask" in run.orders and not asked:
            asked = True
            run.tell_calls(play(programs, waited_s=run.now - start))


def test_a_hang_is_told_once_with_stacks(tmp_path: Path) -> None:
    run = _Run(tmp_path)
    _hang(run)
    (finding,) = run.findings
    assert (finding.kind, finding.ranks, finding.hosts) == ("missing_rank", (2,), ("host-1",))
    assert run.orders.count("stacks") == 1
    assert run.orders[0] == "ask"
    (event,) = run.events
    assert event["event"] == "fabric_finding"
    assert event["sentence"] == finding.sentence


def test_one_that_works_is_waited_for(tmp_path: Path) -> None:
    run = _Run(tmp_path)
    _hang(run, activity="working")
    assert run.findings == []
    assert "stacks" not in run.orders


def test_a_wait_that_ended_well_makes_the_head_patient(tmp_path: Path) -> None:
    run = _Run(tmp_path)
    run.report()
    for second in range(1, 12):
        waiting = {"quiet_s": float(second), "activity": "waiting"}
        run.report(r0=waiting, r1=waiting, r3=waiting)
    run.report()
    run.report()
    _hang(run)
    assert run.findings == []  # 11 s were well before


def test_the_first_to_die_is_named_and_not_those_it_took_along(tmp_path: Path) -> None:
    run = _Run(tmp_path)
    run.report()
    run.report(
        r1={"life": "dead", "life_s": 0.9}, r0={"life": "dead", "life_s": 0.2}, r2={"life": "ended", "life_s": 0.3}
    )
    run.report(
        r1={"life": "dead", "life_s": 1.9}, r0={"life": "dead", "life_s": 1.2}, r2={"life": "ended", "life_s": 1.3}
    )
    (finding,) = run.findings
    assert finding.ranks == (1,)
    assert finding.evidence["state"] == "dead"
    assert "ended without a word" in finding.sentence


def test_a_run_that_is_ended_as_a_whole_has_no_culprit(tmp_path: Path) -> None:
    run = _Run(tmp_path)
    run.report()
    for age_s in (0.5, 1.5):
        run.report(**{f"r{rank}": {"life": "dead", "life_s": age_s + rank / 1000} for rank in range(4)})
    assert run.findings == []
    assert [event["event"] for event in run.events] == ["ranks_gone"]


def test_deaths_after_others_have_ended_or_after_a_hang_are_no_news(tmp_path: Path) -> None:
    run = _Run(tmp_path / "ended")
    run.report()
    for age_s in (0.0, 1.0, 2.0):
        run.report(r3={"life": "ended", "life_s": age_s})
    for age_s in (0.0, 1.0, 2.0):
        run.report(r3={"life": "ended", "life_s": 5.0}, r0={"life": "dead", "life_s": age_s})
    assert run.findings == []
    run = _Run(tmp_path / "hung")
    _hang(run)
    still = {"quiet_s": 30.0, "activity": "waiting"}
    for age_s in (0.0, 1.0, 2.0):
        run.report(r0={"quiet_s": 30.0, "life": "dead", "life_s": age_s}, **dict.fromkeys(("r1", "r2", "r3"), still))
    assert [finding.evidence["state"] for finding in run.findings] == ["idle"]


def test_the_state_of_a_run_can_be_read(tmp_path: Path) -> None:
    with pytest.raises(FabricError, match=r"no run in .* has been watched"):
        status(tmp_path)
    run = _Run(tmp_path)
    _hang(run)
    shown = status(tmp_path)
    assert shown.running
    assert [rank.state for rank in shown.ranks] == ["waiting", "waiting", "training", "waiting"]
    assert shown.ranks[3].host == "host-1"
    assert json.dumps(shown.as_data())
    run.head.close(run.now)
    assert not status(tmp_path).running
    assert not status(tmp_path, now=0.0).running


class _Analyser:
    def __init__(self, context: HeadContext) -> None:
        self._context = context
        self._heard: list[object] = []

    def on_message(self, rank: int, kind: str, payload: Mapping[str, Any], now: float) -> None:
        if kind == "bad":
            raise ValueError("no such figure")
        self._heard.append((rank, kind, payload))

    def tick(self, now: float) -> Sequence[Finding]:
        if not self._heard:
            return ()
        rank, kind, payload = self._heard.pop()
        host = self._context.host_of(rank)
        self._context.event("heard", {"payload": payload, **self._context.options})
        return (Finding(kind="slow_host", hosts=(host,), ranks=(rank,), confidence=1.0, evidence={}, sentence=kind),)

    def close(self) -> None:
        self._context.event("closed", {})


def plug(context: HeadContext) -> _Analyser:
    return _Analyser(context)


SPEC = {"factory": f"{__name__}:plug", "options": {"window": 3}}


def test_an_analyser_hears_tells_and_closes(tmp_path: Path) -> None:
    run = _Run(tmp_path, [SPEC])
    run.report()
    run.head.on_message({"t": "say", "rank": 3, "kind": "durations", "payload": {"a": 1}}, run.now)
    (finding,) = run.findings
    assert (finding.hosts, finding.sentence) == (("host-1",), "durations")
    run.head.close(run.now)
    assert [event["event"] for event in run.events] == ["heard", "fabric_finding", "closed"]
    assert run.events[0]["window"] == 3


def test_an_analyser_that_raises_is_out_and_the_watch_goes_on(tmp_path: Path) -> None:
    run = _Run(tmp_path, [SPEC, {"factory": "no.such.module:f", "options": {}}])
    for kind in ("bad", "durations"):
        run.head.on_message({"t": "say", "rank": 3, "kind": kind, "payload": {}}, run.now)
    _hang(run)
    assert [finding.kind for finding in run.findings] == ["missing_rank"]
    failed = [event for event in run.events if event["event"] == "analyser_failed"]
    assert {event["error"] for event in failed} == {"No module named 'no'", "no such figure"}
