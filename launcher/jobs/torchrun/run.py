"""`mega launch --on torchrun` on one host, to the end of the job."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from launcher.config import load_run_config
from launcher.jobs.job import Job, JobEnd
from launcher.jobs.job_record import JobFolder
from launcher.jobs.stop_asked import StopAsked
from launcher.jobs.submission.plan import LaunchPlan
from launcher.jobs.submission.submit import write_job_files
from launcher.jobs.supervision.supervisor import supervise
from launcher.jobs.torchrun.backend import TorchrunBackend
from launcher.jobs.torchrun.meeting import Meeting
from launcher.jobs.torchrun.node import Node
from launcher.jobs.torchrun.notices import shared_token
from launcher.jobs.torchrun.roster import Roster

_SETTLE_S = 3.0
"""In a job under way: for the hosts that are left to find the one that leads now."""


@dataclass(frozen=True, kw_only=True)
class NodeEnd:
    """How the job ended for one host."""

    exit_code: int
    led: JobEnd | None
    """The job's end as its supervisor has it, where this host led it."""


def run_torchrun(
    plan: LaunchPlan,
    roster: Roster,
    *,
    environ: Mapping[str, str],
    say: Callable[[str], None],
    show: Callable[[str], None],
) -> NodeEnd:
    """Takes part in the job of `plan`, and leads it where `roster` wants it. `show` gets the ranks' output where it leads.

    Must be called in the main thread. Raises RunError where this host can neither follow nor lead.
    """
    return asyncio.run(_run(plan, roster, environ, say, show))


async def _run(
    plan: LaunchPlan,
    roster: Roster,
    environ: Mapping[str, str],
    say: Callable[[str], None],
    show: Callable[[str], None],
) -> NodeEnd:
    ended: list[JobEnd] = []
    folder = JobFolder(plan.run)

    async def lead(meeting: Meeting, *, goes_on: bool) -> JobEnd:
        if not goes_on:
            write_job_files(plan)
        config = load_run_config([folder.config]).config
        launch = config.launch
        say(f"{roster.name} leads the job of run {plan.run.root.name}")
        backend = TorchrunBackend(
            meeting,
            listed=[host.name for host in plan.hosts],
            nodes=launch.nodes,
            fewest=launch.fewest_nodes,
            settle_s=_SETTLE_S if goes_on else launch.start_timeout_seconds,
            patience_s=launch.wait_for_hosts_seconds if goes_on else launch.start_timeout_seconds,
            goes_on=goes_on,
            stop=stop,
            say=say,
        )
        job = Job(
            config_file=folder.config,
            config=config,
            backend=backend,
            ranks_per_host=launch.ranks_per_node or 1,
            say=say,
            show=show,
        )
        ended.append(await supervise(job, stop=stop))
        return ended[-1]

    with StopAsked(say) as stop:
        node = Node(
            roster,
            plan.config.launch,
            token=shared_token(folder.root),
            run_folder=plan.run.root,
            end_file=folder.end,
            environ=environ,
            stop=stop,
            lead=lead,
            say=say,
        )
        code = await node.run()
    return NodeEnd(exit_code=code, led=ended[-1] if ended else None)
