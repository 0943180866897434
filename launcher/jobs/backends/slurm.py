"""The hosts of a job of SLURM: an srun step starts the agents of each attempt. For SLURM 22.05 and later."""

from __future__ import annotations

import asyncio
import contextlib
import subprocess
from collections.abc import Awaitable, Callable, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

from launcher.errors import ConfigError, RunError
from launcher.jobs.agents.protocol import ATTEMPT
from launcher.jobs.backend import Agents, AgentsStart
from launcher.jobs.config import SlurmConfig
from launcher.jobs.job_record import JobFolder
from launcher.jobs.slurm.client import JobInfo, call, show_job, usable_hosts
from launcher.jobs.slurm.guard import guard_command
from launcher.jobs.slurm.step import step_command, step_environ, step_options
from megamodel.train.run_directory import RunDirectory

T = TypeVar("T")
RUN = "MEGA_RUN"
"""For those who look at a host's processes: which run an agent, or a rank, belongs to."""

_POLL_SECONDS = 0.05
_ASK_SECONDS, _KILL_SECONDS = 2.0, 3.0
"""For a step to end once asked to, and for SLURM to be told that it is killed."""
_NUM_GUARDS = 2
_GUARD_SECONDS = 10.0
"""Between two looks at the guards."""
_EXCLUDE_TRIES = 3
# Words of an answer that stays the same however often SLURM is asked, in lower case.
_FOR_GOOD = ("denied", "disabled", "not permitted", "invalid job id", "only batch jobs")


class SlurmStep:
    """A step that runs: `launcher.jobs.backend.Agents`."""

    def __init__(self, process: subprocess.Popen[bytes], *, job_id: str, name: str, environ: Mapping[str, str]) -> None:
        self._process = process
        self._job_id = job_id
        self._name = name
        self._environ = environ

    async def wait(self) -> int:
        """Until srun has ended; its exit code."""
        while self._process.poll() is None:
            await asyncio.sleep(_POLL_SECONDS)
        return int(self._process.returncode)

    async def end(self) -> None:
        """Asks its tasks to end, then has them killed. With a dead host SLURM is slow to answer, and srun to end: neither is
        waited for longer than seconds."""
        if self._process.poll() is not None:
            return
        waiting = asyncio.ensure_future(self.wait())
        telling = [asyncio.ensure_future(self._signal("TERM"))]
        await asyncio.wait((waiting,), timeout=_ASK_SECONDS)
        if not waiting.done():
            telling.append(asyncio.ensure_future(self._signal("KILL")))
            # Not its process group: there srun keeps a process that has SLURM kill the step when srun itself is killed.
            self._process.kill()
            await waiting
            await asyncio.wait(telling, timeout=_KILL_SECONDS)
        for task in telling:
            task.cancel()
        await asyncio.gather(*telling, return_exceptions=True)

    async def _signal(self, name: str) -> None:
        with contextlib.suppress(RunError):  # srun's own end sees to it
            listing = await call(
                *("squeue", "--steps", f"--jobs={self._job_id}", "--noheader", "--format=%i|%j"), environ=self._environ
            )
            for line in listing.out.splitlines():
                step, _, step_name = line.strip().partition("|")
                if step_name == self._name:
                    await call("scancel", f"--signal={name}", step, environ=self._environ)


