"""What the head writes, also where it cannot."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cluster.fabric.findings import Finding
from cluster.fabric.watch.records import Records
from cluster.fabric.watch.status import RankStatus, status

FINDING = Finding(kind="slow_host", hosts=("h1",), ranks=(1,), confidence=0.9, evidence={}, sentence="h1 is slow.")
RANK = RankStatus(rank=0, host="h0", state="training", quiet_s=0.0, doing="")


def test_a_disk_that_takes_nothing_ends_nothing_and_loses_no_line(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    records = Records(tmp_path)
    folder = tmp_path / "fabric"
    folder.rename(tmp_path / "away")
    records.append_event("first", {})
    records.append_finding(FINDING)
    records.write_state([RANK], ended=False)
    (record,) = caplog.records
    assert "the watch cannot write" in record.getMessage()
    (tmp_path / "away").rename(folder)
    records.write_state([RANK], ended=False)
    assert [each.finding for each in status(tmp_path).findings] == [FINDING]
    events = [json.loads(line)["event"] for line in (tmp_path / "events.jsonl").read_text().splitlines()]
    assert events == ["first", "fabric_finding"]


def test_lines_that_cannot_be_written_take_no_end_of_memory(tmp_path: Path) -> None:
    records = Records(tmp_path)
    (tmp_path / "events.jsonl").mkdir()
    for number in range(3_000):
        records.append_event("e", {"n": number})
    assert len(records._unwritten) <= 1_000
