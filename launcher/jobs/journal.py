"""What a supervisor writes down: events of the run, and its own state, which says that it lives.

The folder is often on a shared file system: writing happens in a thread of its own, in order, so that nothing else waits for
it; a disk that takes nothing is told once and ends nothing.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

from launcher.jobs.job_record import JobFolder, SupervisorState
from megamodel.train.run_directory import RunDirectory

_INTERVAL_SECONDS = 2.0


class Journal:
    """Writes below one run's folder."""

    def __init__(self, run: RunDirectory, state: SupervisorState, *, say: Callable[[str], None]) -> None:
        self.state = state
        """As it was told last."""
        self._run = run
        self._folder = JobFolder(run)
        self._say = say
        self._writer = ThreadPoolExecutor(max_workers=1, thread_name_prefix="journal")
        self._has_failed = False

    async def event(self, name: str, **details: Any) -> None:
        """A line of events.jsonl."""
        await self._write(lambda: self._run.append_event(name, **details))

    async def update(self, **changes: Any) -> None:
        """Changes the state, and writes it at once."""
        self.state = replace(self.state, **changes)
        await self._write_state()

    async def keep_alive(self) -> None:
        """Writes the state again and again, until it is that of a job that has ended: what is in the folder then may be
        another's, who launches the run again. To be cancelled."""
        while True:
            await asyncio.sleep(_INTERVAL_SECONDS)
            if self.state.state in ("failed", "finished"):
                return
            await self._write_state()

    def close(self) -> None:
        """Waits until all is written."""
        self._writer.shutdown()

    async def _write_state(self) -> None:
        state = self.state
        await self._write(lambda: self._folder.write_state(state))

    async def _write(self, act: Callable[[], object]) -> None:
        try:
            await asyncio.get_running_loop().run_in_executor(self._writer, act)
        except OSError as error:
            if not self._has_failed:
                self._has_failed = True
                self._say(f"{self._run.root}: the job's state and events cannot be written now ({error}); it goes on")
