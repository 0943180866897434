"""Verbs that work on runs, end to end on tiny ones."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from launcher.goodput import read_ledger
from launcher.jobs.inspection.status import run_status
from megamodel.train.run_directory import RunDirectory
from tests.launcher.conftest import Mega

_RUN = Path("runs/tiny")
_RESULT_KEYS = {"run_dir", "steps", "final_loss", "val_loss", "tokens", "tokens_per_s"}


def losses() -> list[tuple[int, float]]:
    lines = [json.loads(line) for line in (_RUN / "metrics.jsonl").read_text().splitlines()]
    return [(line["step"], line["loss"]) for line in lines if "loss" in line]


def exported_step() -> int:
    return json.loads((_RUN / "export" / "hf" / "mega.json").read_text())["step"]


def assert_text_is_sampled(mega: Mega) -> None:
    """From the newest checkpoint, of step 5; there are 2, 4 and 5."""
    texts = mega("generate", _RUN, "--prompt", "word", "--prompt", "x", "--greedy", "--json").json
    assert texts["step"] == 5
    assert [text["prompt"] for text in texts["texts"]] == ["word", "x"]
    assert texts == mega("generate", _RUN, "--prompt", "word", "--prompt", "x", "--temperature", "0", "--json").json
    streamed = mega("generate", "tiny", "--prompt", "word", "--greedy").out
    assert streamed == texts["texts"][0]["prompt"] + texts["texts"][0]["text"] + "\n"
    bad = mega("generate", _RUN, "--top-p", "2")
    assert bad.code == 2
    assert "--set generate.top_p=2.0: generate.top_p = 2.0: must be less than or equal to 1" in bad.err
    absent = mega("generate", _RUN, "--step", "3")
    assert absent.code == 1
    assert "no checkpoint of step 3; there are: 2, 4, 5" in absent.err


def assert_corruption_is_found(mega: Mega) -> None:
    """Damages the newest checkpoint."""
    assert mega("checkpoint", "verify", _RUN).code == 0
    victim = next((_RUN / "checkpoints" / "step-00000005").glob("*.distcp"))
    victim.write_bytes(b"x" + victim.read_bytes()[1:])
    verified = mega("checkpoint", "verify", _RUN, "--json")
    assert verified.code == 3
    assert [checkpoint["good"] for checkpoint in verified.json["checkpoints"]] == [True, True, False]
    assert mega("checkpoint", "verify", _RUN, "--step", "4").code == 0
    assert mega("checkpoint", "verify", _RUN, "--step", "3").code == 1
    passed_over = mega("generate", _RUN, "--json")
    assert passed_over.json["step"] == 4
    assert "passed over: " in passed_over.err


def assert_time_is_accounted_for() -> None:
    """Of two starts that trained, of two ranks and of one; a third one between them had nothing to do."""
    directory = RunDirectory(_RUN)
    ledger = read_ledger(directory, now=None)
    assert ledger is not None
    assert sum(ledger.spent.values()) == ledger.end - ledger.begin
    first, second = ledger.starts
    assert (first.num_ranks, first.first_step, first.last_step, first.ending) == (2, 1, 4, "finished")
    assert (second.num_ranks, second.first_step, second.last_step, second.ending) == (1, 5, 5, "finished")
    for category in ("building", "first_step", "steps", "data", "saving", "validation", "stopped", "finishing"):
        assert ledger.spent[category] > 0, category
    assert ledger.spent["lost"] == 0
    status = run_status(directory)
    assert (status.state, status.step, status.total_steps, status.restarts) == ("finished", 5, 5, 1)


def test_two_ranks_train_and_one_continues(tiny: Path, mega: Mega, mega_process: Mega) -> None:
    ended = mega_process("train", tiny, "--ranks", "2", "--json")
    assert ended.code == 0, ended.err
    assert ended.json.keys() >= _RESULT_KEYS
    assert (ended.json["run_dir"], ended.json["steps"], ended.json["finished"]) == ("runs/tiny", 4, True)
    assert [step for step, _ in losses()] == [1, 2, 3, 4]
    assert (_RUN / "logs" / "attempt-1" / "rank-1.log").is_file()
    assert (_RUN / "export" / "hf" / "config.json").is_file()
    for words in (
        "Finished: 4 steps",
        "Where everything is:",
        "What to try next:",
        "  mega train runs/tiny/config.toml --set train.steps=8 --ranks 2    # train on",
        "--- sample, prompt 'one '",
        "bits per byte",
    ):
        assert words in ended.err

    again = mega_process("train", tiny, "--ranks", "2", "--json")
    assert (again.code, again.json["steps"], again.json["tokens_per_s"]) == (0, 4, None)
    assert "sample" not in again.err  # nothing was trained, so nothing is done twice

    longer = mega_process("train", tiny, "--set", "train.steps=5", "--json")
    assert longer.code == 0, longer.err
    assert "changed since the last start: train.steps = 5, but was 4" in longer.err
    assert [step for step, _ in losses()] == [1, 2, 3, 4, 5]
    assert longer.json["tokens_per_s"] is None  # the first step of a start is not measured
    assert exported_step() == 5
    assert "--- sample, prompt 'one '" in longer.err

    assert_time_is_accounted_for()
    listed = mega("checkpoint", "list", _RUN, "--json").json["checkpoints"]
    assert [checkpoint["step"] for checkpoint in listed] == [2, 4, 5]
    assert "runs/tiny/checkpoints/step-00000005" in mega("checkpoint", "list", _RUN).out

    assert_text_is_sampled(mega)

    exported = mega("export", _RUN, "--output", "out", "--step", "4", "--json").json
    assert (exported["path"], exported["step"]) == ("out", 4)
    assert exported["max_logit_difference"] <= 1e-4
    assert "runs/tiny" in mega("export", _RUN).out

    other = mega("train", tiny, "--set", "model.num_layers=3", "--set", "train.steps=8")
    assert other.code == 2
    assert "runs/tiny has checkpoints of another configuration" in other.err

    assert_corruption_is_found(mega)


def test_a_world_in_the_environment_is_joined(tiny: Path, mega_process: Mega) -> None:
    alone = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    settings = ["--set", "train.steps=1", "--set", "export.format=none", "--json"]
    ended = mega_process("train", tiny, *settings, **alone)
    assert ended.code == 0, ended.err
    assert ended.json["steps"] == 1
    assert not (_RUN / "logs").exists()  # whoever started the ranks has their logs
    contradicts = mega_process("train", tiny, *settings, "--ranks", "2", **alone)
    assert contradicts.code == 2
    assert "leave --ranks out" in contradicts.json["error"]


def test_a_stop_signal_saves_and_ends_with_75(tiny: Path, mega: Mega) -> None:
    command = [sys.executable, "-m", "launcher", "train", str(tiny), "--ranks", "2", "--set", "train.steps=100000"]
    environ = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("step 3/"):
                process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=120) == 75
    steps = [checkpoint["step"] for checkpoint in mega("checkpoint", "list", _RUN, "--json").json["checkpoints"]]
    assert steps[-1] == losses()[-1][0]


@pytest.mark.parametrize("ranks", ["1", "2"])
def test_a_schedulers_warning_and_its_end_save_and_end_with_75(tiny: Path, mega: Mega, ranks: str) -> None:
    command = [sys.executable, "-m", "launcher", "train", str(tiny), "--ranks", ranks, "--set", "train.steps=100000"]
    command += ["--set", "train.checkpoint.every_steps=0"]
    environ = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("step 3/"):
                process.send_signal(signal.SIGUSR1)
                process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=120) == 75
    steps = [checkpoint["step"] for checkpoint in mega("checkpoint", "list", _RUN, "--json").json["checkpoints"]]
    assert steps == [losses()[-1][0]]


def test_what_goes_wrong_around_training_costs_nothing(tiny: Path, mega_process: Mega) -> None:
    short = ["train", tiny, "--set", "train.steps=1", "--json"]
    refused_sample = mega_process(*short, "--set", 'generate.stop=["no such token"]')
    assert refused_sample.code == 0, refused_sample.err
    assert (refused_sample.json["export"], exported_step()) == ("runs/tiny/export/hf", 1)
    (told,) = [line for line in refused_sample.err.splitlines() if line.startswith("no text was sampled:")]
    assert "'no such token' is not one token of the tokenizer" in told
    assert told.endswith("; `mega generate runs/tiny` takes other prompts and settings")

    before = (_RUN / "config.toml").read_text()
    Path("other").mkdir()
    for number in range(20):
        (Path("other") / f"{number}.txt").write_text(f"Another text, number {number}.\n" * 20)
    refused = mega_process(*short, "--set", "data.path=other")
    assert refused.code == 2
    assert "is of another run" in refused.json["error"]
    assert (_RUN / "config.toml").read_text() == before

    # As after a start that was killed before its export: an older one lies there.
    origin = _RUN / "export" / "hf" / "mega.json"
    origin.write_text(origin.read_text().replace('"step": 1', '"step": 0'))
    again = mega_process(*short)
    assert again.code == 0, again.err
    assert exported_step() == 1
    assert "--- sample, prompt 'one '" in again.err
    assert "exporting" not in mega_process(*short).err

    # As after a start that was killed between its export and its sample.
    events = _RUN / "events.jsonl"
    events.write_text("".join(line for line in events.read_text().splitlines(True) if '"sample"' not in line))
    sampled = mega_process(*short)
    assert "exporting" not in sampled.err
    assert "--- sample, prompt 'one '" in sampled.err
    assert sampled.json["export"] == "runs/tiny/export/hf"
    assert "sample" not in mega_process(*short).err
    assert "exporting" in mega_process(*short, "--set", "export.dtype=bf16").err


def test_a_bad_corpus_on_two_ranks_is_one_line(tiny: Path, mega_process: Mega) -> None:
    (Path("corpus") / "3.txt").write_bytes(b"\xff\xfe\xfa")
    ended = mega_process("train", tiny, "--ranks", "2")
    assert ended.code == 1
    assert "Traceback" not in ended.err
    (told,) = [line for line in ended.err.splitlines() if line.startswith("error:")]
    assert "corpus/3.txt" in told


def test_a_dry_run_says_what_would_happen_and_starts_nothing(tiny: Path, mega: Mega) -> None:
    ended = mega("train", tiny, "--ranks", "2", "--dry-run", "--json")
    assert ended.code == 0
    assert ended.json == {
        "run_dir": "runs/tiny",
        "continues_from": None,
        "ranks": 2,
        "steps": 4,
        "tokens_per_step": 256,
        "tokens": 1024,
        "layout": {
            "pp": 1,
            "dp_replicate": 1,
            "dp_shard": 2,
            "cp": 1,
            "tp": 1,
            "edp_shard": 2,
            "ep": 1,
            "expert_tp": 1,
        },
        "micro_batch_size": 2,
        "micro_batches": 1,
    }
    assert not Path("runs").exists()


def test_a_dry_run_shows_how_a_pipeline_is_laid_out(tiny: Path, mega: Mega) -> None:
    sets = ["--set", "parallel.pp=2", "--set", "parallel.ep=2", "--set", "train.compile=off"]
    ended = mega("train", tiny, "--ranks", "4", "--dry-run", *sets)
    assert ended.code == 0
    shown = {" ".join(line.split()) for line in ended.out.splitlines()}
    assert {
        "layout pp 2, dp_shard 2, ep 2",
        "micro batches 2",
        "pipeline schedule 1f1b",
        "layers per stage 1, 1",
        "expected bubble 33.3% of a step",
    } <= shown
    ended = mega("train", tiny, "--ranks", "4", "--dry-run", "--json", *sets)
    assert ended.json["layers_per_stage"] == [1, 1]
    assert ended.json["expected_bubble"] == pytest.approx(1 / 3)


def test_a_check_says_the_layout_or_all_that_speaks_against_it(tiny: Path, mega: Mega) -> None:
    good = mega("config", "check", tiny, "--ranks", "4", "--set", "parallel.tp=2")
    assert good.code == 0
    assert "no problems, for 4 ranks (dp_shard 2, tp 2)" in good.out
    bad = mega("config", "check", tiny, "--ranks", "8", "--set", "parallel.tp=3")
    assert bad.code == 2
    assert "parallel: tp 3: 3 ranks declared, which do not divide the 8 required" in bad.err
    assert "parallel.tp = 3: must divide model.num_heads = 4; use parallel.tp = 2" in bad.err
    assert bad.err.count("parallel.tp = 3: must divide") > 2


def test_missing_packages_are_told_before_the_run(tiny: Path, mega: Mega, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    ended = mega("train", tiny)
    assert ended.code == 2
    assert 'export.format = "hf" needs transformers: not installed; install the extra `hf`' in ended.err
    assert not Path("runs").exists()


def test_data_is_prepared_and_described(tiny: Path, mega: Mega) -> None:
    before = mega("data", "info", tiny)
    assert before.code == 1
    assert "not prepared: run `mega data prepare` first" in before.err
    prepared = mega("data", "prepare", tiny, "--json")
    assert prepared.code == 0
    assert 257 < prepared.json["manifest"]["vocab_size"] <= 300
    described = mega("data", "info", tiny)
    assert described.code == 0
    assert "held_out" in described.out
    assert "xz bits per byte" in described.out
