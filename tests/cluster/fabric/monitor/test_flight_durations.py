"""Entries of torch's flight recorder, as NCCL leaves them, become records."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch.distributed as dist

from cluster.fabric.monitor.flight_durations import enable, records_of


def _entry(created_ns: int, name: str, **others: object) -> dict:
    return {
        "process_group": ("5", "mesh_tp"),
        "profiling_name": name,
        "time_created_ns": created_ns,
        "input_sizes": [[128, 4]],
        "input_dtypes": ["BFloat16"],
        "output_sizes": [[256, 4]],
        "output_dtypes": ["BFloat16"],
        **others,
    }


def test_those_of_the_step_with_their_durations() -> None:
    entries = [
        _entry(5, "nccl:all_reduce"),
        _entry(10, "nccl:all_reduce", duration_ms=1.5),
        _entry(11, "nccl:_all_gather_base", duration_ms=2.0),
        _entry(12, "nccl:send 0->1"),
        _entry(20, "nccl:all_reduce", duration_ms=1.0),
    ]
    records = records_of(entries, 10, 20)
    assert [(record.kind, record.num_bytes, record.seconds) for record in records] == [
        ("all_reduce", 1024, 0.0015),
        ("all_gather", 2048, 0.002),
        ("send", 1024, None),
    ]
    assert {record.group for record in records} == {"5"}


class _Group:
    def __init__(self, desc: str, backend: str) -> None:
        self.group_desc, self.group_name, self.backend = desc, "5", backend
        self.is_timed = False

    def _enable_collectives_timing(self) -> None:
        if "gloo" in self.backend:
            raise RuntimeError("Backend gloo is missing implementation of enableCollectivesTiming")
        self.is_timed = True


def test_a_group_that_cannot_be_timed_leaves_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    groups = [_Group("default_pg", "cpu:gloo,cuda:nccl"), _Group("control", "gloo"), _Group("mesh_tp", "nccl")]
    monkeypatch.setattr(dist.distributed_c10d, "_world", SimpleNamespace(pg_map=dict.fromkeys(groups)))
    monkeypatch.setattr(dist, "get_backend", lambda group: group.backend)
    assert enable() == ("default_pg",)
    assert [group.is_timed for group in groups] == [False, False, True]
