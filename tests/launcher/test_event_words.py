"""Events in words, whatever stands in them."""

from __future__ import annotations

from typing import Any

import pytest

from launcher.event_words import _WORDS, duration, event_words


@pytest.mark.parametrize(
    ("event", "words"),
    [
        ({"event": "launch", "backend": "slurm", "job_id": "17"}, "launched on slurm, job 17"),
        ({"event": "launch", "backend": "local", "job_id": None}, "launched on local"),
        ({"event": "attempt", "attempt": 2, "hosts": ["n1", "n2"]}, "attempt 2 on n1, n2"),
        ({"event": "attempt", "attempt": 2, "hosts": list("abcde")}, "attempt 2 on 5 hosts"),
        ({"event": "preflight", "ok": True}, "preflight: all is well"),
        ({"event": "preflight", "ok": False, "sentences": ["n2: its disk is full."]}, "preflight: n2: its disk is full."),
        ({"event": "failure", "kind": "signal", "message": "rank 1 died"}, "failed: rank 1 died"),
        ({"event": "exclude", "host": "n2", "reason": "slow link"}, "n2 is not used any more: slow link"),
        ({"event": "wait_for_hosts", "have": ["n1"], "need": 2}, "waiting for hosts: 1 of 2"),
        ({"event": "stop_asked", "reason": "time_limit"}, "asked to stop: time limit"),
        ({"event": "restart", "reason": "hung in all_reduce on dp_shard"}, "starting again: hung in all_reduce on dp_shard"),
        ({"event": "requeue", "reason": "host_lost"}, "queued again: host lost"),
        ({"event": "requeue", "reason": "preemption"}, "queued again: preemption"),
        ({"event": "give_up", "cause": "no disk"}, "given up: no disk"),
        ({"event": "resume", "step": 20, "message": "x"}, "training on after step 20"),
        ({"event": "rollback", "lost_steps": 3, "to_step": 20}, "3 step(s) after step 20 lost"),
        ({"event": "checkpoint", "step": 20}, "checkpoint of step 20"),
        ({"event": "fabric_finding", "sentence": "n2 is slow."}, "fabric: n2 is slow."),
        ({"event": "skip", "message": "step 3: NaN"}, "step 3: NaN"),
        ({"event": "ranks_silent"}, "ranks silent"),
        ({"event": "failure", "message": "many\n  lines"}, "failed: many lines"),
        ({}, "event"),
    ],
)  # fmt: skip
def test_words(event: dict[str, Any], words: str) -> None:
    assert event_words(event) == words


@pytest.mark.parametrize("odd", [None, 3, [1], {"a": 1}, "text"])
@pytest.mark.parametrize("name", sorted(_WORDS))
def test_damaged_events_have_words_too(name: str, odd: Any) -> None:
    keys = ("backend", "attempt", "hosts", "sentences", "message", "reason", "have", "need", "step", "host", "job_id")
    assert event_words({"event": name, **dict.fromkeys(keys, odd)})
    assert event_words({"event": name})


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (-3, "0 s"), (0.4, "0 s"), (59.6, "60 s"), (119, "119 s"), (120, "2 min"), (3599, "59 min"), (3600, "1 h"),
        (12_000, "3 h 20 min"), (86_400, "1 d"), (190_800, "2 d 5 h"),
    ],
)  # fmt: skip
def test_durations(seconds: float, words: str) -> None:
    assert duration(seconds) == words
