"""`mega fabric pairs`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from launcher.output import Output
from launcher.verb import NumRanks
from launcher.verbs.fabric.reach import (
    Answer,
    DryRun,
    HostName,
    Interface,
    OutputFile,
    Rails,
    Reach,
    Timeout,
    TransportOption,
    ask,
    find_ranks,
    tell,
    write_json,
)
from launcher.verbs.fabric.sizes import words

if TYPE_CHECKING:
    from cluster.fabric.measured.fabric import MeasuredFabric

Size = Annotated[
    int, typer.Option("--bytes", min=2**16, help="Bytes of each transfer: below 1 MB a slow link hardly shows.")
]
Repeats = Annotated[int, typer.Option(min=1, help="How often each pair is measured; the median counts.")]


def pairs(
    out: Output,
    num_bytes: Size = 2**20,
    repeats: Repeats = 1,
    ranks: NumRanks = None,
    transport: TransportOption = "auto",
    host_name: HostName = None,
    interface: Interface = None,
    timeout: Timeout = 60.0,
    rails: Rails = False,
    output: OutputFile = None,
    dry_run: DryRun = False,
) -> int:
    """Measure every pair of hosts in both directions, disjoint pairs at once, and show the matrix. `diagnose` judges."""
    reach = Reach(
        ranks=ranks, transport=transport, host_name=host_name, interface=interface, timeout_s=timeout, rails=rails
    )
    if dry_run:
        place = find_ranks(reach, dry_run=True)
        lines = [f"Would send {words(num_bytes)} both ways between all pairs of the hosts of {place.num_ranks} ranks."]
        return tell(out, Answer(data={"ranks": place.num_ranks}, lines=lines)) if place.rank == 0 else 0
    given = [("--bytes", str(num_bytes)), ("--repeats", str(repeats))]
    given += [("--output", str(output.absolute()))] if output else []
    arguments = [word for option in given for word in option]
    arguments += ["--rails"] if rails else []
    return ask(out, ["fabric", "pairs"], reach, arguments, lambda fabric: _measure(fabric, num_bytes, repeats, output))


def _measure(fabric: MeasuredFabric, num_bytes: int, repeats: int, output: Path | None) -> Answer:
    from cluster.fabric.pairs import measure_pairs
    from cluster.fabric.report import heat_map
    from cluster.fabric.wording import rate

    measured = measure_pairs(fabric, num_bytes=num_bytes, repeats=repeats)
    data = measured.as_data()
    write_json(output, data)
    lines = [
        heat_map(data["pairs_bytes_per_s"], data["hosts"]),
        f"{measured.rounds} rounds, {measured.seconds:.1f} s; median {rate(measured.median_bytes_per_s)}",
    ]
    return Answer(data=data, lines=lines)
