"""Preflight, on rank 0 of ranks that have met: asks, compares, measures."""

from __future__ import annotations

import contextlib
import secrets
import shutil
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cluster.fabric.analysis.sentences import names_in_words
from cluster.fabric.diagnose import diagnose
from cluster.fabric.measured.fabric import MeasuredFabric
from cluster.fabric.probing import UnresponsiveError
from cluster.fabric.settings import DiagnosisSettings
from cluster.preflight.checks import (
    ClockOffset,
    card_findings,
    clock_findings,
    device_findings,
    disk_findings,
    fabric_findings,
    network_findings,
    sharing_findings,
)
from cluster.preflight.differences import Hosts, section_differences, without_all
from cluster.preflight.facts import FROM_RANK_0, SECTIONS, write_error
from cluster.preflight.verdict import PreflightFinding, PreflightVerdict

_ANSWER_S = 60.0
"""A device that nobody has used yet takes some seconds to begin, a slow file system too."""
_CLOCK_TRIES = 5
_SEEN_S, _SEEN_POLL_S = 3.0, 0.05
"""How long a file that was written elsewhere may take to show here: a network file system looks again after a while."""


@dataclass(frozen=True, kw_only=True)
class PreflightSettings:
    """What is looked at, and what is too much."""

    directory: Path
    """Where the run is written: every host must see the same there."""
    makes_directory: bool = True
    """Whether it is made where it is missing; else that is a finding."""
    max_clock_offset_s: float
    min_free_bytes: float
    measures_fabric: bool = True
    """Whether the fabric is measured: among several hosts, and on one whose ranks have GPUs."""
    diagnosis: DiagnosisSettings = field(default_factory=DiagnosisSettings.quick)


def run_preflight(fabric: MeasuredFabric, settings: PreflightSettings) -> PreflightVerdict:
    """All checks. `fabric` is lazy, so that ranks with other versions of torch are told before they would have to connect;
    every rank answers by a `RankFacts`. Raises FabricError where something cannot be measured at all."""
    return _Preflight(fabric, settings).run()


def tell_ranks(fabric: MeasuredFabric, verdict: PreflightVerdict) -> None:
    """Hands the outcome to the `RankFacts` of all ranks that are still there."""
    fabric.announce({"ask": "verdict", "ok": verdict.ok, "sentences": [one.sentence for one in verdict.errors]})


