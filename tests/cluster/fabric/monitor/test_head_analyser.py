"""The monitor at the head: what it writes, tells and serves."""

from __future__ import annotations

import json
import random
import socket
import urllib.request
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cluster.errors import FabricError
from cluster.fabric.findings import Finding
from cluster.fabric.groups import world_group
from cluster.fabric.monitor import head_analyser
from cluster.fabric.monitor.durations import RankLists
from cluster.fabric.monitor.expected import ExpectedStep, read_profile
from cluster.fabric.monitor.head_analyser import MonitorAnalyser, analyser_spec
from cluster.fabric.monitor.rank_messages import DURATIONS, EXPECTED, OFF
from cluster.fabric.predict import CommunicationRow, predict
from cluster.fabric.watch.setup import HeadContext
from tests.cluster.fabric.collectives import FakeCollectives, swept
from tests.cluster.fabric.monitor.stories import step_of

EVEN = dict.fromkeys(range(4), 0.1)


class _Head:
    """A head with nothing but the monitor."""

    def __init__(self, directory: Path, *, port: int | None = None) -> None:
        self.events: list[tuple[str, Mapping[str, Any]]] = []
        self.analyser = MonitorAnalyser(
            HeadContext(
                directory=directory,
                world_size=4,
                options=analyser_spec(window_steps=5, prometheus_port=port).options,
                host_of=lambda rank: f"h{rank}",
                event=lambda name, details: self.events.append((name, details)),
            )
        )

    def run(self, slow_from: int, slow_to: int, steps: int) -> list[Finding]:
        """Rank 2 is slow for some steps."""
        noise = random.Random(0)
        found: list[Finding] = []
        for step in range(steps):
            work = {**EVEN, 2: 0.14} if slow_from <= step < slow_to else EVEN
            for rank, told in step_of(step, work, noise=noise).items():
                self.analyser.on_message(
                    rank, DURATIONS, json.loads(json.dumps(told.as_payload(RankLists()))), float(step)
                )
            found += self.analyser.tick(float(step))
        return found


