"""The first cause of a failed attempt, in words, from all that was seen of its end. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster.fabric.findings import Finding
from launcher.errors import ConfigError
from launcher.first_cause import earliness, failed_at, how_it_ended, signal_name
from launcher.jobs.agents.head import HostLost, RankEnded
from launcher.jobs.backends.starter import AGENTS_LOG
from launcher.jobs.supervision.attempt_end import Failure, FailureKind
from launcher.jobs.supervision.hang_tail import Hang
from launcher.verb import EXIT_REFUSED

_STARTERS = {"slurm": "srun", "mpi": "mpirun"}
"""By backend."""


@dataclass(frozen=True, kw_only=True)
class Scene:
    """What an attempt was doing when it failed."""

    num_ranks: int
    logs: Path
    """Its folder."""
    step: int | None
    """The last one that it has recorded."""
    doing: Mapping[int, str]
    """Where each rank was seen last: a collective, or a line of code."""

    def when(self, rank: int | None) -> str:
        """ " (after step 41; last seen in all_reduce of 64 MB on dp_shard)"."""
        step = "before a step was recorded" if self.step is None else f"after step {self.step}"
        doing = "" if rank is None else self.doing.get(rank, "")
        return f" ({step}; last seen in {doing})" if doing else f" ({step})"


@dataclass(frozen=True, kw_only=True)
class StarterEnd:
    """The program that started the agents has ended while ranks ran."""

    at: float
    """Seconds since 1970."""
    code: int
    words: str
    """What it complained of."""
    backend: str


def first_failure(
    failed: Sequence[RankEnded],
    lost: Sequence[HostLost],
    starter: StarterEnd | None,
    scene: Scene,
    *,
    silence_s: float,
) -> Failure | None:
    """The cause of all the rest; None where nothing has failed. `failed`: ranks that should not have ended as they did.

    What explains itself comes before what only follows from something, and an earlier thing before a later one. A host that
    is lost, and a starter that has ended, explain themselves. A host that fell silent did so `silence_s` before it was lost.
    """
    found = [(earliness(end), _of_rank(end, scene)) for end in failed]
    found += [
        ((False, False, _lost_since(host, silence_s)), of_lost_host(host, scene, silence_s=silence_s))
        for host in lost
        if host.ranks
    ]
    if starter is not None:
        found.append(((False, False, starter.at), _of_starter_end(starter, scene)))
    return min(found, key=lambda each: each[0], default=(None, None))[1]


def of_hang(hang: Hang, scene: Scene) -> Failure:
    """A hang that the watch has named."""
    finding = hang.finding
    rank = finding.ranks[0] if finding.ranks else None
    return Failure(
        kind="hang",
        message=f"the run hung{scene.when(None)}: {finding.sentence.rstrip('.')}",
        at=hang.at,
        rank=rank,
        host=finding.hosts[0] if finding.hosts else None,
        last_collective=collective_of(finding) or (scene.doing.get(rank) if rank is not None else None) or None,
        step=scene.step,
    )


def of_absence(absent: Sequence[str], hosts: Sequence[str], *, seconds: float, words: str) -> Failure:
    """Hosts whose agents have not come in time; `words` are their starter's."""
    who = f"host {absent[0]}" if len(absent) == 1 else f"hosts {', '.join(absent)}"
    said = f"; whoever starts them says: {words}" if words else ""
    # Where none came, the fault lies with none of them.
    some_came = len(absent) < len(hosts)
    return Failure(
        kind="never_came",
        message=f"{who} did not come within {seconds:g} s{said}",
        host=absent[0] if some_came else None,
        lost_hosts=tuple(absent) if some_came else (),
        are_missing=True,
    )


