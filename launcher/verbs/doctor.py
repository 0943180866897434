"""`mega doctor`."""

from __future__ import annotations

import os
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from launcher.errors import ConfigError
from launcher.output import Output
from launcher.verb import EXIT_REFUSED, NumRanks
from launcher.verbs.fabric.reach import (
    Answer,
    CountersRoot,
    ExcludeFile,
    HostName,
    Leaf,
    OutputFile,
    Reach,
    Timeout,
    TransportOption,
    ask,
    write_exclude_file,
    write_json,
)

if TYPE_CHECKING:
    from cluster.fabric.measured.fabric import MeasuredFabric
    from cluster.fabric.measured.place import FabricPlace
    from cluster.preflight.verdict import PreflightVerdict

Cluster = Annotated[
    bool,
    typer.Option(
        "--cluster",
        help="Look at all hosts instead, and at the network between them, as before a run: under srun, torchrun or mpirun, or "
        "with --ranks N; else at this host alone. Ends with 3 where something is wrong.",
    ),
]
Directory = Annotated[
    Path | None,
    typer.Option(help="With --cluster: a folder that is there, which all hosts must share. Default: the working directory."),
]  # fmt: skip
NoFabric = Annotated[bool, typer.Option("--no-fabric", help="With --cluster: do not measure the network.")]
_TIMEOUT_S = 60.0
_GB = 1e9


def doctor(
    out: Output,
    cluster: Cluster = False,
    ranks: NumRanks = None,
    directory: Directory = None,
    no_fabric: NoFabric = False,
    transport: TransportOption = "auto",
    host_name: HostName = None,
    leaf: Leaf = None,
    timeout: Timeout = _TIMEOUT_S,
    root: CountersRoot = Path("/"),
    exclude_file: ExcludeFile = None,
    output: OutputFile = None,
) -> int:
    """Report devices, backends, versions, memory and disk of this machine, with the mend for each thing missing."""
    reach = Reach(ranks=ranks, transport=transport, host_name=host_name, leaf=leaf, timeout_s=timeout, root=root)
    if cluster:
        return _examine_cluster(out, reach, directory or Path.cwd(), not no_fabric, exclude_file, output)
    given = {
        "--ranks": ranks is not None,
        "--directory": directory is not None,
        "--no-fabric": no_fabric,
        "--transport": transport != "auto",
        "--host-name": host_name is not None,
        "--leaf": leaf is not None,
        "--timeout": timeout != _TIMEOUT_S,
        "--root": root != Path("/"),
        "--exclude-file": exclude_file is not None,
        "--output": output is not None,
    }
    if names := [name for name, is_given in given.items() if is_given]:
        raise ConfigError(f"{', '.join(names)} means something only with --cluster: add that, or leave it out")
    return _examine_machine(out)


def _examine_machine(out: Output) -> int:
    from cluster.hardware import this_machine
    from launcher.diagnosis import diagnose

    hardware = this_machine()
    findings = list(diagnose(hardware, directory=Path.cwd()))
    out.table(
        ("", "what", "found", "mend"),
        [(finding.state, finding.subject, finding.detail, finding.mend) for finding in findings],
    )
    missing = [finding.subject for finding in findings if finding.state == "missing"]
    out.say(f"Missing: {', '.join(missing)}." if missing else "Runs will work here.")
    out.result(
        {"ok": not missing, "device": hardware.device_name, "findings": [asdict(finding) for finding in findings]}
    )
    return EXIT_REFUSED if missing else 0


def _examine_cluster(
    out: Output, reach: Reach, directory: Path, measures_fabric: bool, exclude_file: Path | None, output: Path | None
) -> int:
    from launcher.rank_environment import is_rank
    from launcher.rank_preflight import describe_rank

    # What is missing on one host of several is a finding; a word that is wrong for all is the user's.
    if not is_rank(os.environ) and not directory.is_dir():
        raise ConfigError(f"--directory {directory}: there is no such folder; make it first, or name one that is there")

    def work(fabric: MeasuredFabric) -> Answer:
        from cluster.preflight.run import PreflightSettings, run_preflight
        from launcher.jobs.config import PreflightConfig
        from launcher.rank_preflight import in_words

        limits = PreflightConfig()
        settings = PreflightSettings(
            directory=directory,
            max_clock_offset_s=limits.max_clock_offset_seconds,
            min_free_bytes=limits.min_free_disk_gb * _GB,
            measures_fabric=measures_fabric,
            makes_directory=False,
        )
        verdict = run_preflight(fabric, settings)
        write_json(output, verdict.as_data())
        lines = [*in_words(verdict), *_seen(verdict)]
        if exclude_file is not None:
            lines.append(write_exclude_file(exclude_file, verdict.bad_hosts))
        return Answer(data=verdict.as_data(), lines=lines, exit_code=0 if verdict.ok else EXIT_REFUSED)

    def answer(place: FabricPlace) -> Any:
        return describe_rank(place, root=reach.root).answer

    files = [("--exclude-file", exclude_file), ("--output", output), ("--directory", directory)]
    arguments = ["--cluster", *(word for name, path in files if path for word in (name, str(path.absolute())))]
    arguments += [] if measures_fabric else ["--no-fabric"]
    return ask(out, ["doctor"], reach, arguments, work, answer=answer, may_be_alone=True)


def _seen(verdict: PreflightVerdict) -> list[str]:
    """What the hosts have in common, for people: nothing here is wrong that is not among the findings."""
    details = verdict.details
    lines = []
    if "versions" in details:
        lines.append("Versions: " + ", ".join(f"{name} {value}" for name, value in details["versions"].items()) + ".")
    kinds = sorted({network.get("kind", "none") for network in details.get("network", {}).values()} - {"none"})
    if kinds:
        lines.append(f"Network between hosts: {', '.join(kinds)}.")
    if offsets := details.get("clock_offset_s"):
        lines.append(f"Clocks are at most {max(offsets.values()) - min(offsets.values()):.3f} s apart.")
    if free := [count for count in details.get("free_bytes", {}).values() if count is not None]:
        lines.append(f"At least {min(free) / _GB:,.0f} GB are free.")
    fabric = details["fabric"]
    if sum(map(len, details["hosts"].values())) == 1:
        lines.append(
            "The network was not measured: one rank alone has none. Give --ranks N (N >= 2) to try it on this machine, or start "
            "a process on each host by srun, torchrun or mpirun."
        )
    elif "skipped" in fabric:
        lines.append(f"The network was not measured: {fabric['skipped']}.")
    elif fabric["beta_s_per_byte"] and fabric["alpha_s"] is not None:
        rate, start = 8e-6 / fabric["beta_s_per_byte"], 1e6 * fabric["alpha_s"]
        lines.append(f"Between two hosts: {rate:,.0f} Mbit/s, {start:,.0f} us to start a message.")
    return lines