def test_windows_are_written_and_findings_told_once(tmp_path: Path) -> None:
    head = _Head(tmp_path)
    (found,) = head.run(20, 60, 100)
    assert found.ranks == (2,)
    lines = [json.loads(line) for line in (tmp_path / "fabric" / "windows.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(4, 100, 5))
    slow = lines[6]
    assert slow["late_s"]["2"] > slow["late_s"]["0"] + 0.02
    assert slow["busy_s"]["2"] == pytest.approx(0.14, rel=0.1)
    assert slow["wait_s"]["world"] > lines[0]["wait_s"]["world"]
    assert slow["network_s"]["world"] == pytest.approx(0.02, rel=0.2)
    (gone,) = [details for name, details in head.events if name == "straggler_gone"]
    assert gone["message"] == f"rank 2 on h2 keeps up with the others again since step {gone['step'] - 4}"


def test_prometheus_reads_the_last_window(tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    head = _Head(tmp_path, port=port)
    try:
        head.run(0, 100, 20)
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
            text = answer.read().decode()
    finally:
        head.analyser.close()
    assert head.events[0][1]["message"].startswith(f"fabric.prometheus_port = {port}: ")
    assert "on all interfaces of this host" in head.events[0][1]["message"]
    figures = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
    assert float(figures["mega_step"]) == 19
    assert float(figures['mega_busy_seconds{rank="2"}']) == pytest.approx(0.14, rel=0.1)
    assert float(figures['mega_findings{kind="slow_host"}']) == 1
    assert float(figures['mega_wait_seconds{axis="world"}']) > 0.02
    with pytest.raises(OSError):
        urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10)


def test_a_taken_port_leaves_the_rest_of_the_monitor(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("0.0.0.0", 0))
        taken.listen()
        port = taken.getsockname()[1]
        head = _Head(tmp_path, port=port)
    (event,) = head.events
    assert event[0] == "notice"
    assert event[1]["message"].startswith(f"fabric.prometheus_port = {port}: cannot listen there (")
    assert head.run(0, 100, 20)


def test_expected_stands_beside_measured_after_the_first_windows(tmp_path: Path) -> None:
    path = tmp_path / "sweep.json"
    profile = swept(FakeCollectives(), world_group(4))
    path.write_text(json.dumps(profile.as_data()))
    row = CommunicationRow(axis="world", kind="all_reduce", count=1, num_bytes=1000.0, group_size=4)
    expected = ExpectedStep(profile=read_profile(path), rows=(row,))
    payload = json.loads(json.dumps(expected.as_payload()))
    assert predict(ExpectedStep.from_payload(payload).profile, [row]) == predict(profile, [row])
    head = _Head(tmp_path)
    head.analyser.on_message(0, EXPECTED, payload, 0.0)
    head.run(0, 0, 40)
    (event,) = head.events
    assert event[0] == "communication_time"
    assert event[1]["step"] == 14
    assert event[1]["measured_s"] == pytest.approx(0.02, rel=0.1)
    assert 0 < event[1]["expected_s"] < 0.002
    assert event[1]["message"].startswith("communication of a step: all_reduce on world: ")
    assert "expected, " in event[1]["message"]
    json.dumps(event[1])


@pytest.mark.parametrize("content", [None, "no JSON", "{}", "[]"])
def test_a_profile_that_is_none_is_told(tmp_path: Path, content: str | None) -> None:
    path = tmp_path / "sweep.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(FabricError) as caught:
        read_profile(path)
    assert str(caught.value).startswith(f"fabric.profile = {str(path)!r}: ")


def test_a_full_disk_costs_lines_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    head = _Head(tmp_path)
    with monkeypatch.context() as patch:

        def full(*_: object) -> None:
            raise OSError(28, "No space left on device")

        patch.setattr(head_analyser, "_append", full)
        patch.setattr(head.analyser, "_context", replace(head.analyser._context, event=full))
        (found,) = head.run(0, 100, 20)
    assert found.ranks == (2,)
    path = tmp_path / "fabric" / "windows.jsonl"
    path.parent.mkdir()
    path.write_text('{"step"')  # what a full disk leaves of a line
    head.run(0, 100, 5)
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()[1:]] == [4]
    (event,) = head.events
    assert event[1]["message"] == (
        "4 line(s) of fabric/windows.jsonl could not be written: [Errno 28] No space left on device"
    )


def test_a_rank_that_gives_up_is_told_and_not_waited_for(tmp_path: Path) -> None:
    head = _Head(tmp_path)
    head.analyser.on_message(1, OFF, {"reason": "no kernel"}, 0.0)
    for step in range(10):
        for rank, told in step_of(step, EVEN).items():
            if rank != 1:
                head.analyser.on_message(rank, DURATIONS, told.as_payload(RankLists()), 0.0)
    assert len((tmp_path / "fabric" / "windows.jsonl").read_text().splitlines()) == 2
    (event,) = head.events
    assert event == ("notice", {"message": "rank 1 on h1 times its collectives no more: no kernel"})


def test_ranks_that_never_report_are_told_once(tmp_path: Path) -> None:
    head = _Head(tmp_path)
    for step in range(60):
        for rank, told in step_of(step, EVEN).items():
            if rank != 3:
                head.analyser.on_message(rank, DURATIONS, told.as_payload(RankLists()), float(step))
        head.analyser.tick(float(step))
    assert len((tmp_path / "fabric" / "windows.jsonl").read_text().splitlines()) == 10
    (event,) = head.events
    assert event[0] == "ranks_silent"
    assert event[1]["ranks"] == [3]
    assert event[1]["message"].startswith(
        "the durations of 1 rank(s) do not get through, of 12 watched steps in a row: 3; "
    )
