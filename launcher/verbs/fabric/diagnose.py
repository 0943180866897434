"""`mega fabric diagnose`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from launcher.output import Output
from launcher.verb import EXIT_REFUSED, NumRanks
from launcher.verbs.fabric.reach import (
    Answer,
    CountersRoot,
    DryRun,
    ExcludeFile,
    HostName,
    Interface,
    Leaf,
    OutputFile,
    Rails,
    Reach,
    Timeout,
    TransportOption,
    ask,
    find_ranks,
    tell,
    write_exclude_file,
    write_json,
)

if TYPE_CHECKING:
    from cluster.fabric.findings import Verdict
    from cluster.fabric.measured.fabric import MeasuredFabric

_MUCH_NOISE = 0.2
"""Standard deviation of a transfer, as a share: the least fault that has to be found is one of 20 %."""


def diagnose(
    out: Output,
    ranks: NumRanks = None,
    transport: TransportOption = "auto",
    host_name: HostName = None,
    interface: Interface = None,
    leaf: Leaf = None,
    timeout: Timeout = 60.0,
    rails: Rails = False,
    root: CountersRoot = Path("/"),
    exclude_file: ExcludeFile = None,
    output: OutputFile = None,
    dry_run: DryRun = False,
) -> int:
    """Measure what is needed to name what is wrong: a slow host, link, path or uplink, a missing rank. Ends with 3 then."""
    reach = Reach(
        ranks=ranks,
        transport=transport,
        host_name=host_name,
        interface=interface,
        leaf=leaf,
        timeout_s=timeout,
        rails=rails,
        root=root,
    )
    if dry_run:
        place = find_ranks(reach, dry_run=True)
        lines = [f"Would time compute, and transfers between pairs of hosts, among {place.num_ranks} ranks."]
        return tell(out, Answer(data={"ranks": place.num_ranks}, lines=lines)) if place.rank == 0 else 0
    files = [("--exclude-file", exclude_file), ("--output", output)]
    arguments = [word for name, path in files if path for word in (name, str(path.absolute()))]
    arguments += ["--rails"] if rails else []
    return ask(out, ["fabric", "diagnose"], reach, arguments, lambda fabric: _examine(fabric, exclude_file, output))


def _examine(fabric: MeasuredFabric, exclude_file: Path | None, output: Path | None) -> Answer:
    from cluster.fabric.diagnose import diagnose as diagnose_fabric
    from cluster.fabric.findings import hosts_to_exclude

    verdict = diagnose_fabric(fabric)
    write_json(output, verdict.as_data())
    lines = [*_sentences(verdict)]
    if exclude_file is not None:
        lines.append(write_exclude_file(exclude_file, hosts_to_exclude(verdict.findings)))
    return Answer(data=verdict.as_data(), lines=lines, exit_code=0 if verdict.healthy else EXIT_REFUSED)


def _sentences(verdict: Verdict) -> list[str]:
    lines = [finding.sentence for finding in verdict.findings]
    if verdict.healthy:
        lines.append("The fabric is healthy, as far as it was measured.")
    noise = verdict.details.get("noise_share", 0.0)
    if noise > _MUCH_NOISE:
        lines.append(
            f"Transfers differ by {noise:.0%} from one to the next: smaller faults may go unseen. Is anything else running?"
        )
    if verdict.beta_s_per_byte and verdict.alpha_s is not None:
        lines.append(
            f"Between two hosts: {8e-6 / verdict.beta_s_per_byte:,.0f} Mbit/s, {1e6 * verdict.alpha_s:,.0f} us to start a "
            f"message ({verdict.rounds} round(s), {verdict.seconds:.1f} s)."
        )
    return lines
