"""`mega launch`."""

from __future__ import annotations

import asyncio
import os
import shutil
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from launcher.errors import ConfigError, RunError
from launcher.output import Output
from launcher.rank_process import EXIT_STOPPED
from launcher.verb import EXIT_FAILED, Overrides

if TYPE_CHECKING:
    from launcher.jobs.backend import Backend
    from launcher.jobs.job import JobEnd
    from launcher.jobs.job_record import BackendName
    from launcher.jobs.submission.plan import LaunchPlan
    from launcher.jobs.submission.submit import Submitted
    from launcher.jobs.torchrun.roster import Roster

Files = Annotated[
    list[Path] | None, typer.Argument(metavar="CONFIG.toml...", help="TOML files, later ones over earlier ones.")
]
On = Annotated[
    str | None,
    typer.Option(
        "--on", metavar="local|torchrun|slurm|mpi", help="Who starts processes on hosts. Default: slurm, else local."
    ),
]
Nodes = Annotated[int | None, typer.Option("--nodes", min=1, metavar="N", help="Hosts that train: launch.nodes.")]
Hostfile = Annotated[
    Path | None, typer.Option("--hostfile", metavar="FILE", help="With mpi and torchrun: the hosts, one a line.")
]
NodeRank = Annotated[
    int | None, typer.Option("--node-rank", min=0, metavar="K", help="With torchrun: which of the hosts this one is.")
]
Rendezvous = Annotated[
    str | None, typer.Option("--rendezvous", metavar="HOST:PORT", help="With torchrun: where all hosts meet.")
]
DryRun = Annotated[
    bool, typer.Option("--dry-run", help="Check everything, show script and environment; start and queue nothing.")
]
ShowTemplate = Annotated[
    bool, typer.Option("--show-template", help="Print the template of the batch script, for slurm.template.")
]
Wait = Annotated[bool, typer.Option("--wait", help="With slurm: return when the job has ended, with its exit code.")]
ForgetExcluded = Annotated[
    bool,
    typer.Option(
        "--forget-excluded", help="With slurm: ask for hosts again that earlier jobs of the run have left out."
    ),
]

_BACKENDS = ("local", "torchrun", "slurm", "mpi")
_LOOK_SECONDS = 2.0


def launch(
    out: Output,
    files: Files = None,
    overrides: Overrides = None,
    on: On = None,
    nodes: Nodes = None,
    hostfile: Hostfile = None,
    node_rank: NodeRank = None,
    rendezvous: Rendezvous = None,
    dry_run: DryRun = False,
    show_template: ShowTemplate = False,
    wait: Wait = False,
    forget_excluded: ForgetExcluded = False,
) -> int:
    """Run a configuration on hosts: checked before it is queued, watched, and started again where it fails."""
    if show_template:
        return _show_template(out)
    if not files:
        raise ConfigError("CONFIG.toml is missing: name the configuration to launch")
    backend = _choose_backend(out, on)
    given = {"hostfile": hostfile, "node_rank": node_rank, "rendezvous": rendezvous}
    _check_options(backend, **given, wait=wait, forget_excluded=forget_excluded)
    sets = [*(overrides or ()), *([] if nodes is None else [f"launch.nodes={nodes}"])]
    from launcher.jobs.submission.free_run import check_is_free
    from launcher.jobs.submission.plan import plan_launch
    from launcher.needed_packages import check_packages
    from launcher.run_record import changes_to_run

    plan = plan_launch(files, sets, backend=backend, environ=os.environ, hostfile=hostfile)
    if plan.config.slurm.container.runtime == "none" or backend != "slurm":
        check_packages(plan.config)  # what a container holds shows only in it
    changes = changes_to_run(plan.loaded)
    roster = _read_roster(plan, node_rank, rendezvous) if backend == "torchrun" else None
    if roster is None:  # a job under torchrun may be under way, and this host joins it
        check_is_free(plan.run)
    for change in changes:
        out.say(f"changed since the last start: {change}")
    for doubt in plan.doubts:
        out.warn(doubt)
    if backend == "slurm":
        return _on_slurm(out, plan, dry_run=dry_run, wait=wait, forget_excluded=forget_excluded)
    if dry_run:
        return _preview(out, plan)
    return _in_foreground(out, plan) if roster is None else _under_torchrun(out, plan, roster)


def _show_template(out: Output) -> int:
    from launcher.jobs.slurm.script import template_text

    text = template_text()
    out.say(text.rstrip("\n"))
    out.result({"template": text})
    return 0


