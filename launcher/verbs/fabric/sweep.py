"""`mega fabric sweep`."""

from __future__ import annotations

import datetime
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from launcher.errors import ConfigError
from launcher.output import Output
from launcher.verb import EXIT_REFUSED, NumRanks
from launcher.verbs.fabric.reach import (
    Answer,
    DryRun,
    HostName,
    Interface,
    OutputFile,
    Reach,
    Timeout,
    TransportOption,
    ask,
    find_ranks,
    tell,
    write_json,
)
from launcher.verbs.fabric.sizes import parse_names, parse_sizes, words

if TYPE_CHECKING:
    from cluster.fabric.groups import GroupSet
    from cluster.fabric.measured.fabric import MeasuredFabric
    from cluster.fabric.sweep import SweepPlan, SweepResult

Kinds = Annotated[
    str, typer.Option(help="Some of all_reduce,all_gather,reduce_scatter,all_to_all,broadcast,send_recv; or all.")
]
Sizes = Annotated[str, typer.Option(help="Bytes as nccl-tests count them: FIRST:LAST[:FACTOR], or a list. K, M, G.")]
MeshOption = Annotated[
    str | None,
    typer.Option("--mesh", help="Measure the groups of these mesh axes too, such as dp_shard=2,tp=4; beside the world."),
]  # fmt: skip
Modes = Annotated[
    str,
    typer.Option(
        help="isolated: one group at a time. together: all groups of an axis at once. with_compute: while computing too."
    ),
]
Iterations = Annotated[int, typer.Option(min=1, help="Timed collectives of each size; large ones may get fewer.")]


def sweep(
    out: Output,
    kinds: Kinds = "all",
    sizes: Sizes = "1K:16M:4",
    mesh: MeshOption = None,
    modes: Modes = "isolated,together",
    iterations: Iterations = 20,
    ranks: NumRanks = None,
    transport: TransportOption = "auto",
    host_name: HostName = None,
    interface: Interface = None,
    timeout: Timeout = 60.0,
    output: OutputFile = None,
    dry_run: DryRun = False,
) -> int:
    """Time collectives over sizes and groups: time, algbw and busbw as nccl-tests define them, and fitted alpha and beta."""
    reach = Reach(
        ranks=ranks, transport=transport, host_name=host_name, interface=interface, timeout_s=timeout, rails=True
    )
    place = find_ranks(reach, dry_run=dry_run)
    plan = _plan(kinds, sizes, mesh, modes, iterations, place.num_ranks)
    if dry_run:
        return tell(out, _what_would_run(plan)) if place.rank == 0 else 0
    given = [("--kinds", kinds), ("--sizes", sizes), ("--modes", modes), ("--iterations", str(iterations))]
    given += [("--mesh", mesh)] if mesh else []
    given += [("--output", str(output.absolute()))] if output else []
    arguments = [word for option in given for word in option]
    return ask(out, ["fabric", "sweep"], reach, arguments, lambda fabric: _measure(fabric, plan, output))


def _plan(kinds: str, sizes: str, mesh: str | None, modes: str, iterations: int, world_size: int) -> SweepPlan:
    from cluster.errors import FabricError
    from cluster.fabric.groups import mesh_groups, world_group
    from cluster.fabric.measured.transport import COLLECTIVE_KINDS
    from cluster.fabric.sweep import MODES, SweepPlan

    try:
        axes: tuple[GroupSet, ...] = mesh_groups(mesh, world_size) if mesh else ()
    except FabricError as error:
        raise ConfigError(str(error)) from error
    return SweepPlan(
        groups=(world_group(world_size), *axes),
        sizes=parse_sizes(sizes),
        kinds=COLLECTIVE_KINDS if kinds == "all" else parse_names("--kinds", kinds, COLLECTIVE_KINDS),
        modes=parse_names("--modes", modes, MODES),
        iterations=iterations,
    )


def _what_would_run(plan: SweepPlan) -> Answer:
    groups = {each.name: [list(ranks) for ranks in each.groups] for each in plan.groups}
    lines = [
        f"Would time {', '.join(plan.kinds)} of {', '.join(map(words, plan.sizes))} ({', '.join(plan.modes)}) on:",
        *(f"  {name}: {len(ranks)} group(s) of {len(ranks[0])}" for name, ranks in groups.items()),
    ]
    return Answer(data={"kinds": plan.kinds, "sizes": plan.sizes, "modes": plan.modes, "groups": groups}, lines=lines)


def _measure(fabric: MeasuredFabric, plan: SweepPlan, output: Path | None) -> Answer:
    import dataclasses

    from cluster.fabric.groups import rail_groups
    from cluster.fabric.sweep import sweep as sweep_fabric

    everybody = dataclasses.replace(plan, groups=(*plan.groups, *rail_groups(fabric.endpoints)))
    result = sweep_fabric(fabric, everybody, taken_at=datetime.datetime.now(datetime.UTC))
    data = {**result.as_data(), "circumstances": _circumstances()}
    write_json(output, data)
    return Answer(data=data, lines=_table(result), exit_code=0 if result.correct else EXIT_REFUSED)


def _circumstances() -> dict[str, str]:
    """What the figures belong to."""
    from importlib.metadata import version

    from cluster.hardware import this_machine

    return {
        "command": " ".join(["mega", *sys.argv[1:]]),
        "device": this_machine().device_name,
        "torch": version("torch"),
        "mega": version("mega"),
    }


def _table(result: SweepResult) -> list[str]:
    from cluster.fabric.wording import rate

    head = ("group", "mode", "collective", "size", "median", "p99", "algbw", "busbw", "")
    rows = [head] + [
        (
            row.group,
            row.mode,
            row.kind,
            words(row.num_bytes),
            f"{row.times.median_s * 1e3:.3f} ms",
            f"{row.times.p99_s * 1e3:.3f} ms",
            rate(row.algbw_bytes_per_s),
            rate(row.busbw_bytes_per_s),
            "" if row.correct else "WRONG DATA",
        )
        for row in result.rows
    ]
    widths = [max(map(len, cells)) for cells in zip(*rows)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows]
    for fit in result.fits:
        alpha, beta = fit.model.alpha_s, fit.model.beta_s_per_byte
        off = "" if alpha.reach is None else f" +- {alpha.reach * 1e6:.1f}"
        limit = rate(1 / beta.value) if beta.value > 0 else "beyond what was measured"
        lines.append(
            f"{fit.model.kind} on {fit.group}, {fit.mode}: alpha {alpha.value * 1e6:.1f}{off} us, 1/beta {limit}"
        )
    return lines
