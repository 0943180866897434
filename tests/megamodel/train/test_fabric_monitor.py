"""A run under watch: it computes the same numbers, and a slow rank is named in its records."""

from __future__ import annotations

import importlib.util
import io
import json
import statistics
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from cluster.config import FabricConfig
from cluster.fabric.groups import world_group
from cluster.fabric.monitor import tap
from cluster.fabric.monitor.tap import CollectiveTap
from cluster.fabric.watch.rank_side import Watch
from megamodel.model.decoder import Decoder
from megamodel.train.callbacks import fabric as fabric_callback
from megamodel.train.callbacks.base import Callback
from megamodel.train.callbacks.fabric import FabricMonitor
from megamodel.train.job import TrainingJob, TrainingResult
from megamodel.train.run import _closing
from parallel.world import World
from tests.cluster.fabric.collectives import FakeCollectives, swept
from tests.gloo_pool import GlooPool
from tests.megamodel.train.jobs import losses, prepared, small_job, train_job

SLOW_RANK = 1


def _job(
    root: Path, name: str, monitor: str, *, engine: str = "ddp", layout: dict[str, Any], **train: Any
) -> TrainingJob:
    job = small_job(root, name=name, engine=engine, **train)
    parallel = job.parallel.model_copy(update={"timeout_seconds": 90.0, **layout})
    return replace(job, parallel=parallel, fabric=FabricConfig(monitor=monitor, window_steps=2))


@pytest.mark.parametrize(
    ("engine", "layout"),
    [("ddp", {}), ("fsdp2", {"tp": 2}), ("fsdp2", {"pp": 2})],
    ids=["ddp", "fsdp2-tp", "fsdp2-pp"],
)
def test_a_watched_run_computes_the_same_numbers(
    gloo_ranks: GlooPool, tmp_path: Path, engine: str, layout: dict[str, Any]
) -> None:
    figures = []
    for monitor in ("off", "on"):
        job = _job(tmp_path, monitor, monitor, engine=engine, layout=layout, checkpoint={"every_steps": 0})
        prepared(job)
        gloo_ranks(4 if layout else 2, train_job, job, timeout_s=150.0)
        figures.append(losses(job))
        assert (job.run_directory / "fabric").exists() == (monitor == "on")
    assert len(figures[0]) == 12
    assert figures[0] == figures[1]


def _train_with_a_slow_rank(world: World, job: TrainingJob) -> TrainingResult:
    """All ranks take their time, and one takes twice as much."""
    original = Decoder.forward

    def forward(self: Decoder, *args: Any, **kwargs: Any) -> Any:
        time.sleep(0.2 if world.rank == SLOW_RANK else 0.1)
        return original(self, *args, **kwargs)

    Decoder.forward = forward  # type: ignore[method-assign]
    try:
        return train_job(world, job)
    finally:
        Decoder.forward = original  # type: ignore[method-assign]


@pytest.mark.slow
def test_a_slow_rank_is_named_with_its_cost(gloo_ranks: GlooPool, tmp_path: Path) -> None:
    job = _job(
        tmp_path,
        "slow",
        "auto",
        layout={},
        steps=120,
        micro_batch_size=4,
        checkpoint={"every_steps": 0},
        validation={"every_steps": 0},
    )
    profile = tmp_path / "sweep.json"
    profile.write_text(json.dumps(swept(FakeCollectives(), world_group(2)).as_data()))
    job = replace(job, fabric=job.fabric.model_copy(update={"profile": str(profile)}))
    prepared(job)
    gloo_ranks(2, _train_with_a_slow_rank, job, timeout_s=180.0)
    windows = _lines(job.run_directory / "fabric" / "windows.jsonl")
    assert len(windows) >= 3
    # In most: a busy machine holds up who it likes.
    assert statistics.median(window["late_s"]["1"] - window["late_s"]["0"] for window in windows) > 0.05
    findings = [
        finding for finding in _lines(job.run_directory / "fabric" / "findings.jsonl") if finding["kind"] == "slow_host"
    ]
    assert {tuple(finding["ranks"]) for finding in findings} == {(SLOW_RANK,)}
    found = findings[0]
    assert found["evidence"]["cost_s_per_step"] > 0.05
    assert found["sentence"].startswith(f"rank {SLOW_RANK} on ")
    events = _lines(job.run_directory / "events.jsonl")
    assert found["sentence"] in [event["sentence"] for event in events if event["event"] == "fabric_finding"]
    (expected,) = [event for event in events if event["event"] == "communication_time"]
    assert {(row["axis"], row["kind"]) for row in expected["rows"] if row["share"] is not None} >= {
        ("world", "all_reduce")
    }
    assert expected["message"].startswith("communication of a step: ")
    scalars = b"".join(path.read_bytes() for path in (job.run_directory / "tensorboard").glob("*"))
    assert b"fabric/world/wait_s" in scalars
    assert b"fabric/late_s/rank-1" in scalars


