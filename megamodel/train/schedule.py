"""Learning-rate schedules: a pure function of the step."""

from __future__ import annotations

import math

from megamodel.train.config import ScheduleConfig


def learning_rate_factor(config: ScheduleConfig, step: int, total_steps: int) -> float:
    """Factor on every peak learning rate at `step` (1 is the first, total_steps the last)."""
    if step <= config.warmup_steps:
        return step / config.warmup_steps
    if config.name == "constant":
        return 1.0
    if config.name == "cosine":
        progress = (step - config.warmup_steps) / max(1, total_steps - config.warmup_steps)
        share = 0.5 * (1.0 + math.cos(math.pi * min(1.0, progress)))
    else:
        # Warmup-stable-decay (Hu et al. 2024, MiniCPM, eq. 1) with a linear end.
        decay_steps = max(1, round(config.decay_fraction * total_steps))
        share = min(1.0, max(0.0, (total_steps - step) / decay_steps))
    return config.final_factor + (1.0 - config.final_factor) * share
