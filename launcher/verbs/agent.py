"""`mega agent`: not for people. `mega launch` starts it on each host."""

from __future__ import annotations

import os

from launcher.output import Output


def agent(out: Output) -> int:
    """Run the ranks of a job on this host. `mega launch` starts this itself, on each host."""
    import asyncio

    from cluster.hardware import num_usable_cores
    from launcher.jobs.agent import Agent, read_place
    from launcher.jobs.agent_ranks import AgentRanks
    from launcher.jobs.torchrun.order import RANKS_BY
    from launcher.jobs.torchrun.ranks import TorchrunRanks

    place = read_place(os.environ)
    ranks = TorchrunRanks if os.environ.get(RANKS_BY) == "torchrun" else AgentRanks
    agent = Agent(place, environ=os.environ, num_cores=num_usable_cores(), say=out.warn, ranks=ranks)
    return asyncio.run(agent.run())
