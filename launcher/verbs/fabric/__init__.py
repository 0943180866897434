"""`mega fabric`: measure the network between ranks, and name what is wrong with it."""

from __future__ import annotations

from collections.abc import Callable

from launcher.verbs.fabric import baseline
from launcher.verbs.fabric.diagnose import diagnose
from launcher.verbs.fabric.pairs import pairs
from launcher.verbs.fabric.report import report
from launcher.verbs.fabric.simulate import simulate
from launcher.verbs.fabric.sweep import sweep
from launcher.verbs.fabric.watch import watch

VERBS: dict[str, Callable[..., int]] = {
    "diagnose": diagnose,
    "sweep": sweep,
    "pairs": pairs,
    "watch": watch,
    "report": report,
    "simulate": simulate,
}
BASELINE_VERBS = baseline.VERBS
