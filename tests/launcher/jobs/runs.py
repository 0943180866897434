"""Folders of runs, as supervisors and `mega train` leave them."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from launcher.jobs.job_record import JobFolder
from megamodel.train.json_lines import append_line
from megamodel.train.run_directory import RunDirectory

NOW = 1_700_000_000.0


class MadeRun:
    """A run whose records are written at will."""

    def __init__(self, root: Path, *, total_steps: int = 100) -> None:
        self.directory = RunDirectory(root)
        self.folder = JobFolder(self.directory)
        root.mkdir(parents=True)
        self.config = f"[train]\nsteps = {total_steps}\n"
        self.directory.config.write_text(self.config)

    def event(self, name: str, *, ago: float, **details: Any) -> None:
        """A line of events.jsonl, so many seconds before NOW."""
        append_line(self.directory.events, {"time": NOW - ago, "event": name, **details})

    def steps(self, first: int, last: int, *, ago: float, step_s: float = 2.0) -> None:
        """Steps, the last of which ended so many seconds before NOW."""
        for step in range(first, last + 1):
            line = {"time": NOW - ago - step_s * (last - step), "step": step, "loss": 5.0 - step / 100}
            line |= {"tokens_per_s": 1000.0 + step, "mfu": 0.4, "step_time_s": step_s, "data_s": 0.0, "save_s": 0.0}
            append_line(self.directory.metrics, line)

    def launched(self, *, ago: float, backend: str = "slurm", job_id: str | None = "17") -> None:
        """job.json."""
        self.folder.root.mkdir(exist_ok=True)
        self.folder.config.write_text(self.config)
        record = {"backend": backend, "job_id": job_id, "submitted": NOW - ago, "submitted_from": "login"}
        record |= {"nodes": 2, "earlier_job_ids": []}
        (self.folder.root / "job.json").write_text(json.dumps(record))

    def supervised(self, state: str, *, ago: float, **more: Any) -> None:
        """state.json. Its file is as old as the word in it."""
        data = {
            "state": state,
            "host": "n1",
            "pid": 7,
            "updated": NOW - ago,
            "attempt": 1,
            "hosts": ["n1", "n2"],
            **more,
        }
        path = self.folder.root / "state.json"
        path.write_text(json.dumps(data))
        self.age(path, ago)

    def age(self, path: Path, ago: float) -> None:
        """As if the file had been written so many seconds before NOW."""
        os.utime(path, (NOW - ago, NOW - ago))
