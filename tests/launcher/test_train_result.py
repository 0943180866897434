"""`mega train --json` answers with the same keys however the run ended."""

from __future__ import annotations

import fcntl
import io
import json
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from data_pipeline.corpus import open_corpus
from launcher import train_result
from launcher.config import load_run_config
from launcher.errors import RankError
from launcher.output import Output
from launcher.place import Place
from launcher.verbs import train as train_verb
from launcher.verbs.train import _say_summary
from megamodel.train.job import TrainingResult
from megamodel.train.run_directory import RunDirectory
from parallel.checkpoint.directory import CheckpointDirectory

PROMISED = {"run_dir", "steps", "final_loss", "val_loss", "tokens", "tokens_per_s"}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Records of three steps, the last of which is not saved, and a checkpoint of step 2."""
    directory = RunDirectory(tmp_path / "x")
    for step in (1, 2, 3):
        directory.append_metrics({"step": step, "tokens": 10 * step, "loss": 4.0 - step})
        directory.append_metrics({"step": step, "val_loss": 5.0 - step, "val_bits_per_byte": 1.0 - step / 10})
    checkpoints = CheckpointDirectory(directory.checkpoints)
    checkpoints.begin(2)
    checkpoints.commit(2, world_size=1, metadata={}, files={})
    return directory.root


def test_a_stop_before_any_result_tells_what_is_saved(run: Path) -> None:
    answer = train_result.stopped_before_result(run)
    assert answer.keys() >= PROMISED
    assert (answer["steps"], answer["tokens"], answer["finished"]) == (2, 20, False)
    assert (answer["final_loss"], answer["val_loss"], answer["val_bits_per_byte"]) == (2.0, 3.0, 0.8)


def test_a_stop_before_anything_was_saved(tmp_path: Path) -> None:
    answer = train_result.stopped_before_result(tmp_path / "x")
    assert answer.keys() >= PROMISED
    assert {answer[key] for key in PROMISED - {"run_dir", "steps"}} == {None}
    assert (answer["run_dir"], answer["steps"], answer["finished"]) == (str(tmp_path / "x"), 0, False)


def result_of(run: Path, **parts: Any) -> TrainingResult:
    whole = {
        "steps": 2,
        "finished": False,
        "trained": True,
        "final_loss": 2.5,
        "val_loss": None,
        "val_bits_per_byte": None,
        "tokens": 20,
    }
    return TrainingResult(run_directory=run, tokens_per_s=None, baselines={}, **{**whole, **parts})


def test_a_start_without_a_validation_tells_the_last_one(run: Path) -> None:
    answer = train_result.ended(result_of(run), None)
    assert answer.keys() == train_result.stopped_before_result(run).keys()
    assert (answer["final_loss"], answer["val_loss"], answer["val_bits_per_byte"]) == (2.5, 3.0, 0.8)
    own = train_result.ended(result_of(run, val_loss=9.0, val_bits_per_byte=8.0), Path("out"))
    assert (own["val_loss"], own["val_bits_per_byte"], own["export"]) == (9.0, 8.0, "out")


@pytest.mark.parametrize("ranks", ["1", "2"])
def test_a_stop_before_the_first_step_answers_too(tiny: Path, ranks: str) -> None:
    """The test holds the lock on the data, so that every rank waits where a test can find it."""
    config = load_run_config([tiny]).config.data
    lock = Path(config.cache_directory) / "fingerprints" / f"{open_corpus(config).stamp()}.lock"
    lock.parent.mkdir(parents=True)
    command = [sys.executable, "-m", "launcher", "train", str(tiny), "--ranks", ranks, "--json"]
    held = lock.open("w")
    fcntl.flock(held, fcntl.LOCK_EX)
    with held, subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        watchdog = threading.Timer(120, process.kill)
        watchdog.start()
        for line in process.stderr:
            if line.startswith("data: waiting for another process"):
                process.send_signal(signal.SIGTERM)
                break
        process.stderr.read()
        answer = json.loads(process.stdout.read())
        assert process.wait(timeout=60) == 75
        watchdog.cancel()
    assert answer.keys() >= PROMISED
    assert (answer["run_dir"], answer["steps"], answer["finished"]) == ("runs/tiny", 0, False)


def summary_of(result: TrainingResult, *, ranks: int) -> str:
    out = io.StringIO()
    place = Place(rank=0, num_ranks=ranks, joins=True, child_of_mega=ranks > 1)
    _say_summary(Output(as_json=False, out=out), result, None, place)
    return out.getvalue()


def test_the_command_that_trains_on_is_of_this_run_and_its_ranks(tmp_path: Path) -> None:
    said = summary_of(result_of(tmp_path / "x", finished=True), ranks=2)
    assert "Finished: 2 steps" in said
    assert f"mega train {tmp_path / 'x' / 'config.toml'} --set train.steps=4 --ranks 2" in said
    assert "--ranks" not in summary_of(result_of(tmp_path / "x", finished=True), ranks=1)


def test_a_run_that_was_finished_before_says_so(tmp_path: Path) -> None:
    said = summary_of(result_of(tmp_path / "x", finished=True, trained=False), ranks=1)
    assert "Nothing to do: this run has finished its 2 steps" in said


def test_ranks_that_all_end_with_0_have_done_nothing_without_a_result(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(train_verb, "run_local_ranks", lambda *_, **__: 0)
    config = load_run_config([tiny], [f'run.directory="{tmp_path}"']).config
    with pytest.raises(RankError, match="rank 0 ended before the run was done, with exit code 0"):
        train_verb._train_in_children(Output(as_json=True, out=io.StringIO()), config, [tiny], (), 2, [])
