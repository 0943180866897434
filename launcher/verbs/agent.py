"""`mega agent`: not for people. `mega launch` starts it on each host."""

from __future__ import annotations

import os

from launcher.output import Output


def agent(out: Output) -> int:
    """Run the ranks of a job on this host. `mega launch` starts this itself, on each host."""
    import asyncio

    from cluster.hardware import num_usable_cores
    from launcher.jobs.agent import Agent, read_place

    place = read_place(os.environ)
    return asyncio.run(Agent(place, environ=os.environ, num_cores=num_usable_cores(), say=out.warn).run())
