"""How a fabric verb reaches its ranks: those of the world that it was started in, or ranks that it starts here."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from launcher.errors import ConfigError, RankError
from launcher.fabric_place import fabric_place
from launcher.local_ranks import Grace, run_local_ranks
from launcher.mpi_meeting import meet_and_stay, no_meeting
from launcher.output import Output
from launcher.place import Place, find_place
from launcher.rank_environment import adopt
from launcher.rank_process import EXIT_INTERRUPTED, EXIT_STOPPED, failure_file

if TYPE_CHECKING:
    from cluster.fabric.measured.agent import Answer as RankAnswer
    from cluster.fabric.measured.fabric import MeasuredFabric
    from cluster.fabric.measured.place import FabricPlace

Transport = Literal["auto", "gloo", "nccl", "mpi"]

TransportOption = Annotated[
    Transport,
    typer.Option(help="What carries the data: `auto` is NCCL where each rank has a GPU, else gloo; `mpi` needs mpirun or srun."),
]  # fmt: skip
HostName = Annotated[
    str | None, typer.Option("--host-name", help="Name of this rank's host. Default: what `hostname` says.")
]
Leaf = Annotated[
    str | None,
    typer.Option("--leaf", help="Name of the switch that this rank's host hangs from. Default: what SLURM's topology says."),
]  # fmt: skip
Interface = Annotated[
    str | None, typer.Option(help="Network interface to measure, for gloo. Default: the one that leads to rank 0.")
]
Timeout = Annotated[
    float,
    typer.Option(min=1.0, help="Seconds that ranks wait for one another at the start; who has not come is missing."),
]
Rails = Annotated[
    bool, typer.Option("--rails", help="Measure every rank of a host as a rail of its own, not one a host.")
]
CountersRoot = Annotated[
    Path, typer.Option("--root", help="Folder below which network counters are read (sys, proc), such as a container's /host.")
]  # fmt: skip
OutputFile = Annotated[
    Path | None, typer.Option("--output", metavar="FILE", help="Write the result there too, as JSON.")
]
ExcludeFile = Annotated[
    Path | None,
    typer.Option("--exclude-file", help="Write the hosts to leave out, in SLURM's form (n[3,7-8]); empty where none is."),
]  # fmt: skip
DryRun = Annotated[bool, typer.Option("--dry-run", help="Say what would be measured among whom; measure nothing.")]

_LAST_WORDS_S = 60.0
"""How long the ranks may measure on after one of them has died: to find out, and to tell what else they know."""

_END_S = 5.0
"""How long the others may take to end once rank 0 has told what it found: one may be stopped for good."""

# Beside the ranks' logs: what rank 0 hands to the process that started it.
_ANSWER_NAME = "answer.json"


@dataclass(frozen=True, kw_only=True)
class Reach:
    """Among whom to measure, and by what."""

    ranks: int | None
    transport: Transport
    host_name: str | None
    timeout_s: float
    interface: str | None = None
    leaf: str | None = None
    rails: bool = False
    root: Path = Path("/")

    def as_arguments(self) -> list[str]:
        """These options for the ranks that this process starts, but for `--rails`, which not every verb has."""
        given = [
            ("--host-name", self.host_name),
            ("--interface", self.interface),
            ("--leaf", self.leaf),
            ("--root", None if self.root == Path("/") else str(self.root)),
        ]
        named = [word for name, value in given if value for word in (name, value)]
        return [*named, "--transport", self.transport, "--timeout", f"{self.timeout_s:g}"]


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What rank 0 found."""

    data: Mapping[str, Any]
    lines: Sequence[str] = field(default_factory=tuple)
    """For people."""
    exit_code: int = 0


def find_ranks(reach: Reach, *, dry_run: bool = False, may_be_alone: bool = False) -> Place:
    """This process's place; under srun or mpirun it takes torchrun's variables on first. Raises ConfigError for a lone rank,
    unless it `may_be_alone`.

    dry_run: nothing will be measured, and so ranks of MPI need not meet.
    """
    adopt(os.environ, meet_over_mpi=no_meeting if dry_run else meet_and_stay)
    place = find_place(os.environ, reach.ranks)
    if place.num_ranks < 2 and not may_be_alone:
        raise ConfigError(
            "one rank alone has no fabric: give --ranks N (N >= 2) to try it on this machine, or start one process a "
            "rank by torchrun, srun or mpirun"
        )
    if reach.transport == "mpi" and not place.joins:
        raise ConfigError("--transport mpi needs ranks that MPI has started: leave --ranks out, and use mpirun or srun")
    return place


