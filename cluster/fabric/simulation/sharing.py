"""How flows share links: max-min fairness, which is what per-flow fair congestion control tends to."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from cluster.fabric.probing import Figures


@dataclass(frozen=True, kw_only=True)
class Shares:
    """What each of F flows gets."""

    rates: Figures
    """(F,) bytes a second."""
    shared: NDArray[np.bool_]
    """(F,) whether the link that bounds a flow carries others too."""


def max_min_shares(routes: NDArray[np.intp], capacities: Figures) -> Shares:
    """Progressive filling (Bertsekas and Gallager, Data Networks, 6.5.2), all locally tightest links at a time.

    routes: (F, H) links each flow crosses; capacities: (L,) of each link, infinite for those that fill up `routes`.
    Every flow must cross a link of finite capacity. A link whose equal share is the smallest for all flows on it keeps that
    share whatever happens elsewhere, so all such links are filled at once; a few dozen passes do for any number of flows.
    """
    num_links = len(capacities)
    left = capacities.astype(np.float64)
    rates = np.zeros(len(routes))
    shared = np.zeros(len(routes), dtype=bool)
    active = np.arange(len(routes))
    neighbours = np.bincount(routes.reshape(-1), minlength=num_links)
    while len(active):
        crossing = routes[active]
        count = np.bincount(crossing.reshape(-1), minlength=num_links)
        fair = left / np.maximum(count, 1)
        tightest = fair[crossing].min(1)
        # The smallest share that any flow of a link can hope for, over all its links.
        hope = np.full(num_links, np.inf)
        np.minimum.at(hope, crossing.reshape(-1), np.repeat(tightest, routes.shape[1]))
        full = (count > 0) & np.isfinite(fair) & (hope >= fair * (1 - 1e-12))
        bound = full[crossing] & (fair[crossing] <= tightest[:, None] * (1 + 1e-12))
        settled = bound.any(1)
        rates[active[settled]] = tightest[settled]
        shared[active[settled]] = (bound[settled] & (neighbours[crossing[settled]] > 1)).any(1)
        used = np.repeat(tightest[settled], routes.shape[1])
        taken = np.bincount(crossing[settled].reshape(-1), weights=used, minlength=num_links)
        left = np.maximum(left - taken, 0.0)
        active = active[~settled]
    return Shares(rates=rates, shared=shared)