class _Preflight:
    """One preflight: what was found so far."""

    def __init__(self, fabric: MeasuredFabric, settings: PreflightSettings) -> None:
        self._fabric = fabric
        self._settings = settings
        self._hosts: Hosts = fabric.hosts
        first: dict[str, int] = {}
        for rank, host in self._hosts.items():
            first.setdefault(host, rank)
        self._leaders: Hosts = {rank: host for host, rank in first.items()}
        """The lowest rank of each host, which speaks for it."""
        self._findings: list[PreflightFinding] = []
        self._begin = time.monotonic()
        self._seconds: dict[str, float] = {}
        ranks_of = {host: [rank for rank, name in self._hosts.items() if name == host] for host in first}
        self._details: dict[str, Any] = {"hosts": ranks_of, "stage_seconds": self._seconds}

    def run(self) -> PreflightVerdict:
        try:
            with self._timed("ranks"):
                self._compare_ranks()
            with self._timed("files"):
                self._look_at_files()
            with self._timed("clocks"):
                self._compare_clocks()
        except UnresponsiveError as error:
            self._findings.append(self._missing(error))
            self._details["fabric"] = {"skipped": "ranks are missing"}
        else:
            with self._timed("fabric"):
                self._details["fabric"] = self._measure_fabric()
        return PreflightVerdict(
            findings=tuple(self._findings), seconds=time.monotonic() - self._begin, details=self._details
        )

    @contextlib.contextmanager
    def _timed(self, stage: str) -> Iterator[None]:
        begin = time.monotonic()
        try:
            yield
        finally:
            self._seconds[stage] = time.monotonic() - begin

    def _ask(self, ranks: Hosts, during: str, **question: Any) -> dict[int, dict[str, Any]]:
        """All at once the same."""
        return self._fabric.question(dict.fromkeys(ranks, question), timeout_s=_ANSWER_S, during=during)

    def _compare_ranks(self) -> None:
        """Versions, sources, packages, environment, devices and networks, as each rank tells them."""
        said = self._ask(self._hosts, "comparing versions and devices", ask="rank")
        for section in SECTIONS:
            hashes = {rank: answer["hashes"][section] for rank, answer in said.items()}
            one_of_each = {found: rank for rank, found in sorted(hashes.items(), reverse=True)}
            if len(one_of_each) > 1:
                asked = {rank: self._hosts[rank] for rank in one_of_each.values()}
                told = self._ask(asked, f"comparing {section}", ask="section", section=section)
                values = {rank: told[one_of_each[found]]["values"] for rank, found in hashes.items()}
                self._findings += section_differences(section, values, self._hosts)
        self._findings += device_findings({rank: answer["device"] for rank, answer in said.items()}, self._hosts)
        networks = {rank: said[rank]["network"] for rank in self._leaders}
        self._findings += network_findings(networks, self._leaders)
        self._details["versions"] = self._ask({0: ""}, "reading versions", ask="section", section="versions")[0][
            "values"
        ]
        self._details["devices"] = {host: said[rank]["device"] for rank, host in self._leaders.items()}
        self._details["network"] = {self._leaders[rank]: network for rank, network in networks.items()}
        self._has_gpus = all(answer["device"]["name"] for answer in said.values())

    def _look_at_files(self) -> None:
        """Free space, one folder for all hosts; and what nvidia-smi says, since it is asked of the same ranks."""
        directory, nonce = self._settings.directory, secrets.token_hex(8)
        names = {rank: f"from-rank-{rank}" for rank in self._leaders}
        folder = directory / f".preflight-{nonce}"
        own_error = ""
        try:
            folder.mkdir(parents=self._settings.makes_directory)
        except OSError as error:
            own_error = error.strerror or str(error)
        try:
            own_error = own_error or write_error(folder / FROM_RANK_0, nonce)
            common = {
                "ask": "host",
                "directory": str(directory.absolute()),
                "folder": None if own_error else folder.name,
                "nonce": nonce,
                "cards": self._has_gpus,
            }
            questions = {rank: {**common, "name": f"{name}.txt"} for rank, name in names.items()}
            said = self._fabric.question(questions, timeout_s=_ANSWER_S, during="looking at the run's folder")
            problems = {rank: _problem(answer, folder.name) for rank, answer in said.items()}
            if own_error:
                problems[0] = f"cannot write there ({own_error})"
            else:
                written = {rank: folder / f"{names[rank]}.txt" for rank, problem in problems.items() if not problem}
                problems |= dict.fromkeys(_unseen(written, nonce), "writes there, and rank 0's host does not see it")
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        where = str(directory)
        free = {rank: answer["free_bytes"] for rank, answer in said.items()}
        self._findings += sharing_findings(problems, self._leaders, directory=where)
        self._findings += disk_findings(free, self._leaders, directory=where, least_bytes=self._settings.min_free_bytes)
        self._findings += card_findings({rank: answer["cards"] for rank, answer in said.items()}, self._leaders)
        self._details["free_bytes"] = {self._leaders[rank]: count for rank, count in free.items()}

    def _compare_clocks(self) -> None:
        best: dict[int, ClockOffset] = {}
        for _ in range(_CLOCK_TRIES):
            sent, begin = time.time(), time.monotonic()
            said = self._ask(self._leaders, "comparing clocks", ask="clock")
            round_trip_s = time.monotonic() - begin
            for rank, answer in said.items():
                offset = answer["time"] - (sent + 0.5 * round_trip_s)
                if rank not in best or 0.5 * round_trip_s < best[rank].uncertainty_s:
                    best[rank] = ClockOffset(seconds=offset, uncertainty_s=0.5 * round_trip_s)
        self._findings += clock_findings(best, self._leaders, most_s=self._settings.max_clock_offset_s)
        self._details["clock_offset_s"] = {self._leaders[rank]: offset.seconds for rank, offset in best.items()}

    def _measure_fabric(self) -> Mapping[str, Any]:
        """The diagnosis as data, or why there is none."""
        if not self._settings.measures_fabric:
            return {"skipped": "it is switched off"}
        if len(self._leaders) < 2 and not (self._has_gpus and len(self._hosts) > 1):
            return {"skipped": "all ranks are on one host"}
        if any(finding.kind == "version" for finding in self._findings):
            return {"skipped": "ranks with different versions may not understand one another"}
        verdict = diagnose(self._fabric, self._settings.diagnosis)
        self._findings += fabric_findings(verdict.findings, self._hosts)
        return verdict.as_data()

    def _missing(self, error: UnresponsiveError) -> PreflightFinding:
        # Of ranks that never came only the launcher knows the hosts, if anybody.
        names = tuple(dict.fromkeys(self._hosts[rank] for rank in error.ranks if rank in self._hosts))
        numbers = names_in_words([str(rank) for rank in error.ranks])
        several = len(error.ranks) > 1
        on = f" ({names_in_words(names)})" if names else ""
        return PreflightFinding(
            kind="missing_rank",
            hosts=names,
            ranks=error.ranks,
            bad_hosts=without_all(names, self._hosts),
            sentence=f"Rank{'s' * several} {numbers}{on} did not answer during {error.during}: gone, stopped, or cut off. Look "
            f"at the end{'s' * several} of {'their logs' if several else 'its log'}, and at the host{'s' * (len(names) > 1)}.",
            evidence={"during": error.during},
        )


def _problem(answer: Mapping[str, Any], folder: str) -> str:
    """What a host cannot do, in words that follow its name; empty where it can."""
    if answer["read_error"]:
        return f"does not see what rank 0 wrote to {folder} there ({answer['read_error']})"
    return f"cannot write there ({answer['write_error']})" if answer["write_error"] else ""


def _unseen(written: Mapping[int, Path], nonce: str) -> list[int]:
    """Ranks whose files do not show here in time."""
    deadline = time.monotonic() + _SEEN_S
    waiting = dict(written)
    while waiting:
        waiting = {rank: path for rank, path in waiting.items() if not _reads(path, nonce)}
        if time.monotonic() > deadline:
            break
        if waiting:
            time.sleep(_SEEN_POLL_S)
    return list(waiting)


def _reads(path: Path, nonce: str) -> bool:
    try:
        return path.read_text(encoding="ascii") == nonce
    except (OSError, ValueError):
        return False