def _choose_backend(out: Output, on: str | None) -> BackendName:
    from launcher.jobs.submission.plan import default_backend

    if on is None:
        backend, reason = default_backend(os.environ, has_sbatch=shutil.which("sbatch") is not None)
        out.say(f"--on {backend}: {reason}")
        return backend
    for known in _BACKENDS:
        if on == known:
            return known  # type: ignore[return-value]
    raise ConfigError(f"--on {on}: must be {', '.join(_BACKENDS[:-1])} or {_BACKENDS[-1]}")


def _check_options(backend: BackendName, **given: Any) -> None:
    """Raises ConfigError for options that mean nothing here."""
    meant = {
        "hostfile": ("mpi", "torchrun"),
        "node_rank": ("torchrun",),
        "rendezvous": ("torchrun",),
        "wait": ("slurm",),
        "forget_excluded": ("slurm",),
    }
    problems = tuple(
        f"--{name.replace('_', '-')} means nothing with --on {backend}, only with {' and '.join(meant[name])}: leave it out"
        for name, value in given.items()
        if value not in (None, False) and backend not in meant[name]
    )
    if problems:
        raise ConfigError("\n".join(problems), problems)


def _read_roster(plan: LaunchPlan, node_rank: int | None, rendezvous: str | None) -> Roster:
    from launcher.jobs.torchrun.roster import read_roster

    return read_roster(
        run_name=plan.config.run.name,
        nodes=plan.config.launch.nodes,
        hosts=plan.hosts,
        node_rank=node_rank,
        rendezvous=rendezvous,
    )


def _under_torchrun(out: Output, plan: LaunchPlan, roster: Roster) -> int:
    """One of the job's hosts, which may lead it."""
    from launcher.jobs.torchrun.run import run_torchrun

    end = run_torchrun(plan, roster, environ=os.environ, say=out.warn, show=out.say)
    if end.led is not None:
        _tell(out, plan, end.led)
    else:
        out.result({"run_dir": str(plan.run.root), "host": roster.name, "exit_code": end.exit_code})
    return end.exit_code


def _on_slurm(out: Output, plan: LaunchPlan, *, dry_run: bool, wait: bool, forget_excluded: bool) -> int:
    from launcher.finish import finished_step
    from launcher.jobs.job_record import JobFolder
    from launcher.jobs.slurm.script import render_script
    from launcher.jobs.submission.asked_of_slurm import asked_by, check_programs
    from launcher.jobs.submission.plan import working_directory
    from launcher.jobs.submission.submit import submit, try_submission

    excluded = {} if forget_excluded else JobFolder(plan.run).excluded_hosts()
    script = render_script(
        plan.config,
        ranks_per_node=plan.ranks_per_host,
        working_directory=working_directory(),
        also_exclude=excluded,
    )
    for host, reason in excluded.items():
        out.say(f"not asked for: {host}, which an earlier job of this run has left out ({reason})")
    if excluded:
        out.say("--forget-excluded asks for all hosts again")
    if (step := finished_step(plan.config)) is not None:
        out.say(f"Nothing to do: this run is at step {step:,}, and train.steps = {plan.config.train.steps}.")
        if not dry_run:
            out.result({"run_dir": str(plan.run.root), "job_id": None, "step": step, "finished": True})
            return 0
    has_sbatch = shutil.which("sbatch") is not None
    if not has_sbatch and not dry_run:
        raise ConfigError("--on slurm needs sbatch on PATH, and it is not there: run this where jobs are submitted")
    if not has_sbatch:
        return _preview(out, plan, script=script, said="not asked: there is no sbatch here")
    if doubt := check_programs(os.environ, may_be_set_up=bool(plan.config.slurm.setup_lines)):
        out.warn(doubt)
    try:
        said = try_submission(script, os.environ)
    except RunError as error:
        if not dry_run:
            raise
        said = f"not asked: {error}"
    except ConfigError as error:
        refusal = f"{error}; {asked_by(plan.config, plan.ranks_per_host)}"
        if not dry_run:
            raise ConfigError(refusal) from error
        return _preview(out, plan, script=script, said="it refuses this script, see below", refusal=refusal)
    if dry_run:
        return _preview(out, plan, script=script, said=said)
    submitted = submit(plan, script, os.environ, say=out.warn, forget_excluded=forget_excluded)
    answer = _say_queued(out, plan, submitted.job_id)
    if wait:
        return _wait(out, plan, submitted, answer)
    out.result(answer)
    return 0


