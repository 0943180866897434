"""`mega fabric watch`."""

from __future__ import annotations

import time
from datetime import datetime
from typing import TYPE_CHECKING, Annotated

import typer

from launcher.output import Output
from launcher.verb import EXIT_REFUSED
from launcher.verbs.generate import Run

if TYPE_CHECKING:
    from cluster.fabric.watch.status import WatchStatus

Follow = Annotated[
    bool, typer.Option("--follow", help="Go on until the run ends, and say what is found as it is found.")
]

_LOOK_EVERY_S = 1.0


def watch(out: Output, run: Run, follow: Follow = False) -> int:
    """Say what each rank of a run is doing, and what its watch has found. Ends with 3 where it has found something."""
    from cluster.fabric.watch.status import status
    from launcher.run_record import find_run

    directory = find_run(run).root
    seen = status(directory)
    told = 0
    while follow and seen.running:
        told = _tell_findings(out, seen, told)
        time.sleep(_LOOK_EVERY_S)
        seen = status(directory)
    age = f"{max(0.0, time.time() - seen.updated):.0f} s ago"
    out.say(f"The run {'is being watched' if seen.running else 'has ended'}; last word {age}.")
    out.table(
        ("rank", "host", "state", "quiet for", "doing"),
        [(str(rank.rank), rank.host, rank.state, f"{max(0.0, rank.quiet_s):.1f} s", rank.doing) for rank in seen.ranks],
    )
    _tell_findings(out, seen, told)
    out.result(seen.as_data())
    return EXIT_REFUSED if seen.findings else 0


def _tell_findings(out: Output, seen: WatchStatus, told: int) -> int:
    """Says those that were not told yet, and returns how many are told now."""
    for each in seen.findings[told:]:
        out.say(f"{datetime.fromtimestamp(each.time):%H:%M:%S} {each.finding.sentence}")
    return len(seen.findings)
