"""Real agents on hosts that are names only, and what their ranks run: a few lines of Python, or of the shell."""

import asyncio
import contextlib
import os
import subprocess
import sys
import textwrap
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path

from launcher.jobs.agents.head import Attempt, Head, RankEnded, RanksPlan
from launcher.jobs.agents.protocol import (
    HOST_NAME,
    Start,
)

_AGENT = (sys.executable, "-m", "launcher")


# What a rank begins with. `mark` leaves a file that the test waits for.
_RANK = """
import json, os, signal, subprocess, sys, time
from pathlib import Path
from launcher import rank_process
rank, here = int(os.environ["RANK"]), Path(os.environ["TEST_DIRECTORY"])
def mark(name, content=""):
    partial = here / f".{name}-{rank}"
    partial.write_text(content)
    partial.rename(here / f"{name}-{rank}")
def wait_for(name):
    while not (here / name).exists():
        time.sleep(0.01)
def hang():
    while True:
        time.sleep(60)
"""


ENTER = "rank_process.enter(os.environ)\n"


def python(script: str) -> Sequence[str]:
    """A rank that runs `script`."""
    return (sys.executable, "-c", _RANK + textwrap.dedent(script))


class Job:
    """A head, and real agents on hosts that are names only."""

    def __init__(self, directory: Path) -> None:
        self.here = directory
        self.logs = directory / "attempt-1"
        self.agents: dict[str, subprocess.Popen[str]] = {}
        self.lines: list[str] = []

    @contextlib.asynccontextmanager
    async def head(self, *hosts: str, silence_s: float = 60.0) -> AsyncIterator[Attempt]:
        """All agents have come."""
        async with Head(token="secret", silence_s=silence_s, say=lambda text: None) as head:
            attempt = head.attempt(
                1, expected=dict.fromkeys(hosts, 1), log=self.logs / "job.log", echo=self.lines.append
            )
            try:
                for host in hosts:
                    self.agents[host] = self.start_agent(host, head.environ)
                assert await attempt.gather(60) == ()
                yield attempt
            finally:
                for agent in self.agents.values():
                    agent.kill()
                    agent.wait(60)
                    assert agent.stderr is not None
                    agent.stderr.close()

    def start_agent(self, host: str, environ: dict[str, str]) -> subprocess.Popen[str]:
        environ = {
            **os.environ,
            **environ,
            "MEGA_ATTEMPT": "1",
            HOST_NAME: host,
            "OMP_NUM_THREADS": "",
            "TEST_DIRECTORY": str(self.here),
        }
        return subprocess.Popen([*_AGENT, "agent"], env=environ, stderr=subprocess.PIPE, text=True)

    async def start(self, attempt: Attempt, command: Sequence[str], **fields: object) -> None:
        """Starts a rank on each host, or as many as `fields` say."""
        plan = {"ranks_per_host": 1, "environ": {}, "directory": self.logs, **fields}
        await attempt.start_ranks(RanksPlan(hosts=tuple(self.agents), command=command, **plan))

    async def wait_for(self, *names: str) -> None:
        for name in names:
            await until(lambda name=name: (self.here / name).exists())

    async def agent_ends(self, host: str) -> tuple[int, str]:
        """Exit code and stderr of an agent that ends by itself."""
        agent = self.agents[host]
        _, words = await asyncio.to_thread(agent.communicate, None, 60)
        return agent.returncode, words


async def until(condition: Callable[[], bool]) -> None:
    while not condition():
        await asyncio.sleep(0.01)


async def ends(attempt: Attempt, number: int) -> list[RankEnded]:
    """The next ends of ranks, in the order of ranks."""
    found = [await attempt.next_event() for _ in range(number)]
    assert all(isinstance(end, RankEnded) for end in found), found
    return sorted(found, key=lambda end: end.rank)  # type: ignore[arg-type, return-value, union-attr]


def is_running(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state != "Z"


def order_of(job: Job, command: Sequence[str], ranks: tuple[int, ...] = (0,)) -> Start:
    return Start(
        ranks=ranks,
        first_local_rank=0,
        ranks_on_host=len(ranks),
        num_ranks=8,
        command=tuple(command),
        environ={"TEST_DIRECTORY": str(job.here)},
        directory=str(job.logs),
        working_directory=str(job.here),
        master_address="n1",
        master_port=1,
        max_log_bytes=1_000_000_000,
    )
