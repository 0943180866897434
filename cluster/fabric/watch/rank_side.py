"""The rank's side of the watch: a thread that tells the host's watcher, once a second, what this rank's collectives do."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from cluster.fabric.watch.setup import WatchSetup


class Watch:
    """One rank's line to the watch. Its methods may be called from any thread; none waits for anybody."""

    def send(self, kind: str, payload: Mapping[str, Any]) -> bool:
        """Gives the head's analysers `payload` (plain data for JSON, at most about 100 kB). False: it could not be sent now,
        and is dropped."""
        raise NotImplementedError

    def close(self) -> None:
        """This rank leaves in good order: from now on it cannot be missing. May be called twice."""
        raise NotImplementedError


def start_watch(setup: WatchSetup) -> Watch:
    """Starts this rank's part of the watch, and on local rank 0 the watcher of the host.

    A collective over all ranks by way of `setup.exchange`; to be called from the main thread, once the first process group
    exists. Raises FabricError, on every rank, where the watch cannot be had (no Linux, rank 0's watcher does not start): a
    caller may train on without. `close` belongs into a `finally`.
    """
    raise NotImplementedError
