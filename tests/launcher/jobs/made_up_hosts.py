"""Hosts that are but names on this machine: a backend that starts a real agent for each of them, and ranks as small scripts."""

from __future__ import annotations

import asyncio
import json
import os
import sys
import textwrap
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from launcher.config import load_run_config
from launcher.jobs.agents.protocol import ATTEMPT, HOST_NAME
from launcher.jobs.backend import Agents, AgentsStart
from launcher.jobs.backends.starter import Starter
from launcher.jobs.job import Job, JobEnd, Patience
from launcher.jobs.job_record import JobFolder, SupervisorState
from launcher.jobs.supervision.supervisor import supervise
from megamodel.train.run_directory import RunDirectory

TIMEOUT = 240

# An agent as `mega agent` has it, which leaves a mark once the head has taken it in.
_AGENT = """
import os, sys
from pathlib import Path
from launcher.jobs.agents.agent import Agent
from launcher.output import Output
from launcher.verbs.agent import agent
take = Agent._take_answer
def take_and_mark(self, *arguments):
    take(self, *arguments)
    Path(os.environ["TEST_RUN"], f"came-{self._host}-{self._place.attempt}").touch()
Agent._take_answer = take_and_mark
sys.exit(agent(Output(as_json=False)))
"""

# What a rank begins with. `mark` leaves a file that a test, or another rank, waits for.
_PREAMBLE = """
import json, os, signal, sys, time
from pathlib import Path
from launcher import rank_process
rank_process.enter(os.environ)
rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
attempt, host = int(os.environ["MEGA_ATTEMPT"]), os.environ["MEGA_HOST_NAME"]
run = Path(os.environ["TEST_RUN"])
logs = Path(os.environ["MEGA_FAILURE_FILE"]).parent
def mark(name, content=""):
    partial = run / f".{name}-{rank}-{attempt}"
    partial.write_text(str(content))
    partial.rename(run / f"{name}-{rank}-{attempt}")
def wait_for(*names):
    for name in names:
        while not (run / name).exists():
            time.sleep(0.01)
def fail(message, code=1, at=None):
    record = {"at": at or time.time(), "message": message, "exit_code": code, "traceback": ""}
    path = Path(os.environ["MEGA_FAILURE_FILE"])
    path.with_suffix(".partial").write_text(json.dumps(record))
    path.with_suffix(".partial").rename(path)
    os._exit(code)
def lose_peer():
    fail("rank %d of %d lost the others in a barrier (Connection closed by peer)" % (rank, world))
def hang():
    while True:
        time.sleep(60)
def step(number):
    with (run / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": number}) + "\\n")
def checkpoint(number):
    folder = run / "checkpoints" / f"step-{number:08d}"
    folder.mkdir(parents=True, exist_ok=True)
    manifest = {"version": 1, "step": number, "world_size": world, "saved_at": time.time(), "metadata": {}, "files": {}}
    (folder / "manifest.json").write_text(json.dumps(manifest))
def find(kind, sentence, **evidence):
    finding = {"time": time.time(), "kind": kind, "hosts": [host], "ranks": [rank], "confidence": 0.9,
               "evidence": evidence, "sentence": sentence}
    (run / "fabric").mkdir(exist_ok=True)
    with (run / "fabric" / "findings.jsonl").open("a") as file:
        file.write(json.dumps(finding) + "\\n")
def on_stop(number, act):
    signal.signal(number, lambda *_: act())
def finish():
    # As a rank ends once the run is done.
    if rank == 0 and not (logs / "result.json").exists():
        (logs / "result.json").write_text("{}")
    sys.exit(0)
mark("pid", os.getpid())
"""

_CONFIG = """
[run]
name = "job"
directory = "{directory}"
device = "cpu"
[model]
preset = "moe-tiny"
[data]
seq_len = 64
tokenizer.vocab_size = 300
[train]
steps = 4
global_batch_size = 12
compile = "off"
[fabric]
hang_seconds = 0.001
[launch]
{launch}
"""
_LAUNCH = ("restart_delay_seconds = 0.0", "preflight.enabled = false")


