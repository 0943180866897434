"""The agent of a host whose ranks torchrun starts: `python -m launcher.jobs.torchrun.agent`, a child of `mega launch`."""

from __future__ import annotations

import asyncio
import os
import sys

from cluster.hardware import num_usable_cores
from launcher import rank_process
from launcher.errors import ConfigError, RunError
from launcher.jobs.agents.agent import Agent, read_place
from launcher.jobs.torchrun.ranks import TorchrunRanks
from launcher.output import Output


def main() -> int:
    """Until it is sent home, or has lost the head; the exit code, see `launcher.jobs.agents.agent`."""
    rank_process.enter(os.environ)
    out = Output(as_json=False)
    try:
        place = read_place(os.environ)
        agent = Agent(place, environ=os.environ, num_cores=num_usable_cores(), say=out.warn, ranks=TorchrunRanks)
        return asyncio.run(agent.run())
    except (ConfigError, RunError) as error:
        out.warn(f"error: {error}")
        return error.exit_code


if __name__ == "__main__":
    sys.exit(main())