def test_ranks_that_are_watched_differently_are_told_before_they_wait(gloo_ranks: GlooPool, tmp_path: Path) -> None:
    job = _job(tmp_path, "uneven", "on", layout={})
    prepared(job)
    with pytest.raises(AssertionError, match=r"fabric\.monitor is 'off' on rank 1 and 'on' on rank 0"):
        gloo_ranks(2, _train_unevenly, job)


def _train_unevenly(world: World, job: TrainingJob) -> TrainingResult:
    return train_job(world, replace(job, fabric=FabricConfig(monitor="off")) if world.rank == 1 else job)


def _lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def _train_with_a_broken_part(world: World, job: TrainingJob, broken: str) -> TrainingResult:
    """Something of the monitor raises on rank 1 alone, whenever it is used."""

    def fail(*_: Any, **__: Any) -> Any:
        raise OSError(28, "No space left on device")

    owner, name = {
        "begin": (CollectiveTap, "start"),
        "end": (tap, "_count_unseen_waits"),
        "tell": (Watch, "send"),
        "close": (Watch, "close"),
        "members": (fabric_callback, "_members"),
        "make": (fabric_callback, "RankMonitor"),
    }[broken]
    with pytest.MonkeyPatch.context() as patch:
        if world.rank == 1:
            patch.setattr(owner, name, fail)
        return train_job(world, job)


@pytest.mark.parametrize("broken", ["begin", "end", "tell", "close", "members", "make"])
def test_a_broken_monitor_does_not_end_the_run(gloo_ranks: GlooPool, tmp_path: Path, broken: str) -> None:
    job = _job(tmp_path, broken, "on", layout={}, checkpoint={"every_steps": 0})
    prepared(job)
    gloo_ranks(2, _train_with_a_broken_part, job, broken, timeout_s=150.0)
    assert len(losses(job)) == 12


class _SilentWatch:
    def __init__(self) -> None:
        self.sent: list[str] = []

    def send(self, kind: str, payload: Mapping[str, Any]) -> bool:
        self.sent.append(kind)
        return True

    def close(self) -> None:
        raise OSError(9, "Bad file descriptor")


def _callback(directory: Path, scalars: Any = ()) -> tuple[FabricMonitor, _SilentWatch, io.StringIO]:
    watch, page = _SilentWatch(), io.StringIO()
    world = SimpleNamespace(rank=0, world_size=2, is_main=True, device=SimpleNamespace(type="cpu"))
    job = SimpleNamespace(run_directory=directory, fabric=FabricConfig(monitor="on"))
    monitor = FabricMonitor(job, world, watch, console=Console(file=page), scalars=scalars)  # type: ignore[arg-type]
    return monitor, watch, page


def test_a_torn_line_is_passed_over(tmp_path: Path) -> None:
    monitor, _, page = _callback(tmp_path)
    (tmp_path / "fabric").mkdir()
    (tmp_path / "fabric" / "findings.jsonl").write_text('{"sent\n\n7\n{"sentence": "rank 1 is late."}\n{"sent')
    monitor.on_step(SimpleNamespace(step=1, step_time_s=0.1))  # type: ignore[arg-type]
    assert page.getvalue() == "fabric: rank 1 is late.\n"


