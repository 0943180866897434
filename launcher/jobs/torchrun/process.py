"""torchrun on one host, for one attempt: `python -m launcher.jobs.torchrun.process`, a child of the host's agent.

It is `torch.distributed.run` itself: its rendezvous, its agent, its environment of the workers. Three things differ, since
the supervisor of the job decides what follows from the end of a rank. Each rank's start and end is told at once, by a JSON
object a line. A rank that fails takes no other one with it: the SIGTERM would make them save. And no rank is started again
here, where nobody notices that a host is lost as long as ranks wait for it.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launcher import rank_process
from launcher.jobs.torchrun.order import TorchrunOrder

if TYPE_CHECKING:
    from torch.distributed.elastic.agent.server.api import RunResult, WorkerGroup
    from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
    from torch.distributed.elastic.multiprocessing import LogsDest, LogsSpecs

_MEET_S = 300
"""For the nodes to meet. Their agents have come already, but torch may take long to load; who is lost the supervisor knows."""
_SAVE_S = 60
"""For ranks to end where this process alone is asked to."""


def main(arguments: Sequence[str]) -> None:
    """Entry point of the process: runs until all ranks of its order have ended."""
    rank_process.enter(os.environ)
    os.environ[rank_process.SUPERVISOR_PID] = str(os.getpid())  # for the ranks
    from torch.distributed import run as torchrun
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher import api

    order = TorchrunOrder.from_text(arguments[0])
    config, command, words = torchrun.config_from_args(torchrun.parse_args(order.as_arguments(timeout_s=_MEET_S)))
    config.logs_specs = _outputs(order)
    config.shutdown_timeout = _SAVE_S
    api.LocalElasticAgent = _agent_class(order)  # type: ignore[misc]  # it takes no agent as an argument
    try:
        api.elastic_launch(config, command)(*words)
    except ChildFailedError:
        sys.exit(1)  # how each rank has ended is told


def _outputs(order: TorchrunOrder) -> LogsSpecs:
    from torch.distributed.elastic.multiprocessing import LogsDest, LogsSpecs

    class Outputs(LogsSpecs):
        """Each rank prints into an open file of its own, and leaves its failure where the others do."""

        @property
        def root_log_dir(self) -> str:
            return ""

        def reify(self, envs: dict[int, dict[str, str]]) -> LogsDest:
            for environ in envs.values():
                record = Path(order.directory) / f"rank-{environ['RANK']}.failure.json"
                environ[rank_process.FAILURE_FILE] = str(record)
            files = {place: f"/dev/fd/{order.outputs[place]}" for place in envs}
            return LogsDest(stdouts=files, stderrs=dict(files), error_files=dict.fromkeys(envs, os.devnull))

    return Outputs()


def _agent_class(order: TorchrunOrder) -> type[LocalElasticAgent]:
    from torch.distributed.elastic.agent.server.api import RunResult, WorkerState
    from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent

    class TellingAgent(LocalElasticAgent):
        """Tells of the ranks, and lets each end by itself."""

        _running: dict[int, int]
        """Process of each local rank."""

        def _start_workers(self, worker_group: WorkerGroup) -> dict[int, Any]:
            # They begin so, see `launcher.rank_process`.
            before = signal.pthread_sigmask(signal.SIG_BLOCK, rank_process.stop_signals())
            try:
                pids: dict[int, int] = super()._start_workers(worker_group)
            finally:
                signal.pthread_sigmask(signal.SIG_SETMASK, before)
            self._running = dict(pids)
            for place, handler in self._handlers().items():
                # The rank has them; here they would keep its pipe open.
                for stream in (handler._stdout, handler._stderr):
                    stream.close()
                os.close(order.outputs[place])
                self._tell(place, pid=pids[place])
            return pids

        def _monitor_workers(self, worker_group: WorkerGroup) -> RunResult:
            self._tell_ends()
            if self._running:
                return RunResult(state=WorkerState.HEALTHY)
            return super()._monitor_workers(worker_group)

        def _shutdown(self, *arguments: Any, **options: Any) -> None:
            super()._shutdown(*arguments, **options)
            if self._pcontext:
                self._tell_ends()

        def _tell_ends(self) -> None:
            for place, pid in tuple(self._running.items()):
                process = self._handlers()[place].proc
                if process.returncode is None:
                    if os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
                        continue
                    # What it has started ends too; before it is reaped, so that its id cannot mean anybody else yet.
                    with contextlib.suppress(ProcessLookupError):
                        os.killpg(pid, signal.SIGKILL)
                    process.wait()
                del self._running[place]
                self._tell(place, code=process.returncode, at=time.time())

        def _handlers(self) -> dict[int, Any]:
            context: Any = self._pcontext
            handlers: dict[int, Any] = context.subprocess_handlers
            return handlers

        def _tell(self, place: int, **report: Any) -> None:
            rank = order.node_rank * order.ranks_per_node + place
            os.write(order.reports, json.dumps({"rank": rank, **report}).encode() + b"\n")

    return TellingAgent


if __name__ == "__main__":
    main(sys.argv[1:])
