"""What a rank of a launched job does before anything else: settles its network, and is looked at together with all others."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Collection, Iterator, Mapping, MutableMapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launcher.fabric_place import fabric_place
from launcher.jobs.agents.protocol import ATTEMPT, CHOSEN, PREFLIGHT

if TYPE_CHECKING:
    from cluster.fabric.measured.fabric import MeasuredFabric
    from cluster.fabric.measured.place import FabricPlace
    from cluster.network_settings import NetworkChoice, Wanted
    from cluster.preflight.facts import RankFacts
    from cluster.preflight.verdict import PreflightVerdict
    from launcher.config import RunConfig

OWN_PACKAGES = ("launcher", "megamodel", "parallel", "data_pipeline", "cluster")
_GB = 1e9


@contextlib.contextmanager
def preflighted(environ: MutableMapping[str, str], config: RunConfig, *, say: Callable[[str], None]) -> Iterator[None]:
    """Around a rank's training, before anything of torch.distributed. Does nothing where no launched job started this rank.

    Adds to `environ`, which must be that of this process, the settings of the network that the job is to use. Where
    MEGA_PREFLIGHT names a file, all ranks meet, and rank 0 writes the verdict there. `say` gets lines for people, on rank 0.

    Raises PreflightError (exit code 3) on all ranks that can be told, where the verdict is no and
    launch.preflight.on_bad_host is not "warn"; NetworkError where there is no preflight to tell that this host lacks the
    network that is asked for; FabricError where ranks cannot meet.
    """
    if not {ATTEMPT, PREFLIGHT} & environ.keys() or "RANK" not in environ:
        yield
        return
    from cluster.errors import NetworkError

    place = fabric_place(environ)
    choice: NetworkChoice | None = None
    network: dict[str, Any] = {}
    try:
        choice = _settle_network(environ, config, place.host)
    except NetworkError as error:
        if PREFLIGHT not in environ:
            raise
        network = {"error": str(error)}  # which the others, and the supervisor, are to hear of
    if choice is not None and place.rank == 0:
        for note in choice.notes:
            say(note)
    if PREFLIGHT not in environ:
        yield
        return
    network = network if choice is None else choice.as_data()
    chosen = () if choice is None else choice.environment
    facts = _facts(environ, place, network, chosen=chosen, device=config.run.device)
    from cluster.fabric.measured.meeting import keep_meeting_point
    from cluster.fabric.measured.place import MeasureOptions

    options = MeasureOptions(
        transport="gloo" if config.run.device == "cpu" else "auto",
        start_timeout_s=config.launch.start_timeout_seconds,
        lazy=True,
    )
    # The ranks meet here again to train. One that is ahead of rank 0 must come to the same store then.
    kept = keep_meeting_point(place, options)
    _look(place, options, facts, config, Path(environ[PREFLIGHT]), say)
    yield
    del kept


def describe_rank(place: FabricPlace, *, root: Path = Path("/")) -> RankFacts:
    """What this rank says of itself, where no job has settled its network: what `launch.network = "auto"` would choose."""
    from cluster.errors import NetworkError

    try:
        choice = network_of(os.environ, "auto", place.host, root=root)
    except NetworkError as error:
        return _facts(os.environ, place, {"error": str(error)})
    return _facts(os.environ, place, {} if choice is None else choice.as_data())


def network_of(
    environ: Mapping[str, str], wanted: Wanted, host: str, *, on_gpus: bool = True, root: Path = Path("/")
) -> NetworkChoice | None:
    """What the ranks of this host are to use between hosts; None where all ranks are on it. Raises NetworkError."""
    if environ.get("LOCAL_WORLD_SIZE", environ["WORLD_SIZE"]) == environ["WORLD_SIZE"]:
        return None
    from cluster.network_settings import choose_network, interface_towards

    interface = interface_towards(environ.get("MASTER_ADDR", ""), root=root)
    return choose_network(wanted, environ, host=host, interface=interface, on_gpus=on_gpus, root=root)


def _facts(
    environ: Mapping[str, str],
    place: FabricPlace,
    network: Mapping[str, Any],
    *,
    chosen: Collection[str] = (),
    device: str | None = None,
) -> RankFacts:
    from cluster.preflight.facts import RankFacts

    return RankFacts(
        environ=dict(environ),
        packages=OWN_PACKAGES,
        local_rank=place.local_rank,
        network=network,
        not_compared=(*chosen, *environ.get(CHOSEN, "").split(",")),
        device=device,
    )


def _settle_network(environ: MutableMapping[str, str], config: RunConfig, host: str) -> NetworkChoice | None:
    choice = network_of(environ, config.launch.network, host, on_gpus=config.run.device != "cpu")
    if choice is not None:
        environ.update(choice.environment)
    return choice


def _look(
    place: FabricPlace,
    options: Any,
    facts: RankFacts,
    config: RunConfig,
    path: Path,
    say: Callable[[str], None],
) -> None:
    """The preflight itself. Raises PreflightError on rank 0, and on the others where they have been told."""
    from cluster.errors import PreflightError
    from cluster.fabric.measured.fabric import run_on_fabric
    from cluster.preflight.run import PreflightSettings, run_preflight, tell_ranks

    limits = config.launch.preflight
    settings = PreflightSettings(
        directory=config.run_directory,
        max_clock_offset_s=limits.max_clock_offset_seconds,
        min_free_bytes=limits.min_free_disk_gb * _GB,
        measures_fabric=limits.fabric,
    )

    def work(fabric: MeasuredFabric) -> PreflightVerdict:
        verdict = run_preflight(fabric, settings)
        # Before the others hear of it: their end is to be understood by this.
        _write(path, verdict.as_data())
        tell_ranks(fabric, verdict)
        return verdict

    verdict = run_on_fabric(place, options, work, answer=facts.answer)
    _free_device_memory()
    for line in in_words(verdict) if verdict is not None else ():
        say(line)
    refused = facts.verdict is not None and not facts.verdict["ok"]
    if refused and limits.on_bad_host != "warn":
        raise PreflightError(f"preflight: {' '.join((facts.verdict or {})['sentences'])}")


def in_words(verdict: PreflightVerdict) -> list[str]:
    """A line for each finding, and one for the whole."""
    lines = [finding.sentence for finding in verdict.errors]
    lines += [f"warning: {finding.sentence}" for finding in verdict.warnings]
    hosts: Mapping[str, Any] = verdict.details["hosts"]
    ranks = sum(map(len, hosts.values()))
    found = "nothing is wrong" if verdict.ok else "something is wrong"
    count = f"{ranks} rank{'s' * (ranks > 1)} on {len(hosts)} host{'s' * (len(hosts) > 1)}"
    return [*lines, f"Preflight of {count}: {found} ({verdict.seconds:.1f} s)."]


def _free_device_memory() -> None:
    """What was measured with is of no use to training."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _write(path: Path, data: Mapping[str, Any]) -> None:
    """Whole or not at all: who waits for it may read at any time."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    os.replace(partial, path)
