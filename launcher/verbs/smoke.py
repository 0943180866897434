"""`mega smoke`."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

from launcher.errors import RunError
from launcher.output import Output

if TYPE_CHECKING:
    from megamodel.train.run_directory import RunDirectory

_STEPS_BEFORE, _STEPS = 4, 8
# A few documents that every machine has, and the smallest preset.
_SETTINGS = (
    "run.name=smoke",
    "model.preset=moe-tiny",
    "data.source=text",
    "data.file_pattern=*.txt",
    "data.held_out_fraction=0.2",
    "data.seq_len=128",
    "data.tokenizer.vocab_size=512",
    "train.global_batch_size=8",
    "train.optimizer.lr=0.003",
    "train.schedule.warmup_steps=0",
    "train.checkpoint.every_steps=2",
    "train.log.every_steps=1",
    # Compiling takes longer than all the rest.
    "train.compile=off",
    "generate.max_new_tokens=16",
)


def smoke(out: Output) -> int:
    """Try everything on one device within two minutes: train a few steps, save, resume, sample, export."""
    from launcher.verbs.checkpoint import verify
    from launcher.verbs.train import run_training

    started = time.monotonic()
    quiet = Output(as_json=out.as_json, out=out.err, err=out.err)
    with tempfile.TemporaryDirectory(prefix="mega-smoke-") as folder:
        root = Path(folder)
        directory = _write_corpus_and_config(root)
        config = root / "smoke.toml"
        out.say(f"train {_STEPS_BEFORE} steps, save, sample, export")
        _must_end_well("training", run_training(quiet, [config], [f"train.steps={_STEPS_BEFORE}"], summary=False))
        out.say(f"resume, train up to step {_STEPS}, save, sample, export")
        _must_end_well("continuing", run_training(quiet, [config], summary=False))
        out.say("verify the checkpoints")
        _must_end_well("verifying the checkpoints", verify(quiet, directory.root))
        _check(directory)
        losses = [line["loss"] for line in directory.read_metrics() if "loss" in line]
    seconds = time.monotonic() - started
    out.say(f"All of it works here ({seconds:.0f} s; loss {losses[0]:.3f} -> {losses[-1]:.3f}).")
    out.result({"ok": True, "seconds": seconds, "first_loss": losses[0], "final_loss": losses[-1]})
    return 0


def _write_corpus_and_config(root: Path) -> RunDirectory:
    from launcher.config import load_run_config, resolved_toml
    from megamodel.train.run_directory import RunDirectory

    corpus = root / "corpus"
    corpus.mkdir()
    source = Path(tempfile.__file__).parent
    for name in ("argparse", "ast", "bdb", "calendar", "cmd", "dis", "enum", "gzip"):
        (corpus / f"{name}.txt").write_bytes((source / f"{name}.py").read_bytes())
    settings = (
        *_SETTINGS,
        f"train.steps={_STEPS}",
        f'run.directory="{root / "runs"}"',
        f'data.path="{corpus}"',
        f'data.cache_directory="{root / "cache"}"',
    )
    config = load_run_config((), settings).config
    (root / "smoke.toml").write_text(resolved_toml(config), encoding="utf-8")
    return RunDirectory(config.run_directory)


def _must_end_well(what: str, code: int) -> None:
    if code != 0:
        raise RunError(f"{what} ended with {code}: the lines above say why; `mega doctor` says what this machine lacks")


def _check(directory: RunDirectory) -> None:
    """Every step once, no matter where the run was interrupted, and an export of the last one."""
    from megamodel.convert.origin import read_origin

    steps = [line["step"] for line in directory.read_metrics() if "loss" in line]
    if steps != list(range(1, _STEPS + 1)):
        raise RunError(f"{directory.metrics}: steps 1 to {_STEPS} should stand there once each, not {steps}")
    origin = read_origin(directory.export / "hf")
    if origin is None or origin["step"] != _STEPS:
        raise RunError(f"{directory.export / 'hf'}: the export of step {_STEPS} is missing")
