"""Where this process stands: alone, one rank of a world that somebody else started, or about to start ranks."""

from __future__ import annotations

import importlib.util
import runpy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from launcher.errors import ConfigError
from launcher.rank_process import failure_file


@dataclass(frozen=True, kw_only=True)
class Place:
    """This process's place in its run."""

    rank: int
    num_ranks: int
    joins: bool
    """Whether the ranks are there already and this process is one of them. False: it is to start them, or is alone."""
    child_of_mega: bool
    """Whether `mega --ranks` started it, and so has seen to the run's directory."""


def find_place(environ: Mapping[str, str], ranks: int | None) -> Place:
    """The place that torchrun's variables and `--ranks` give.

    Raises ConfigError where the two disagree, or the variables make no sense.
    """
    if "RANK" not in environ and "WORLD_SIZE" not in environ:
        return Place(rank=0, num_ranks=ranks or 1, joins=False, child_of_mega=False)
    rank, world_size = (environ.get(name, "").strip() for name in ("RANK", "WORLD_SIZE"))
    if not (rank.isdecimal() and world_size.isdecimal() and int(rank) < int(world_size)):
        raise ConfigError(
            f"RANK={rank!r} and WORLD_SIZE={world_size!r} in the environment are not a rank and a number of ranks: "
            "set both as torchrun does, or unset both"
        )
    if ranks is not None and ranks != int(world_size):
        raise ConfigError(
            f"--ranks {ranks}: this process already is rank {rank} of {world_size} (RANK and WORLD_SIZE are set, as "
            "torchrun sets them); leave --ranks out"
        )
    return Place(rank=int(rank), num_ranks=int(world_size), joins=True, child_of_mega=failure_file(environ) is not None)


def ranks_to_start(asked: int, *, device: str, environ: Mapping[str, str], say: Callable[[str], None]) -> int:
    """`asked`, or as many ranks as there are GPUs where a run on GPUs asked for more: a GPU serves one rank.

    Global batches do not depend on the number of ranks, so fewer of them train the same model.
    """
    gpus = 0 if device == "cpu" else num_usable_gpus(environ)
    if 0 < gpus < asked:
        have = "1 GPU" if gpus == 1 else f"{gpus} GPUs"
        say(f"{have} here, and a GPU serves one rank: starting {gpus} instead of {asked}.")
        return gpus
    return asked


def num_usable_gpus(environ: Mapping[str, str]) -> int:
    """GPUs that torch would see, found without importing it: none where it is built without CUDA."""
    if not torch_has_cuda():
        return 0
    from cluster.hardware import nvidia_accelerators

    present = len(nvidia_accelerators())
    visible = environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None or present == 0:
        return present
    chosen = [name.strip() for name in visible.split(",")]
    # CUDA takes the devices up to the first that is not one.
    return next((index for index, name in enumerate(chosen) if name in ("", "-1")), len(chosen))


def torch_has_cuda() -> bool:
    """Whether the installed torch is built for CUDA, as its own version file says."""
    found = importlib.util.find_spec("torch")
    if found is None or found.origin is None:
        return False
    version_file = Path(found.origin).with_name("version.py")
    return version_file.is_file() and bool(runpy.run_path(str(version_file)).get("cuda"))