def _say_queued(out: Output, plan: LaunchPlan, job_id: str) -> dict[str, Any]:
    """Returns the result for programs."""
    run, name = plan.run.root, plan.config.run.name
    spares = plan.nodes_asked - plan.config.launch.nodes
    hosts = f"{plan.config.launch.nodes} hosts" + (f" and {spares} spare" if spares else "")
    out.say(f"Job {job_id} is queued: {plan.num_ranks} ranks on {hosts}. Run folder: {run}")
    out.say("What to do next:")
    named = name if plan.config.run.directory == "runs" else str(run)
    for command, what in (
        (f"mega status {named}", "how it is"),
        (f"mega logs {named} --follow", "what its ranks say"),
        (f"mega cancel {named}", "saves, and ends it"),
    ):
        out.say(f"  {command:40} # {what}")
    return {
        "job_id": job_id,
        "run_dir": str(run),
        "backend": "slurm",
        "nodes": plan.nodes_asked,
        "ranks": plan.num_ranks,
    }


def _wait(out: Output, plan: LaunchPlan, submitted: Submitted, answer: dict[str, Any]) -> int:
    """Until the run has ended, over all its starts."""
    from launcher.jobs.inspection.status import run_status

    out.say("Waiting for its end; Ctrl-C leaves the job as it is.")
    while not (status := run_status(plan.run)).has_ended:
        time.sleep(_LOOK_SECONDS)
    out.result({**answer, "state": status.state, "step": status.step, "cause": status.cause})
    if status.state == "finished":
        out.say(f"Finished: step {status.step}.")
        return 0
    out.warn(f"error: job {submitted.job_id}: {status.cause}")
    return EXIT_STOPPED if submitted.folder.is_cancelled() else EXIT_FAILED


def _preview(
    out: Output, plan: LaunchPlan, *, script: str | None = None, said: str | None = None, refusal: str | None = None
) -> int:
    """`refusal`: why SLURM would not take the script, which is shown all the same."""
    from launcher.jobs.preview import as_data, starter_command, variables_of_ranks
    from launcher.jobs.submission.plan import working_directory
    from launcher.layout_summary import in_words, layout_summary

    starter = starter_command(plan, working_directory=working_directory(), environ=os.environ)
    variables = variables_of_ranks(plan, os.environ)
    summary = layout_summary(plan.config, plan.num_ranks)
    facts: dict[str, Any] = {
        "backend": plan.backend,
        "run_dir": str(plan.run.root),
        "nodes": plan.config.launch.nodes,
        "spare_nodes": plan.nodes_asked - plan.config.launch.nodes,
        "ranks": plan.num_ranks,
    }
    words = {key.replace("_", " "): str(value) for key, value in facts.items()} | in_words(summary)
    out.table(("what", "value"), [*words.items()])
    if script is not None:
        out.say(f"\nSLURM says: {said}\n\n--- batch script\n{script.rstrip()}")
    out.say(
        f"\n--- starts the agents of an attempt, one {'a rank' if ' --mpi=pmix ' in starter else 'a host'}\n{starter}\n"
    )
    out.say("--- environment of ranks")
    out.table(("variable", "value", "why"), [(each.name, each.value, each.reason) for each in variables])
    out.say("\nNothing was started (--dry-run).")
    out.result(
        {
            **facts,
            **summary,
            "script": script,
            "slurm_says": said,
            "starter": starter,
            "environment": as_data(variables),
            **({} if refusal is None else {"error": refusal}),
        }
    )
    if refusal is None:
        return 0
    out.warn(f"error: {refusal}")
    return ConfigError.exit_code


def _in_foreground(out: Output, plan: LaunchPlan) -> int:
    """The supervisor is this very process."""
    from launcher.jobs.job import Job
    from launcher.jobs.submission.submit import write_job_files
    from launcher.jobs.supervision.supervisor import supervise
    from launcher.run_lock import locked_run

    with locked_run(plan.run.root, say=out.warn):
        write_job_files(plan)
        job = Job(
            config_file=_config_file(plan),
            config=plan.config,
            backend=_backend(plan),
            ranks_per_host=plan.ranks_per_host,
            say=out.warn,
            show=out.say,
        )
        end = asyncio.run(supervise(job))
    _tell(out, plan, end)
    return end.exit_code


def _config_file(plan: LaunchPlan) -> Path:
    from launcher.jobs.job_record import JobFolder

    return JobFolder(plan.run).config


def _backend(plan: LaunchPlan) -> Backend:
    from launcher.jobs.backends.local import LocalBackend
    from launcher.jobs.backends.mpi import MpiBackend

    return MpiBackend(os.environ, hosts=plan.hosts) if plan.backend == "mpi" else LocalBackend(os.environ)


def _tell(out: Output, plan: LaunchPlan, end: JobEnd) -> None:
    """The result, as `mega train` has it. People have read why it failed."""
    from launcher import train_result

    if end.result is not None:
        out.result(end.result)
    elif end.exit_code in (0, EXIT_STOPPED):
        out.result(train_result.stopped_before_result(plan.run.root))
    else:
        out.result({"error": end.cause, "exit_code": end.exit_code})
