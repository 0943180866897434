"""How many files this process may open: rank 0 has a connection or two to every rank. Imports without torch."""

from __future__ import annotations

import resource

from cluster.errors import FabricError

_OWN_FILES = 128
"""What a process with torch has open before it knows anybody, and to spare."""


def allow_connections(count: int) -> None:
    """Raises this process's limit as far as it may itself. Raises FabricError where `count` connections go beyond that."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    if hard != resource.RLIM_INFINITY and hard < count + _OWN_FILES:
        raise FabricError(
            f"rank 0 may open {hard} files, and needs about {count + _OWN_FILES} for its connections to all ranks: raise "
            "its hard limit (ulimit -Hn; LimitNOFILE of the service that starts ranks)"
        )
