"""How long a message takes to start among very many endpoints: one round, where the budget leaves one."""

from __future__ import annotations

from cluster.fabric.schedule import random_pairs
from cluster.fabric.stages.session import Session
from cluster.fabric.wide.computing import MOST_ROUNDS
from cluster.fabric.wide.layout import layout_of

_PAIRS = 200
"""Budget: the median of so many is exact to a tenth of their spread."""


def time_start_up(session: Session, *, left: int = 0) -> None:
    """Of random pairs of different hosts. Nothing is done once it is known.

    left: rounds that shall be left after this one. Where leaves are known the number of rounds is bounded, and a diagnosis
    that both network and compute keep in doubt to the end has no round for this.
    """
    layout = layout_of(session.endpoints)
    if session.alpha_s is not None or (layout.num_leaves > 1 and session.rounds + left >= MOST_ROUNDS):
        return
    session.during = "round trips"
    pairs = random_pairs(range(session.count), session.rng)
    session.time_start_up(pairs[layout.host_of[pairs[:, 0]] != layout.host_of[pairs[:, 1]]][:_PAIRS])
