"""`mega fabric baseline save|list|check`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from launcher.output import Output
from launcher.verb import EXIT_REFUSED

SweepFile = Annotated[Path, typer.Argument(metavar="SWEEP.json", help="What `mega fabric sweep --output` wrote.")]
Store = Annotated[Path, typer.Option(help="Folder that holds the baselines of all clusters.")]
Cluster = Annotated[str, typer.Option(help="Name of the cluster.")]
Against = Annotated[str | None, typer.Option(help="Name of the stored sweep to compare with. Default: the newest.")]
NameOption = Annotated[str | None, typer.Option("--name", help="Name to store it under. Default: when it was taken.")]

_STORE = Path("baselines")


def save(
    out: Output, file: SweepFile, store: Store = _STORE, cluster: Cluster = "cluster", name: NameOption = None
) -> int:
    """Keep a sweep as a baseline of its cluster."""
    from cluster.fabric.baseline import BaselineStore
    from cluster.fabric.sweep import read_sweep

    path = BaselineStore(store, cluster).save(read_sweep(file), name)
    out.say(f"Kept as {path}.")
    out.result({"path": str(path), "name": path.stem})
    return 0


def list_(out: Output, store: Store = _STORE, cluster: Cluster = "cluster") -> int:
    """List a cluster's baselines, oldest first."""
    from cluster.fabric.baseline import BaselineStore

    names = BaselineStore(store, cluster).names()
    for name in names:
        out.say(name)
    out.result({"cluster": cluster, "names": list(names)})
    return 0


def check(
    out: Output, file: SweepFile, store: Store = _STORE, cluster: Cluster = "cluster", against: Against = None
) -> int:
    """Hold a sweep against a baseline; end with 3 where something has become slower by more than the noise."""
    from cluster.fabric.baseline import BaselineStore
    from cluster.fabric.sweep import read_sweep

    found = BaselineStore(store, cluster).check(read_sweep(file), against)
    for regression in found.regressions:
        out.say(regression.sentence)
    if found.ok:
        out.say(f"Nothing is slower than in {found.baseline} ({found.num_compared} comparisons).")
    out.result(found.as_data())
    return 0 if found.ok else EXIT_REFUSED


VERBS: dict[str, Callable[..., int]] = {"save": save, "list": list_, "check": check}
