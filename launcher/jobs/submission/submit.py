"""Puts a job into SLURM's queue, once: the script, the configuration as it is now, and the record of it."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from launcher.config import resolved_toml
from launcher.errors import ConfigError, RunError
from launcher.jobs.job_record import JobFolder, JobRecord
from launcher.jobs.slurm.client import Answer, NoAnswerError, call, directives_of, environ_for_sbatch
from launcher.jobs.submission.free_run import check_is_free, find_submitted
from launcher.jobs.submission.plan import LaunchPlan
from launcher.run_lock import LOCK_NAME, locked_run
from megamodel.train.run_directory import RunDirectory

_SUBMIT_SECONDS = 60.0
# What sbatch --test-only says of what cannot run, and also of what could if all hosts were up; sbatch itself tells them apart.
_MAY_BE_FOR_NOW = (
    "Requested node configuration is not available",
    "Required node not available",
    "Required partition not available",
)
# What clients say where there is SLURM, and no cluster that answers.
_NO_CLUSTER = ("Could not establish a configuration source", "Unable to contact slurm controller")
_OUT_OF_SERVICE = "down,drain,fail,no_respond,maint,powering_down,powered_down,unknown"


def try_submission(script: str, environ: Mapping[str, str]) -> str:
    """What `sbatch --test-only` says of the script, in one line. It queues nothing.

    Raises ConfigError where SLURM would not take the job, RunError where it does not answer.
    """
    answer = _sbatch("--test-only", script=script, environ=environ)
    if answer.code == 0:
        return answer.complaint
    if any(words in answer.err for words in _NO_CLUSTER):
        raise RunError(f"no SLURM cluster answers here ({answer.complaint}): run this where jobs are submitted")
    if any(words in answer.err for words in _MAY_BE_FOR_NOW) and (down := _hosts_out_of_service(script, environ)):
        return f"{answer.complaint}, perhaps for now: {down} of the cluster's hosts are out of service"
    raise ConfigError(f"SLURM would not take this job: {answer.complaint}")


def _hosts_out_of_service(script: str, environ: Mapping[str, str]) -> int:
    partition = directives_of(script).get("partition")
    of = () if partition is None else (f"--partition={partition}",)
    command = ("sinfo", "--noheader", "--Node", *of, f"--states={_OUT_OF_SERVICE}", "--format=%N")
    with contextlib.suppress(RunError):
        return len(set(asyncio.run(call(*command, environ=environ)).out.split()))
    return 0


def _sbatch(
    *options: str, script: str | None = None, environ: Mapping[str, str], directives: str | None = None
) -> Answer:
    clean = environ_for_sbatch(environ, directives_of(script or directives or ""))
    return asyncio.run(call("sbatch", *options, input_text=script, environ=clean, timeout_s=_SUBMIT_SECONDS))


@dataclass(frozen=True, kw_only=True)
class Submitted:
    """A job in the queue."""

    job_id: str
    folder: JobFolder


class UnknownSubmissionError(RunError):
    """SLURM may have taken the job, or not."""


def submit(
    plan: LaunchPlan,
    script: str,
    environ: Mapping[str, str],
    *,
    say: Callable[[str], None],
    forget_excluded: bool = False,
) -> Submitted:
    """Queues the job. Raises RunError where the run is not free (any more), ConfigError where SLURM refuses the job; then
    nothing of it is left. UnknownSubmissionError where SLURM does not say whether it has taken it: all is left for it."""
    folder = JobFolder(plan.run)
    with _clean_unless_queued(plan.run, folder), _one_at_a_time(folder, say):
        ending = check_is_free(plan.run)
        earlier = folder.read_record()
        record = write_job_files(plan, script=script, forget_excluded=forget_excluded)
        # The supervisor may begin before sbatch has told its number here.
        after = () if ending is None else (f"--dependency=afterany:{ending}",)
        try:
            job_id = _queue(folder, record, *after, script=script, environ=environ)
        except UnknownSubmissionError:
            raise
        except (ConfigError, RunError):
            folder.forget_record()
            if earlier is not None:
                folder.write_record(earlier)
            raise
        folder.write_record(replace(record, job_id=job_id))
    return Submitted(job_id=job_id, folder=folder)


def _queue(folder: JobFolder, record: JobRecord, *options: str, script: str, environ: Mapping[str, str]) -> str:
    """The job's id."""
    try:
        answer = _sbatch("--parsable", *options, str(folder.script), directives=script, environ=environ)
        silence = answer.complaint if answer.is_lost else None
    except NoAnswerError as error:
        silence = str(error)
    if silence is not None:
        if (found := find_submitted(folder, record.earlier_job_ids)) is not None:
            return found
        raise UnknownSubmissionError(
            f"{silence}. Whether the job is queued is not known, so {folder.root} is left for it. `squeue --me` tells; "
            "the same `mega launch` finds it, or submits it"
        )
    job_id = answer.out.strip().splitlines()[-1].partition(";")[0] if answer.code == 0 and answer.out.strip() else ""
    if not job_id.isdecimal():
        raise ConfigError(f"SLURM did not take this job: {answer.complaint}")
    return job_id


def write_job_files(plan: LaunchPlan, *, script: str | None = None, forget_excluded: bool = False) -> JobRecord:
    """The configuration as it is now, the script, and the record; what an earlier job has left there is forgotten, but for
    the hosts that SLURM is not to give again."""
    folder = JobFolder(plan.run)
    folder.root.mkdir(parents=True, exist_ok=True)
    earlier = folder.read_record()
    folder.keep_excluded_hosts({} if forget_excluded else folder.excluded_hosts())
    folder.forget_before_launch()
    _write(folder.config, f"# As it was launched: the job's ranks run with it.\n{resolved_toml(plan.config)}")
    if script is not None:
        _write(folder.script, script)
    record = JobRecord(
        backend=plan.backend,
        job_id=None,
        submitted=time.time(),
        submitted_from=socket.gethostname(),
        nodes=plan.nodes_asked,
        earlier_job_ids=() if earlier is None else tuple(filter(None, [*earlier.earlier_job_ids, earlier.job_id])),
    )
    folder.write_record(record)
    return record


def _write(path: Path, text: str) -> None:
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)


@contextlib.contextmanager
def _one_at_a_time(folder: JobFolder, say: Callable[[str], None]) -> Iterator[None]:
    """Two `mega launch` of one run must not both find it free."""
    with contextlib.ExitStack() as held:
        try:
            held.enter_context(locked_run(folder.root, say=say))
        except RunError as error:
            raise RunError(
                f"another `mega launch` of this run is under way: {folder.root / LOCK_NAME} is held"
            ) from error
        yield


@contextlib.contextmanager
def _clean_unless_queued(run: RunDirectory, folder: JobFolder) -> Iterator[None]:
    """A refused job leaves no folder of a run that never was."""
    is_new, has_folder = not run.root.exists(), folder.root.exists()
    try:
        yield
    except UnknownSubmissionError:
        raise
    except (ConfigError, RunError):
        if not has_folder:
            shutil.rmtree(folder.root, ignore_errors=True)
        if is_new:
            with contextlib.suppress(OSError):
                run.root.rmdir()
        raise