class SlurmBackend:
    """`launcher.jobs.backend.Backend` within a job of SLURM, for the process that its batch script has become."""

    name = "slurm"

    def __init__(
        self,
        environ: Mapping[str, str],
        slurm: SlurmConfig,
        run: RunDirectory,
        *,
        say: Callable[[str], None],
        device: str,
        working_directory: Path | None = None,
    ) -> None:
        """`environ`: of the batch script; `device`: `run.device` of the configuration.

        Raises ConfigError where the environment is none of a job of SLURM.
        """
        if not environ.get("SLURM_JOB_ID"):
            raise ConfigError("SLURM_JOB_ID is not set: this runs as a batch job of SLURM, by `mega launch --on slurm`")
        self._environ = dict(environ)
        self._slurm = slurm
        self._run = run
        self._say = say
        self._device = device
        self._working_directory = working_directory or Path.cwd()
        self._job_id = environ["SLURM_JOB_ID"]
        self._restarts = int(environ.get("SLURM_RESTART_COUNT") or 0)
        self._guard: subprocess.Popen[bytes] | None = None
        self._guarding: tuple[str, ...] = ()
        self._keeping_guard: asyncio.Task[None] | None = None

    @property
    def task_per_rank(self) -> bool:
        """Under PMIx a task is a rank."""
        return self._slurm.mpi == "pmix"

    @property
    def is_restart(self) -> bool:
        """SLURM counts them."""
        return self._restarts > 0

    async def hosts(self) -> Sequence[str]:
        """Those of the job that work. A host that SLURM has given up does not come back to the job."""
        job = await show_job(self._job_id, self._environ)
        return await usable_hosts(job.hosts, self._environ)

    async def possible_hosts(self) -> Sequence[str]:
        """Those that the job has now: one that SLURM has given up leaves it for good."""
        return (await show_job(self._job_id, self._environ)).hosts

    async def start(self, start: AgentsStart) -> Agents:
        """Starts a step with the agents."""
        name = f"attempt-{start.environ[ATTEMPT]}"
        command = step_command(
            self._slurm,
            hosts=start.hosts,
            tasks_per_host=start.agents_per_host,
            name=name,
            working_directory=self._working_directory,
            run_directory=self._run.root,
            job_id=self._job_id,
            device=self._device,
        )
        environ = {**step_environ(self._environ), RUN: str(self._run.root), **start.environ}
        process = _popen(command, environ, start.output)
        if self._keeping_guard is not None:
            self._keeping_guard.cancel()
        self._keeping_guard = asyncio.create_task(self._keep_guard())
        return SlurmStep(process, job_id=self._job_id, name=name, environ=self._environ)

    async def requeue(self, *, without: Sequence[str], reason: str) -> bool:
        """Asks SLURM for another start of this very job, on other hosts. It may end this process at once.

        False for a job that is being cancelled, since SLURM would start that one again too, and where SLURM refuses for good.
        """
        job = await self._unless_refused(self._requeue, otherwise=None)
        if job is None:
            return False
        if without:
            await self._exclude(without, job)
        return True

    async def _requeue(self) -> JobInfo | None:
        """The job as it was before; None where it is not queued again."""
        job = await show_job(self._job_id, self._environ)
        if self._is_requeued(job):
            return job
        if job.state in ("COMPLETING", "CANCELLED") and job.reason != "TimeLimit":
            self._say(f"job {self._job_id} is being cancelled, so it is not queued again")
            return None
        if not self._may_requeue():
            return None
        answer = await call("scontrol", "requeue", self._job_id, environ=self._environ)
        if answer.code:
            raise RunError(f"scontrol requeue {self._job_id}: {answer.complaint}")
        return job

    async def ends_at(self) -> float:
        """As SLURM has it now: preemption brings it forward."""
        return (await show_job(self._job_id, self._environ)).ends_at

    async def is_preempted(self) -> bool:
        """Whether SLURM needs the hosts for others, or the time is over, or it has queued the job again already."""
        return await self._unless_refused(self._is_preempted, otherwise=False)

    async def _is_preempted(self) -> bool:
        job = await show_job(self._job_id, self._environ)
        return job.is_preempted or self._is_requeued(job) or job.reason == "TimeLimit"

    def _is_requeued(self, job: JobInfo) -> bool:
        """Whether SLURM has decided so itself."""
        return job.restarts > self._restarts

    async def _unless_refused(self, ask: Callable[[], Awaitable[T]], *, otherwise: T) -> T:
        """What `ask` returns; `otherwise` where SLURM refuses for good, which is told. Any other RunError may be over soon."""
        try:
            return await ask()
        except RunError as error:
            if not any(words in str(error).lower() for words in _FOR_GOOD):
                raise
            self._say(f"SLURM refuses: {error}")
            return otherwise

    def _may_requeue(self) -> bool:
        if not self._slurm.requeue:
            return False
        state = JobFolder(self._run).read_state()
        # The supervisor has counted this one already.
        requeues = max(self._restarts, state.requeues - 1 if state is not None else 0)
        if requeues >= self._slurm.max_requeues:
            self._say(f"the job was queued again {requeues} times, and slurm.max_requeues = {self._slurm.max_requeues}")
            return False
        return True

    async def _exclude(self, hosts: Sequence[str], job: JobInfo) -> None:
        """A running job's list cannot be changed; that of one that is queued again can, at once. Who is in it stays there."""
        import hostlist

        listed = job.excluded or self._slurm.exclude or ""
        known = () if "/" in listed else hostlist.expand_hostlist(listed)  # sbatch takes a file of hosts, too
        every = ",".join(filter(None, [listed, *(host for host in hosts if host not in known)]))
        problem = ""
        # The SIGTERM that a requeue brings reaches this process's children too.
        for _ in range(_EXCLUDE_TRIES):
            try:
                answer = await call(
                    "scontrol", "update", f"JobId={self._job_id}", f"ExcNodeList={every}", environ=self._environ
                )
            except RunError as error:
                problem = str(error)
                continue
            if answer.code == 0:
                return
            problem = answer.complaint
            await asyncio.sleep(_POLL_SECONDS)
        self._say(f"SLURM may give the job {', '.join(hosts)} again: {problem}")

    async def _keep_guard(self) -> None:
        """Has guards on other hosts of the job than this one, whether they train or not, as long as there are any; see
        `launcher.jobs.slurm.guard`."""
        here = self._environ.get("SLURMD_NODENAME")
        is_known = False
        while True:
            if not is_known or self._guard is None or self._guard.poll() is not None:
                try:
                    guarding = tuple(host for host in await self.hosts() if host != here)[-_NUM_GUARDS:]
                    if not guarding:  # SLURM itself starts a job again that has lost its only host
                        return
                    self._start_guard(guarding)
                    is_known = True
                except RunError as error:
                    self._say(f"nobody guards this job against the loss of {here} now: {error}")
            await asyncio.sleep(_GUARD_SECONDS)

    def _start_guard(self, guarding: tuple[str, ...]) -> None:
        if self._guard is not None:
            if self._guard.poll() is None and self._guarding == guarding:
                return
            self._guard.kill()
            self._guard.wait()
        left = self._slurm.max_requeues if self._slurm.requeue else 0
        options = step_options(guarding, tasks_per_host=1, name="guard")
        # No GPU, whatever the job has.
        environ = {
            name: value for name, value in step_environ(self._environ).items() if not name.startswith("SLURM_GPU")
        }
        self._guard = _popen(
            ("srun", *options, "--gres=none", "--mpi=none", *guard_command(self._run, max_restarts=left)),
            environ,
            JobFolder(self._run).root / "guard.log",
        )
        self._guarding = guarding


def _popen(command: Sequence[str], environ: Mapping[str, str], output: Path) -> subprocess.Popen[bytes]:
    try:
        with output.open("ab") as file:
            return subprocess.Popen(
                command,
                env=dict(environ),
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
    except OSError as error:
        raise RunError(f"{command[0]} cannot be started: {error.strerror}") from error
