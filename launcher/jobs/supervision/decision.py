"""What follows from a failed attempt: another one, or the end of the job. Pure."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from launcher.errors import ConfigError
from launcher.jobs.config import LaunchConfig
from launcher.jobs.supervision.attempt_end import Failure
from launcher.verb import EXIT_REFUSED

_LONGEST_DELAY_SECONDS = 60.0
_LOSSES_TO_EXCLUDE = 2


@dataclass(frozen=True, kw_only=True)
class Decision:
    """What the supervisor does next."""

    restarts: bool
    cause: str
    """Why the attempt, or the job, has ended."""
    attempts_without_progress: int
    """In a row, this one included."""
    exclude: Mapping[str, str] = field(default_factory=dict)
    """Hosts that are not to be used any more, with the reason."""
    delay_s: float = 0.0
    """Before the next attempt."""
    exit_code: int = 1
    """Of a job that ends."""


def decide(
    failure: Failure,
    *,
    launch: LaunchConfig,
    attempts_without_progress: int,
    has_progressed: bool,
    losses: Mapping[str, int],
    can_do_without: Callable[[str], bool],
    least_delay_s: float = 0.0,
) -> Decision:
    """`attempts_without_progress` does not count this one yet; it `has_progressed` where it left a newer checkpoint.
    `losses` says how often in a row each host was lost in its attempts, this one included; `can_do_without` whether enough
    others are left; `least_delay_s` is the first delay before another attempt, if that of the configuration is less."""
    count = 0 if has_progressed else attempts_without_progress + 1
    if failure.kind == "preflight":
        if not failure.bad_hosts or launch.preflight.on_bad_host != "exclude":
            return Decision(
                restarts=False, cause=failure.message, attempts_without_progress=count, exit_code=EXIT_REFUSED
            )
        if not failure.is_unanswered:
            # It has found a way on, so it is no attempt without progress.
            return Decision(
                restarts=True,
                cause=failure.message,
                attempts_without_progress=attempts_without_progress,
                exclude=failure.bad_hosts,
            )
        # What made ranks silent may follow them to any host.
        return _again(failure, launch, count, failure.bad_hosts, least_delay_s)
    exclude = {
        host: f"was lost {losses[host]} times in a row"
        for host in failure.lost_hosts
        if losses.get(host, 0) >= _LOSSES_TO_EXCLUDE and can_do_without(host)
    }
    if failure.exit_code in (ConfigError.exit_code, EXIT_REFUSED):
        # A wrong configuration, or a check that said no: the next attempt would say the same.
        return Decision(
            restarts=False, cause=failure.message, attempts_without_progress=count, exit_code=failure.exit_code
        )
    return _again(failure, launch, count, exclude, least_delay_s)


def _again(
    failure: Failure, launch: LaunchConfig, count: int, exclude: Mapping[str, str], least_delay_s: float
) -> Decision:
    """Another attempt, as long as there are not too many without progress."""
    if count >= launch.max_attempts_without_progress:
        return Decision(
            restarts=False,
            cause=without_progress(failure.message, count),
            attempts_without_progress=count,
            exclude=exclude,
        )
    return Decision(
        restarts=True,
        cause=failure.message,
        attempts_without_progress=count,
        exclude=exclude,
        delay_s=restart_delay(max(launch.restart_delay_seconds, least_delay_s), count),
    )


def without_progress(cause: str, count: int) -> str:
    """The cause of a job that ends because attempts brought nothing; `cause` is that of the last one."""
    attempts = "1 attempt" if count == 1 else f"{count} attempts in a row"
    return f"{cause}; {attempts} without a new checkpoint"


def restart_delay(first: float, attempts_without_progress: int) -> float:
    """Seconds before the next attempt: doubled with each attempt without progress after the first, up to a minute."""
    doublings = min(max(0, attempts_without_progress - 1), 30)
    return min(first * 2.0**doublings, max(first, _LONGEST_DELAY_SECONDS))