def test_what_cannot_be_shown_is_told_once(tmp_path: Path) -> None:
    monitor, _, page = _callback(tmp_path)
    (tmp_path / "fabric").mkdir()
    (tmp_path / "fabric" / "windows.jsonl").write_text("{}\n")
    for step in range(3):
        monitor._looked = 0.0
        monitor.on_step(SimpleNamespace(step=step, step_time_s=0.1))  # type: ignore[arg-type]
    monitor.close()
    assert page.getvalue().splitlines() == [
        "findings of the watch are shown no more: KeyError: 'wait_s'",
        "the watch did not end in good order: OSError: [Errno 9] Bad file descriptor",
    ]


def test_a_monitor_that_fails_says_so_once_and_tells_the_head(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monitor, watch, page = _callback(tmp_path)
    monkeypatch.setattr(CollectiveTap, "start", lambda self: 1 / 0)
    done: list[int] = []
    built = SimpleNamespace(mesh=SimpleNamespace(coordinate=lambda axis: 0))
    step = monitor.around(
        lambda batches, **_: done.append(len(batches)),  # type: ignore[arg-type,return-value]
        built,  # type: ignore[arg-type]
        expected=lambda: None,
        is_saving=lambda: False,
        first_step=1,
    )
    for _ in range(20):
        step([], lr_factor=1.0, stop_requested=lambda: False)
    assert len(done) == 20
    assert page.getvalue() == "rank 0 times its collectives no more: ZeroDivisionError: division by zero\n"
    assert watch.sent == ["durations_off"]


class _Closing(Callback):
    def __init__(self, error: Exception | None = None) -> None:
        self.error = error
        self.closed = False

    def close(self) -> None:
        self.closed = True
        if self.error is not None:
            raise self.error


def test_every_callback_is_closed_and_the_first_error_is_kept() -> None:
    callbacks: list[Callback] = [_Closing(OSError("disk")), _Closing(), _Closing(OSError("net"))]
    with pytest.raises(KeyError) as caught, _closing(callbacks):
        raise KeyError("the reason")
    assert len(caught.value.__notes__) == 2
    assert all(each.closed for each in callbacks)  # type: ignore[attr-defined]
    with pytest.raises(OSError, match="disk"), _closing(callbacks):
        pass


def test_a_noisy_measurement_does_not_meet_the_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    benchmarks = Path(__file__).parents[3] / "benchmarks"
    monkeypatch.syspath_prepend(str(benchmarks))
    spec = importlib.util.spec_from_file_location("benchmark_of_the_monitor", benchmarks / "fabric_monitor.py")
    assert spec is not None
    assert spec.loader is not None
    benchmark = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(benchmark)
    options, world = SimpleNamespace(engine="ddp"), SimpleNamespace(world_size=2)
    for spread, met in ((0.0005, True), (0.05, False)):
        pairs = [{"off": 1.0, "on": 1.001 + spread * (-1) ** place} for place in range(8)]
        result = benchmark.summary(options, world, pairs, [], True)
        assert result["cost_share"] < benchmark.BOUND
        assert result["met"] == met
    assert not benchmark.summary(options, world, pairs[:1], [], True)["met"]


def test_a_watch_that_cannot_start_is_told_and_done_without(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: object) -> Watch:
        raise ValueError("filedescriptor out of range in select()")

    monkeypatch.setattr(fabric_callback, "start_watch", fail)
    page = io.StringIO()
    job = SimpleNamespace(run_directory=tmp_path, fabric=FabricConfig(monitor="on"))
    world = SimpleNamespace(
        rank=0, world_size=2, local_rank=0, backend="gloo", address=None, broadcast_object=lambda text: text
    )
    console = Console(file=page, width=200)
    assert fabric_callback.watch_run(job, world, console=console) is None  # type: ignore[arg-type]
    assert page.getvalue() == "this run is not watched: ValueError: filedescriptor out of range in select()\n"
