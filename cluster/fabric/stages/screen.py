"""All pairs, both ways, a few times over: enough to suspect, not to accuse."""

from __future__ import annotations

from cluster.fabric.analysis.explain import Explanation, explain
from cluster.fabric.schedule import both_ways, circle_rounds, halving_rounds, renamed
from cluster.fabric.stages.session import Session

_REPEATS, _MOST_REPEATS = 3, 5
"""Budget: of passes over all pairs."""
_QUIET, _REPEATS_IN_QUIET = 0.025, 2
"""Statistics: standard deviation of the logarithm of a rate below which two repeats show what three do."""
_MANY, _REPEATS_OF_MANY = 16, 2
"""Budget: with more endpoints than this each row and column has so many pairs that fewer repeats suffice."""
_NOISY = 0.08
"""Statistics: standard deviation of the logarithm of a rate above which three repeats are too few to see a loss of a fifth in a
path."""


def screen(session: Session) -> Explanation:
    """Measures every pair, by turns in the hosts' order (halves against halves) and in random order, and explains it."""
    session.during = "the pair matrix"
    order = _by_leaf(session)
    session.calibrate(both_ways(renamed(halving_rounds(session.count)[:1], order)[0]))
    session.time_start_up(renamed(circle_rounds(session.count)[:1], order)[0])
    session.restart_counters()
    repeats = _REPEATS if session.count <= _MANY else _REPEATS_OF_MANY
    for repeat in range(_MOST_REPEATS):
        if repeat == _REPEATS_IN_QUIET and session.seen.noise() < _QUIET:
            break
        if repeat >= repeats and (session.seen.noise() < _NOISY or not session.in_time(0.5)):
            break
        # Pairs of one round share its accidents: another order mixes them anew.
        rounds = renamed(halving_rounds(session.count), order)
        if repeat % 2:
            rounds = renamed(circle_rounds(session.count), session.rng.permutation(session.count))
        for index in session.rng.permutation(len(rounds)):
            flows = both_ways(rounds[index])
            session.seen.add(flows, session.transfer(flows))
    session.read_counters()
    return explain(
        session.seen,
        leaves=[endpoint.leaf for endpoint in session.endpoints],
        least_effect=session.settings.least_bandwidth_loss,
    )


def _by_leaf(session: Session) -> list[int]:
    """Endpoints in order, those of one leaf switch side by side."""
    leaves = [endpoint.leaf or "" for endpoint in session.endpoints]
    first = {leaf: index for index, leaf in reversed(list(enumerate(leaves)))}
    return sorted(range(session.count), key=lambda index: (first[leaves[index]], index))
