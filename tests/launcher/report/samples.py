"""A run with everything that a page can show."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from launcher.goodput.ledger import windows_file
from megamodel.train.json_lines import append_line
from tests.cluster.fabric.report.samples import STRAGGLER
from tests.launcher.goodput.story import Story


class FullStory(Story):
    """Its lines have all that a real run's have."""

    def line(self, **figures: Any) -> None:
        """With the figures of a mixture of experts that learns."""
        step = self.step
        if "loss" in figures:
            seconds, noise = figures["step_time_s"], math.sin(step * 12.9898) * 43758.5453 % 1
            figures |= {
                "loss": 2.0 + 6.0 * math.exp(-step / 15) + 0.1 * noise,
                "grad_norm": 1.0,
                "compute_s": 0.8 * (seconds - figures["data_s"]),
                "update_s": 0.2 * (seconds - figures["data_s"]),
                "tokens_per_s": 262_144 / seconds,
                "mfu": 0.41,
                "memory_bytes": 61 * 2**30 + step * 2**20,
                "expert_counts": [[100 + layer * 20 + step % 7, 100, 90, 80 - layer * 10] for layer in range(3)],
            }
        elif "val_loss" in figures:
            figures |= {"val_loss": 2.1 + 6.0 * math.exp(-step / 15), "val_bits_per_byte": 0.9}
        super().line(**figures)


def full_run(root: Path) -> FullStory:
    """Queued, launched, failed once with lost steps, preempted, and finished; with a straggler that was found."""
    story = FullStory(root=root)
    story.launched(queued_s=120.0)
    story.attempts()
    story.loads()
    story.trains(32)
    story.saves()
    story.loses(7)
    story.fails(after_s=3.0, at=story.clock + 1.0, rank=1, host="n2")
    story.event("exclude", host="n2", reason="was lost 2 times in a row")
    story.passes(4.0, "restarts")
    story.attempts()
    story.loads()
    story.trains(20)
    story.event("stop_asked", signal="SIGTERM", reason="preemption")
    story.stops()
    story.event("requeue", reason="preemption", without=["n2"])
    story.launched(queued_s=90.0)
    story.attempts()
    story.loads()
    story.trains(40)
    story.ends()
    story.event("done")
    for first in range(9, 49, 4):
        late = {"0": 0.0, "1": 0.02, "2": 0.3 if first > 24 else 0.03, "3": 0.05}
        times = {"wait_s": {"dp_shard": 0.1 + 0.01 * (first % 3)}, "network_s": {"dp_shard": 0.06}, "busy_s": {}}
        line = {"step": first + 3, "first_step": first, "step_s": 2.0, "late_s": late, "cost_share": 0.001, **times}
        append_line(windows_file(root), line)
    append_line(root / "fabric" / "findings.jsonl", {"time": story.clock, **STRAGGLER})
    (root / "config.toml").write_text("[train]\nsteps = 92\n")
    return story