class MadeUpHosts:
    """A `Backend` whose hosts are names."""

    name = "local"

    def __init__(self, hosts: Sequence[str], environ: dict[str, str]) -> None:
        self.there = list(hosts)
        self.possible = list(hosts)
        """Hosts that could come back."""
        self.absent: set[str] = set()
        """Hosts that are there, as it seems, and from which no agent comes."""
        self.task_per_rank = False
        self.is_restart = False
        self.requeues: list[dict[str, Any]] = []
        self.accepts_requeue = True
        self.preempted = False
        self.ends_in: float | None = None
        self.starts: list[tuple[str, ...]] = []
        self.agents: dict[str, Starter] = {}
        """The last one of each host, in the last start."""
        self.before_start: Callable[[int], None] = lambda number: None
        self._environ = environ

    async def hosts(self) -> Sequence[str]:
        return tuple(self.there)

    async def possible_hosts(self) -> Sequence[str]:
        return tuple(self.possible)

    async def start(self, start: AgentsStart) -> Agents:
        self.starts.append(tuple(start.hosts))
        self.before_start(len(self.starts))
        self.agents = {}
        starters = []
        for host in start.hosts:
            for index in range(start.agents_per_host if host not in self.absent else 0):
                environ = {**os.environ, **self._environ, HOST_NAME: host, "PMI_RANK": str(index), **start.environ}
                starter = Starter.start((sys.executable, "-c", _AGENT), environ=environ, output=start.output)
                starters.append(starter)
                self.agents[host] = starter
        # So the time that a job gives its hosts to come is only for those that do not.
        marks = [Path(self._environ["TEST_RUN"], f"came-{host}-{start.environ[ATTEMPT]}") for host in self.agents]
        while not all(mark.exists() for mark in marks):
            await asyncio.sleep(0.01)
        return _All(starters, self.absent)

    async def requeue(self, *, without: Sequence[str], reason: str) -> bool:
        self.requeues.append({"without": tuple(without), "reason": reason})
        return self.accepts_requeue

    async def ends_at(self) -> float | None:
        return None if self.ends_in is None else time.time() + self.ends_in

    async def is_preempted(self) -> bool:
        return self.preempted


class _All:
    def __init__(self, starters: list[Starter], absent: set[str]) -> None:
        self._starters = starters
        self._absent = absent

    async def wait(self) -> int:
        codes = await asyncio.gather(*(starter.wait() for starter in self._starters))
        if self._absent and not codes:
            await asyncio.sleep(3600)  # a starter waits for those that do not come
        return max(codes, default=0)

    async def end(self) -> None:
        await asyncio.gather(*(starter.end() for starter in self._starters))


class MadeUpJob:
    """A job on made-up hosts, and what is left of it."""

    def __init__(self, tmp_path: Path, hosts: Sequence[str], script: str, *, launch: str = "", ranks_per_host: int = 1):
        self.root = tmp_path / "job"
        self.run = RunDirectory(self.root)
        self.folder = JobFolder(self.run)
        self.folder.root.mkdir(parents=True)
        unset = [line for line in _LAUNCH if line.partition(" ")[0] not in launch]
        self.folder.config.write_text(_CONFIG.format(directory=tmp_path, launch="\n".join([*unset, launch])))
        self.backend = MadeUpHosts(hosts, {"TEST_RUN": str(self.root), "OMP_NUM_THREADS": "1"})
        self.said: list[str] = []
        self.shown: list[str] = []
        self.ranks_per_host = ranks_per_host
        self.script = f"{_PREAMBLE}{textwrap.dedent(script)}\nfinish()\n"
        self.patience = Patience(
            own_end=TIMEOUT,
            known_cause=0.0,
            terminated=0.0,
            result=0.1,
            done=TIMEOUT,
            starter=TIMEOUT,
            released=5.0,
            signal=0.0,
            look=0.02,
            watch=TIMEOUT,
            hosts=0.02,
            not_begun=0.0,
            scheduler=TIMEOUT,
            scheduler_look=0.01,
        )

    def job(self) -> Job:
        """For `supervise`."""
        return Job(
            config_file=self.folder.config,
            config=load_run_config([self.folder.config]).config,
            backend=self.backend,
            ranks_per_host=self.ranks_per_host,
            say=self.said.append,
            show=self.shown.append,
            command=(sys.executable, "-c", self.script),
            patience=self.patience,
        )

    def supervise(self, *acts: Callable[[], Any]) -> JobEnd:
        """Runs the job to its end; `acts` are coroutine functions that run beside it."""

        async def all_of_it() -> JobEnd:
            beside = [asyncio.ensure_future(act()) for act in acts]
            try:
                async with asyncio.timeout(TIMEOUT):
                    return await supervise(self.job())
            finally:
                for each in beside:
                    each.cancel()
                for outcome in await asyncio.gather(*beside, return_exceptions=True):
                    if isinstance(outcome, Exception):
                        raise outcome

        return asyncio.run(all_of_it())

    async def wait_for(self, *names: str) -> None:
        """Until ranks have left these marks."""
        await self.until(lambda: all((self.root / name).exists() for name in names))

    async def until(self, condition: Callable[[], bool]) -> None:
        """Until the condition holds; the job has a time-out."""
        while not condition():
            await asyncio.sleep(0.01)

    def pid(self, rank: int, attempt: int = 1) -> int:
        """Of a rank that has begun."""
        return int((self.root / f"pid-{rank}-{attempt}").read_text())

    def pids(self) -> list[int]:
        """Of all ranks of all attempts."""
        return [int(path.read_text()) for path in self.root.glob("pid-*")]

    def events(self, name: str) -> list[dict[str, Any]]:
        """Events of one name."""
        lines = map(json.loads, self.run.events.read_text().splitlines())
        return [line for line in lines if line["event"] == name]

    def state(self) -> SupervisorState:
        """As the supervisor wrote it last."""
        state = self.folder.read_state()
        assert state is not None
        return state


def is_running(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state != "Z"


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + TIMEOUT
    while not condition():
        assert time.monotonic() < deadline, "this took too long"
        time.sleep(0.01)
