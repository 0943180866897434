"""`mega agent`: not for people. `mega launch` starts it on each host."""

from __future__ import annotations

import os
import sys

from launcher.errors import ConfigError, RunError
from launcher.output import Output


def agent(out: Output) -> int:
    """Run the ranks of a job on this host. `mega launch` starts this itself, on each host."""
    import asyncio

    from cluster.hardware import num_usable_cores
    from launcher.jobs.agents.agent import Agent, read_place

    place = read_place(os.environ)
    return asyncio.run(Agent(place, environ=os.environ, num_cores=num_usable_cores(), say=out.warn).run())


def main() -> None:
    """The verb without the rest of the command line, which takes twice as long to load: from one file server, perhaps, to all
    hosts at once."""
    out = Output(as_json=False)
    try:
        code = agent(out)
    except (ConfigError, RunError) as error:
        out.warn(f"error: {error}")
        code = error.exit_code
    sys.exit(code)
