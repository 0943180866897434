"""Where a run keeps what; the records that are appended to as it goes. Imports without torch."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any


class RunDirectory:
    """`runs/<name>/`: one run's configuration, metrics, events, checkpoints, logs and exports."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.config = root / "config.toml"
        self.tokenizer = root / "tokenizer.json"
        self.metrics = root / "metrics.jsonl"
        self.events = root / "events.jsonl"
        self.tensorboard = root / "tensorboard"
        self.checkpoints = root / "checkpoints"
        self.logs = root / "logs"
        self.export = root / "export"

    def keep_tokenizer(self, source: Path) -> None:
        """Copies the tokenizer here, so that the run can be sampled and exported wherever it is moved."""
        self.root.mkdir(parents=True, exist_ok=True)
        partial = self.tokenizer.with_suffix(".json.partial")
        shutil.copyfile(source, partial)
        os.replace(partial, self.tokenizer)

    def read_metrics(self) -> Iterator[dict[str, Any]]:
        """Complete lines of metrics.jsonl, in order; none where there is no file yet."""
        yield from _read_lines(self.metrics)

    def forget_metrics_after(self, step: int) -> None:
        """Drops what a run recorded beyond the checkpoint that it continues from, so that each step stands there once."""
        if not self.metrics.exists():
            return
        kept = [line for line in self.read_metrics() if line["step"] <= step]
        partial = self.metrics.with_suffix(".jsonl.partial")
        partial.write_text("".join(json.dumps(line) + "\n" for line in kept))
        os.replace(partial, self.metrics)

    def append_metrics(self, record: dict[str, Any]) -> None:
        """One JSON object a line; a reader sees whole lines only."""
        _append_line(self.metrics, record)

    def append_event(self, event: str, **details: Any) -> None:
        """What happened to the run (start, resume, save, skip, stop, end), with the time in seconds since 1970."""
        _append_line(self.events, {"time": time.time(), "event": event, **details})


def _append_line(path: Path, record: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab+") as file:
        # A killed process may have left half a line, which the next one must not be glued to.
        if file.tell() and (file.seek(-1, os.SEEK_END), file.read(1))[1] != b"\n":
            file.write(b"\n")
        file.write(json.dumps(record).encode() + b"\n")


def _read_lines(path: Path) -> Iterator[dict[str, Any]]:
    if not path.exists():
        return
    with path.open() as file:
        for line in file:
            # A killed process may leave half a line.
            with contextlib.suppress(json.JSONDecodeError):
                yield json.loads(line)
