"""Which flows compete for a congested uplink: own ones, named by leaving out one at a time, or strangers'."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from cluster.fabric.analysis.sentences import names_in_words, rate_in_words
from cluster.fabric.probing import Figures, Flows
from cluster.fabric.stages.confirm import Confirmed
from cluster.fabric.stages.session import Session
from cluster.fabric.statistics import contrast

_REPEATS = 3
"""Budget: as many as a mean and its spread need."""
_MOST_LEFT_OUT = 8
"""Budget, and physics: with more flows than this neighbours are left out together, since among k flows that share alike the
others gain 1 / (k - 1) without one, which is lost in the noise where k is great."""
_SHARE_OF_TIME = 0.8
"""Budget: of the time for repeats. Names are evidence; the rest of the time belongs to compute."""
_SHARES = 0.08
"""Effect of interest: the least gain of the other flows, as a logarithm, that counts as sharing. Half of what eight flows that
share alike gain without one of them."""
_LARGEST_TAIL = 0.05
"""Statistics: probability of such a gain by chance. The uplink itself is convicted before; this only names flows."""
_KNOWN_DOF = 4
"""Statistics: the screening's noise counts as this many repeats, since two or three may agree by chance."""
_MOST_NAMES = 4
"""Budget of a sentence. The evidence lists all."""


def competitors(session: Session, item: Confirmed, *, standing: bool) -> dict[str, Any]:
    """Evidence: rates of flows that cross alone, which flows' absence makes the others faster, and a sentence's end.

    A flow that is slow alone as well is not slowed by its own kind; nor are flows by themselves the reason for packets that
    queue when none of them runs (`standing`). `competitors` is "foreign", "own", or "foreign and own" where strangers are there
    and own flows take from one another what those leave. `competing_flows` are lists of sending and receiving host.

    Two rounds at least. Flows are left out one after another as long as there is time, in random order.
    """
    session.during = "flows one by one"
    flows = _crossing(session, item)
    blocks = np.array_split(np.arange(len(flows)), min(len(flows), _MOST_LEFT_OUT))
    gains, single = _measured(session, flows, blocks)
    shares = [contrast(gain, known_spread=1.2 * session.seen.noise(), known_dof=_KNOWN_DOF) for gain in gains if gain]
    tried = [block for block, gain in zip(blocks, gains, strict=True) if gain]
    named = [
        flows[index]
        for block, share in zip(tried, shares, strict=True)
        if share.mean > _SHARES and share.tail_beyond(0.0) < _LARGEST_TAIL
        for index in block
    ]
    hosts = [[session.endpoints[end].host for end in flow] for flow in named]
    slow_alone = bool(np.log(item.control_bytes_per_s) - single > 2 * session.settings.least_log_loss)
    foreign = slow_alone or standing
    gain = max((share.mean for share in shares), default=0.0)
    return {
        "alone_bytes_per_s": float(np.exp(single)),
        "left_out": len(tried),
        "gain_without_one_share": float(np.expm1(gain)),
        "competing_flows": hosts,
        "competitors": "foreign and own" if foreign and hosts else "foreign" if foreign else "own",
        "competitors_in_words": _in_words(hosts, gain, foreign=_reason(foreign, slow_alone, single), tried=len(tried)),
    }


def _measured(session: Session, flows: Flows, blocks: Sequence[np.ndarray]) -> tuple[list[list[float]], float]:
    """For each block of flows what the others gained without it, by logarithms; and the logarithm of the rate of one alone.

    Each repeat lies between two rounds of all flows, lest a drift of the whole fabric look like a gain; and tries another
    flow alone.
    """
    gains: list[list[float]] = [[] for _ in blocks]
    alone: list[float] = []
    before = _logs(session, flows)
    for repeat in range(_REPEATS):
        alone.append(float(_logs(session, flows[[repeat % len(flows)]])[0]))
        left: list[tuple[int, np.ndarray, Figures]] = []
        for number in session.rng.permutation(len(blocks)) if len(blocks) > 1 else ():
            if not session.in_time(_SHARE_OF_TIME):
                break
            kept = np.setdiff1d(np.arange(len(flows)), blocks[number])
            left.append((int(number), kept, _logs(session, flows[kept])))
        in_time = session.in_time(_SHARE_OF_TIME)
        after = _logs(session, flows) if in_time and left else before
        for number, kept, logs in left:
            gains[number].append(float(np.mean(logs - 0.5 * (before + after)[kept])))
        before = after
        if not in_time:
            break
    return gains, float(np.median(alone))


def _logs(session: Session, flows: Flows) -> Figures:
    return np.log(np.maximum(session.transfer(flows), 1.0))


def _reason(foreign: bool, slow_alone: bool, single: float) -> str:
    """Why strangers must be there; empty where nothing speaks for them."""
    if not foreign:
        return ""
    if slow_alone:
        return f"a flow alone is slow too, at {rate_in_words(float(np.exp(single)))}"
    return "packets queue in it while our flows rest"


def _in_words(hosts: Sequence[Sequence[str]], gain: float, *, foreign: str, tried: int) -> str:
    names = names_in_words([f"{sender} to {receiver}" for sender, receiver in hosts], _MOST_NAMES) if hosts else ""
    freed = f"without one of them the others gain up to {np.expm1(gain):.0%}"
    if foreign:
        said = f"foreign traffic competes ({foreign})"
        if hosts:
            return f"{said}, and our flows {names} share what it leaves ({freed})"
        return f"{said}; leaving out our own flows in turn frees nothing" if tried else said
    said = "a flow alone is not slow, our own flows compete"
    if hosts:
        return f"{said}: {names} ({freed})"
    return f"{said}, though no single one of them takes enough to be named"


def _crossing(session: Session, item: Confirmed) -> Flows:
    """(F, 2) flows from one group to the other, as many as can be disjoint."""
    sides = [session.rng.permutation(sorted(side)).tolist() for side in (item.part.senders, item.part.receivers)]
    return np.array(list(zip(*sides)), dtype=np.intp)