def ask(
    out: Output,
    verb: Sequence[str],
    reach: Reach,
    arguments: Sequence[str],
    work: Callable[[MeasuredFabric], Answer],
    *,
    answer: Callable[[FabricPlace], RankAnswer] | None = None,
    may_be_alone: bool = False,
) -> int:
    """Has `work` measure on rank 0 of the ranks in reach, and tells what it found. Returns the exit code.

    `verb` are the words after `mega`, `arguments` the verb's own options, for ranks that have to be started; what they share is
    added here. Where a rank can `answer` questions, those come first, and ranks connect only for the first measurement.
    `may_be_alone`: whether `work` has something to tell of one rank.
    """
    found = find_ranks(reach, may_be_alone=may_be_alone)
    if not found.joins:
        return _in_children(out, [*verb, *arguments, *reach.as_arguments()], found.num_ranks, reach)
    from cluster.fabric.measured.fabric import run_on_fabric
    from cluster.fabric.measured.place import MeasureOptions

    options = MeasureOptions(
        transport=reach.transport,
        rails=reach.rails,
        start_timeout_s=reach.timeout_s,
        interface=reach.interface,
        counter_root=str(reach.root),
        lazy=answer is not None,
    )
    place = fabric_place(os.environ, host_name=reach.host_name, leaf=reach.leaf)
    told = run_on_fabric(place, options, work, answer=answer(place) if answer else None)
    if told is None:
        return 0
    if (failures := failure_file(os.environ)) is not None:
        text = json.dumps({"data": told.data, "lines": list(told.lines), "exit_code": told.exit_code})
        failures.with_name(_ANSWER_NAME).write_text(text, encoding="utf-8")
        return 0
    return tell(out, told)


def tell(out: Output, answer: Answer) -> int:
    """Says it, and returns its exit code."""
    for line in answer.lines:
        out.say(line)
    out.result(answer.data)
    return answer.exit_code


def write_json(path: Path | None, data: Mapping[str, Any]) -> None:
    """Into a file whose folder is made where it is missing; nothing without a path."""
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")


def write_exclude_file(path: Path, hosts: Sequence[str]) -> str:
    """Hosts in SLURM's form, in a file that is empty where there is none; returns a line for people."""
    import hostlist

    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"{hostlist.collect_hostlist(hosts)}\n" if hosts else "", encoding="utf-8")
    return f"Hosts to leave out, for `sbatch --exclude=$(cat {path})`: {', '.join(hosts) or 'none'}"


def _in_children(out: Output, arguments: Sequence[str], num_ranks: int, reach: Reach) -> int:
    """Starts the ranks. A rank that dies is what the others may be asked about: they get the time to find out."""
    from cluster.hardware import num_usable_cores

    with tempfile.TemporaryDirectory(prefix="mega-fabric-") as folder:
        answer_file = Path(folder) / _ANSWER_NAME
        failure = RankError("the ranks ended without a word of what they measured")
        try:
            code = run_local_ranks(
                [*arguments, "--ranks", str(num_ranks)],
                num_ranks=num_ranks,
                log_directory=Path(folder),
                environ=os.environ,
                num_cores=num_usable_cores(),
                say=lambda text: None,  # its words are of runs that save
                grace=Grace(own_end=reach.timeout_s + _LAST_WORDS_S, done=_END_S),
            )
            if code == EXIT_STOPPED:
                failure = RankError("interrupted, before anything was found", exit_code=EXIT_INTERRUPTED)
        except RankError as error:
            failure = error
        if not answer_file.exists():
            raise failure
        told = json.loads(answer_file.read_text(encoding="utf-8"))
    return tell(out, Answer(data=told["data"], lines=told["lines"], exit_code=told["exit_code"]))
