"""SLURM's programs, each call with a time-out: a controller that does not answer must hold nobody up."""

from __future__ import annotations

import asyncio
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime

from launcher.errors import RunError

CALL_SECONDS = 20.0
"""For one call. SLURM's own limit for a message is 10 s, and a call may take two of them."""
# How sinfo marks hosts that do not answer, or have no power.
_UNREACHABLE = "*~%"
_MARKS = "*~#!%$@^-+"
_UNUSABLE = {
    "down",
    "drain",
    "drained",
    "draining",
    "error",
    "fail",
    "failing",
    "future",
    "inval",
    "no_respond",
    "perfctrs",
    "powered_down",
    "powering_down",
    "power_down",
    "reboot",
    "unknown",
}


class NoAnswerError(RunError):
    """A program of SLURM ran into its time limit: nobody knows whether what it asked for is done."""


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What a program of SLURM said."""

    code: int
    out: str
    err: str

    @property
    def complaint(self) -> str:
        """In one line, without the program's name before each."""
        lines = [re.sub(r"^\w+: ((error|fatal): )?", "", line.strip()) for line in self.err.splitlines()]
        return "; ".join(filter(None, lines)) or self.out.strip() or f"exit code {self.code}"

    @property
    def is_lost(self) -> bool:
        """Whether it failed since the controller did not confirm in time: it may have done all the same what was asked."""
        return self.code != 0 and "timed out" in self.err.lower()


@dataclass(frozen=True, kw_only=True)
class JobInfo:
    """What `scontrol show job` says of a job."""

    state: str
    reason: str
    restarts: int
    """Starts after the first. Counts up when the job is to start again, while the earlier start still ends."""
    hosts: tuple[str, ...]
    """That it has now: lost ones are not among them any more."""
    excluded: str
    """Hosts that it is not to get, as SLURM writes them."""
    batch_host: str
    """Of the batch script."""
    ends_at: float
    """When SLURM ends it by force: its time limit, or the end of its grace time; in seconds since 1970; inf: not known,
    as of a job without a limit, be it in its grace time."""
    is_preempted: bool
    """Whether others shall have its hosts, and it is in its grace time."""


async def call(
    *command: str,
    input_text: str | None = None,
    environ: Mapping[str, str] | None = None,
    timeout_s: float = CALL_SECONDS,
) -> Answer:
    """Runs a program to its end. Raises RunError where it cannot be started, and NoAnswerError where it takes longer."""
    try:
        process = await asyncio.create_subprocess_exec(
            *command,
            stdin=asyncio.subprocess.DEVNULL if input_text is None else asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            env=None if environ is None else dict(environ),
        )
    except OSError as error:
        raise RunError(f"{command[0]} cannot be started: {error.strerror}") from error
    try:
        data = None if input_text is None else input_text.encode()
        out, err = await asyncio.wait_for(process.communicate(data), timeout_s)
    except TimeoutError:
        raise NoAnswerError(
            f"{command[0]} has not answered for {timeout_s:g} s: does SLURM's controller run?"
        ) from None
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    assert process.returncode is not None
    return Answer(code=process.returncode, out=out.decode(errors="replace"), err=err.decode(errors="replace"))


async def show_job(job_id: str, environ: Mapping[str, str] | None = None) -> JobInfo:
    """What SLURM knows of the job. Raises RunError where it does not know it, or does not answer."""
    answer = await call("scontrol", "--oneliner", "show", "job", job_id, environ=environ)
    if answer.code:
        raise RunError(f"job {job_id}: {answer.complaint}")
    return parse_job(answer.out)


def parse_job(text: str) -> JobInfo:
    """Of a line of `scontrol --oneliner show job`."""
    import hostlist

    def field(name: str) -> str:
        found = re.search(rf"(?:^|\s){name}=(\S*)", text)
        return "" if found is None or found[1] in ("(null)", "None", "N/A", "Unknown") else found[1]

    return JobInfo(
        state=field("JobState"),
        reason=field("Reason"),
        restarts=int(field("Restarts") or 0),
        hosts=tuple(hostlist.expand_hostlist(field("NodeList"))),
        excluded=field("ExcNodeList"),
        batch_host=field("BatchHost"),
        ends_at=_seconds(field("EndTime")),
        is_preempted=bool(field("PreemptTime")),
    )


def _seconds(local_time: str) -> float:
    """Since 1970; inf for what is no time."""
    try:
        return datetime.fromisoformat(local_time).timestamp()
    except ValueError:
        return math.inf


async def usable_hosts(hosts: tuple[str, ...], environ: Mapping[str, str] | None = None) -> tuple[str, ...]:
    """Those of `hosts` that answer SLURM, and that nobody has taken out of service. Raises RunError where SLURM does not tell."""
    import hostlist

    if not hosts:
        return ()
    listing = f"--nodes={hostlist.collect_hostlist(hosts)}"
    answer = await call("sinfo", "--all", "--Node", "--noheader", listing, "--format=%N|%T", environ=environ)
    if answer.code:
        raise RunError(f"sinfo: {answer.complaint}")
    states = dict(line.strip().split("|", 1) for line in answer.out.splitlines() if "|" in line)
    return tuple(host for host in hosts if is_usable(states.get(host, "unknown")))


def is_usable(state: str) -> bool:
    """Whether a host in this state of sinfo can take a step: `mixed`, `allocated`, `idle`, ..., but not `down*`."""
    base = state.rstrip(_MARKS)
    return base.lower() not in _UNUSABLE and not any(mark in state[len(base) :] for mark in _UNREACHABLE)


def environ_for_sbatch(environ: Mapping[str, str], directives: Mapping[str, str]) -> dict[str, str]:
    """What a job inherits: nothing of a job that surrounds the caller, and no SBATCH_ variable that would override a
    directive of the script."""
    overriding = {f"SBATCH_{name.upper().replace('-', '_')}" for name in directives}
    if "time" in directives:
        overriding.add("SBATCH_TIMELIMIT")
    keep = ("SLURM_CONF", "SLURM_CLUSTERS")
    return {
        name: value
        for name, value in environ.items()
        if name in keep or not (name.startswith("SLURM_") or name in overriding)
    }


def directives_of(script: str) -> dict[str, str]:
    """The long options of a batch script's #SBATCH lines."""
    found = re.findall(r"^#SBATCH[ \t]+--([\w-]+)(?:[= \t](.*))?$", script, re.MULTILINE)
    return dict(found)
