"""Verbs that work on runs, end to end on tiny ones."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.launcher.conftest import Mega

_RUN = Path("runs/tiny")
_RESULT_KEYS = {"run_dir", "steps", "final_loss", "val_loss", "tokens", "tokens_per_s"}


def losses() -> list[tuple[int, float]]:
    lines = [json.loads(line) for line in (_RUN / "metrics.jsonl").read_text().splitlines()]
    return [(line["step"], line["loss"]) for line in lines if "loss" in line]


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
        "--- sample, prompt 'one '",
        "bits per byte",
    ):
        assert words in ended.err

    again = mega_process("train", tiny, "--ranks", "2", "--json")
    assert (again.code, again.json["steps"], again.json["tokens_per_s"]) == (0, 4, None)
    assert "sample" not in again.err  # nothing was trained, so nothing is done twice

    longer = mega_process("train", tiny, "--set", "train.steps=6", "--json")
    assert longer.code == 0, longer.err
    assert "changed since the last start: train.steps = 6, but was 4" in longer.err
    assert [step for step, _ in losses()] == [1, 2, 3, 4, 5, 6]

    listed = mega("checkpoint", "list", _RUN, "--json").json["checkpoints"]
    assert [checkpoint["step"] for checkpoint in listed] == [2, 4, 6]
    assert "runs/tiny/checkpoints/step-00000006" in mega("checkpoint", "list", _RUN).out

    texts = mega("generate", _RUN, "--prompt", "word", "--prompt", "x", "--greedy", "--json").json
    assert texts["step"] == 6
    assert [text["prompt"] for text in texts["texts"]] == ["word", "x"]
    assert texts == mega("generate", _RUN, "--prompt", "word", "--prompt", "x", "--temperature", "0", "--json").json
    streamed = mega("generate", "tiny", "--prompt", "word", "--greedy").out
    assert streamed == texts["texts"][0]["prompt"] + texts["texts"][0]["text"] + "\n"
    bad = mega("generate", _RUN, "--top-p", "2")
    assert bad.code == 2
    assert "--set generate.top_p=2.0: generate.top_p = 2.0: must be less than or equal to 1" in bad.err
    absent = mega("generate", _RUN, "--step", "5")
    assert absent.code == 1
    assert "no checkpoint of step 5; there are: 2, 4, 6" in absent.err

    exported = mega("export", _RUN, "--output", "out", "--step", "4", "--json").json
    assert (exported["path"], exported["step"]) == ("out", 4)
    assert exported["max_logit_difference"] <= 1e-4
    assert "runs/tiny" in mega("export", _RUN).out

    other = mega("train", tiny, "--set", "model.num_layers=3", "--set", "train.steps=8")
    assert other.code == 2
    assert "runs/tiny has checkpoints of another configuration" in other.err

    assert mega("checkpoint", "verify", _RUN).code == 0
    victim = next((_RUN / "checkpoints" / "step-00000006").glob("*.distcp"))
    victim.write_bytes(b"x" + victim.read_bytes()[1:])
    verified = mega("checkpoint", "verify", _RUN, "--json")
    assert verified.code == 3
    assert [checkpoint["good"] for checkpoint in verified.json["checkpoints"]] == [True, True, False]
    assert mega("checkpoint", "verify", _RUN, "--step", "4").code == 0
    assert mega("checkpoint", "verify", _RUN, "--step", "5").code == 1
    passed_over = mega("generate", _RUN, "--json")
    assert passed_over.json["step"] == 4
    assert "passed over: " in passed_over.err


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
    }
    assert not Path("runs").exists()


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