def of_starter(end: StarterEnd, blamed: Sequence[str], *, log: Path) -> Failure:
    """The starter of agents has ended too early; `blamed` are the hosts of which it complained. `log` holds all its words."""
    program = _STARTERS.get(end.backend, "the program that starts the hosts")
    code = end.code
    how = f"was killed by {signal_name(-code)}" if code < 0 else f"ended with exit code {code}"
    return Failure(
        kind="starter",
        message=f"{program} {how}" + (f": {end.words} (more in {log})" if end.words else ""),
        at=end.at,
        host=blamed[0] if blamed else None,
        lost_hosts=tuple(blamed),
        are_missing=True,
    )


def _of_starter_end(end: StarterEnd, scene: Scene) -> Failure:
    return of_starter(end, (), log=scene.logs / AGENTS_LOG)


def of_preflight(verdict: Mapping[str, Any], *, at: float) -> Failure:
    """The checks before the first step have said no; `verdict` is what rank 0 has written of them, which ended `at`."""
    sentences = [str(sentence) for sentence in verdict.get("sentences", ())] or ["it does not say why"]
    hosts = [str(host) for host in verdict.get("bad_hosts", ())]
    reasons = verdict.get("reasons", {})
    return Failure(
        kind="preflight",
        message=f"preflight: {' '.join(sentences)}",
        at=at,
        exit_code=EXIT_REFUSED,
        host=hosts[0] if hosts else None,
        bad_hosts={host: str(reasons.get(host, sentences[0])) for host in hosts},
        is_unanswered=bool(missed_ranks(verdict)),
    )


def missed_ranks(verdict: Mapping[str, Any]) -> frozenset[int]:
    """Ranks that did not answer, where preflight has nothing else against a start: why, it does not know."""
    errors = [finding for finding in verdict.get("findings", ()) if finding["severity"] == "error"]
    if any(finding["kind"] != "missing_rank" for finding in errors):
        return frozenset()
    return frozenset(rank for finding in errors for rank in finding["ranks"])


def collective_of(finding: Finding) -> str:
    """The collective of a finding, such as "all_reduce of 64 MB on dp_shard"; empty where it names none."""
    collective, axis = finding.evidence.get("collective"), finding.evidence.get("axis")
    return f"{collective} on {axis}" if collective and axis else str(collective or "")


def _of_rank(end: RankEnded, scene: Scene) -> Failure:
    kind: FailureKind = "exception" if end.record is not None else "signal" if end.code < 0 else "exit"
    return Failure(
        kind=kind,
        message=f"rank {end.rank} of {scene.num_ranks} on {end.host}{_one_line(how_it_ended(end))}{scene.when(end.rank)}",
        at=failed_at(end),
        # A wrong configuration, or a check that said no: but only a rank that says so itself means that by its exit code.
        exit_code=end.code if end.record is not None and end.code in (ConfigError.exit_code, EXIT_REFUSED) else 1,
        rank=end.rank,
        host=end.host,
        last_collective=scene.doing.get(end.rank) or None,
        step=scene.step,
        traceback=end.record.traceback if end.record is not None else "",
        log=scene.logs / f"rank-{end.rank}.log",
    )


def of_lost_host(lost: HostLost, scene: Scene, *, silence_s: float) -> Failure:
    """A host whose agent is gone. One that fell silent did so `silence_s` before it was given up."""
    seen = next((rank for rank in lost.ranks if scene.doing.get(rank)), None)
    return Failure(
        kind="host_lost",
        message=f"host {lost.host} was lost: {lost.why}{scene.when(seen)}",
        at=_lost_since(lost, silence_s),
        host=lost.host,
        last_collective=None if seen is None else scene.doing[seen],
        step=scene.step,
        lost_hosts=(lost.host,),
        are_missing=lost.silent,  # a connection that ends was ended by somebody there
    )


def _lost_since(lost: HostLost, silence_s: float) -> float:
    return lost.at - (silence_s if lost.silent else 0.0)


def _one_line(text: str) -> str:
    """A report of several problems has a heading, and a line for each."""
    heading, *others = text.splitlines()
    return " ".join((heading, "; ".join(line.strip() for line in others))) if others else text
