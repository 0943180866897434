"""Starting the watcher of a host, a process of its own that outlives its ranks by a few seconds."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import cluster
from cluster.errors import FabricError
from cluster.fabric.watch.processes import ProcessId
from cluster.fabric.watch.protocol import Meeting, is_readable
from cluster.fabric.watch.setup import WatchSetup
from cluster.fabric.watch.status import FOLDER

_START_SECONDS = 30.0


@dataclass(frozen=True, kw_only=True)
class WatcherSettings:
    """All that a watcher is told, by its standard input: a command line can be read by everybody."""

    directory: str
    host: str
    world_size: int
    hang_seconds: float
    address: str
    """Where others reach the head."""
    pid: int
    start_ticks: int
    """The rank that starts it, with its number: so a watcher never outlives a run that ends before anybody says hello."""
    rank: int
    analysers: tuple[dict[str, Any], ...] = ()
    """`AnalyserSpec`s as plain data."""
    meeting: str | None = None
    """The head to report to, as `Meeting.as_text` has it; None: this one is the head."""

    @classmethod
    def of(cls, setup: WatchSetup, starter: ProcessId) -> WatcherSettings:
        """For the watcher of this rank's host."""
        return cls(
            directory=str(setup.directory.absolute()),
            host=setup.host,
            world_size=setup.world_size,
            hang_seconds=setup.hang_seconds,
            address=setup.address,
            pid=starter.pid,
            start_ticks=starter.start_ticks,
            rank=setup.rank,
            analysers=tuple({"factory": each.factory, "options": dict(each.options)} for each in setup.analysers),
        )


def log_file(directory: Path, host: str) -> Path:
    """Where a watcher complains; gone at its end where it had nothing to complain of."""
    return directory / FOLDER / f"watcher-{host.replace('/', '_')}.log"


def start_watcher(settings: WatcherSettings, meeting: Meeting | None) -> Meeting:
    """Starts a watcher and waits until it listens; returns where its head is. `meeting` None: it becomes the head.

    Raises FabricError when it does not come up.
    """
    told = {**asdict(settings), "meeting": meeting.as_text() if meeting else None}
    log = log_file(Path(settings.directory), settings.host)
    log.parent.mkdir(parents=True, exist_ok=True)
    package_root = Path(cluster.__file__).parent.parent
    with log.open("ab") as errors:
        begin = errors.tell()
        # -P: nothing of the run's working directory. Its own session: neither Ctrl-C nor the end of a rank's reaches it.
        process = subprocess.Popen(
            [sys.executable, "-P", "-c", _PROGRAM, str(package_root)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            start_new_session=True,
            close_fds=True,
        )
    assert process.stdin is not None
    assert process.stdout is not None
    ready = True
    with process.stdin, process.stdout:
        try:
            process.stdin.write(json.dumps(told).encode())
            process.stdin.close()
            ready = is_readable(process.stdout, _START_SECONDS)
            answer = process.stdout.readline().decode() if ready else ""
        except BrokenPipeError:
            answer = ""
    if not answer:
        process.kill()
        process.wait()
        how = "ended at its start" if ready else f"did not start within {_START_SECONDS:g} s"
        raise FabricError(f"the watcher of {settings.host} {how}: {_last_words(log, begin)}see {log}")
    # It outlives this process, as a rule; where it does not, nobody else would ask after its end.
    threading.Thread(target=process.wait, name="fabric-watcher-end", daemon=True).start()
    return Meeting.from_text(answer)


def _last_words(log: Path, begin: int) -> str:
    """The last line that was added to `log` after its first `begin` bytes: of a traceback, what was wrong."""
    with log.open("rb") as file:
        file.seek(begin)
        lines = file.read().decode(errors="replace").split("\n")
    return next((f"{line.strip()}; " for line in reversed(lines) if line.strip()), "")


_PROGRAM = "import sys; sys.path.append(sys.argv[1]); from cluster.fabric.watch.watcher import main; main()"
