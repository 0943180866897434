"""What one rank says of itself: what is installed and set, as hashes first, and as names and values where these differ.

Only variables that matter to training are ever told, and of those whose names speak of secrets a hash alone.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import json
import platform
import re
import shutil
import sys
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from cluster.preflight.device import device_facts, graphics_cards

Values = dict[str, str]
"""Names and values of one section."""
SECTIONS = ("versions", "sources", "packages", "environment")

_MATTERS = re.compile(
    r"(NCCL|RCCL|GLOO|UCX|FI|CUDA|CUBLAS|CUDNN|NVIDIA|HSA|ROCR|OMP|GOMP|KMP|MKL|OPENBLAS|MALLOC)_|(PY)?TORCH|PYTHON"
    r"|(CUBLASLT_WORKSPACE_SIZE|LD_LIBRARY_PATH|LD_PRELOAD|GLIBC_TUNABLES)$"
)
_OF_ONE_RANK = re.compile(
    r"(CUDA|ROCR|NVIDIA)_VISIBLE_DEVICES|CUDA_MPS_|CUDA_CACHE_PATH|NCCL_DEBUG_FILE|NCCL_HOSTID|UCX_NET_DEVICES"
    r"|TORCHELASTIC_|TORCHINDUCTOR_CACHE_DIR|TORCH_\w+_(TEMP|PIPE)_FILE|OMP_PLACES|(GOMP_CPU|KMP)_AFFINITY"
)
"""May differ from rank to rank or host to host by intent: launchers and schedulers set them."""
_FOLDERS = ("LD_LIBRARY_PATH", "PYTHONPATH")
_SECRET = re.compile(r"TOKEN|SECRET|PASSW|CREDENTIAL|API_?KEY|AUTH", re.IGNORECASE)
FROM_RANK_0 = "from-rank-0"
"""Name of the file by which the others see whether they share rank 0's files."""
_DISTRIBUTION = re.compile(r"(?P<name>.+?)-(?P<version>[^-]+)\.(dist|egg)-info$")


class RankFacts:
    """Answers rank 0's questions: `answer` is for `run_on_fabric`."""

    def __init__(
        self,
        *,
        environ: Mapping[str, str],
        packages: Sequence[str],
        local_rank: int,
        network: Mapping[str, Any],
        not_compared: Collection[str] = (),
        device: str | None = None,
    ) -> None:
        """
        Args:
            environ: of this process.
            packages: names of the packages whose own files must be the same everywhere.
            local_rank: the number of this rank's GPU on its host.
            network: `NetworkChoice.as_data()`, or `{"error": why there is none}`.
            not_compared: variables that the launcher has chosen for this host by itself.
            device: that the run asks for, as `device_facts` knows it.
        """
        self._read: dict[str, Callable[[], Values]] = {
            "versions": versions,
            "sources": lambda: sources(packages),
            "packages": lambda: distributions(sys.path),
            "environment": lambda: environment(environ, not_compared),
        }
        self._known: dict[str, Values] = {}
        self._local_rank = local_rank
        self._network = network
        self._device = device
        self.verdict: Mapping[str, Any] | None = None
        """What rank 0 has told of the outcome: `ok` and `sentences`. None until then."""

    def answer(self, question: Mapping[str, Any]) -> dict[str, Any]:
        """To `ask`: clock, rank, section, host; a verdict is only taken note of."""
        asked = question["ask"]
        if asked == "clock":
            return {"time": time.time()}
        if asked == "rank":
            hashes = {section: digest(self._values(section)) for section in SECTIONS}
            device = device_facts(self._local_rank, self._device)
            return {"hashes": hashes, "device": device, "network": dict(self._network)}
        if asked == "section":
            return {"values": self._values(question["section"])}
        if asked == "host":
            return {
                **shared_folder(Path(question["directory"]), question["folder"], question["nonce"], question["name"]),
                "cards": graphics_cards() if question["cards"] else [],
            }
        assert asked == "verdict"
        self.verdict = question
        return {}

    def _values(self, section: str) -> Values:
        if section not in self._known:
            self._known[section] = self._read[section]()
        return self._known[section]


def digest(values: Mapping[str, str]) -> str:
    """The same for equal values alone."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:16]


def versions() -> Values:
    """Of the interpreter and of the libraries that compute and communicate."""
    import numpy
    import torch

    found = {
        "Python": f"{platform.python_implementation()} {platform.python_version()}",
        "machine": platform.machine(),
        "C library": " ".join(platform.libc_ver()),
        "torch": torch.__version__,
        "numpy": numpy.__version__,
    }
    if torch.version.cuda:
        found["CUDA of torch"] = torch.version.cuda
        found["cuDNN"] = str(torch.backends.cudnn.version())
        with contextlib.suppress(AttributeError, ImportError, RuntimeError):  # a torch that is built without it
            found["NCCL"] = ".".join(map(str, torch.cuda.nccl.version()))
    return found


def sources(packages: Sequence[str]) -> Values:
    """Hash of each Python file of `packages`, by its path from the package's folder on."""
    found: Values = {}
    for package in packages:
        spec = importlib.util.find_spec(package)
        for folder in (spec.submodule_search_locations or []) if spec else []:
            for file in Path(folder).rglob("*.py"):
                found[f"{package}/{file.relative_to(folder)}"] = hashlib.sha256(file.read_bytes()).hexdigest()[:16]
    return found


def distributions(search_path: Sequence[str]) -> Values:
    """Version of each installed distribution, as its folder's name tells; of two the one that Python finds first."""
    found: Values = {}
    for folder in search_path:
        try:
            names = [entry.name for entry in Path(folder or ".").iterdir()]
        except OSError:
            continue
        for name in sorted(names):
            if match := _DISTRIBUTION.match(name):
                found.setdefault(match["name"].lower().replace("_", "-"), match["version"])
    return found


def environment(environ: Mapping[str, str], not_compared: Collection[str] = ()) -> Values:
    """The variables that matter to training and should be the same everywhere. Of one that is named like a secret its hash; of
    a list of folders each once."""
    return {
        name: f"(hidden, hash {digest({name: value})})" if _SECRET.search(name) else _without_repeats(name, value)
        for name, value in sorted(environ.items())
        if _MATTERS.match(name) and not _OF_ONE_RANK.match(name) and name not in not_compared
    }


def _without_repeats(name: str, value: str) -> str:
    """mpirun puts the folder of its libraries before the others', once more on each host that it comes to."""
    return ":".join(dict.fromkeys(filter(None, value.split(":")))) if name in _FOLDERS else value


def shared_folder(directory: Path, folder: str | None, nonce: str, name: str) -> dict[str, Any]:
    """Whether this host sees what rank 0 wrote in `directory/folder`, and can write there itself, in a file `name`.

    folder: None where rank 0 could not make one; then only writing to `directory` is tried.
    """
    found: dict[str, Any] = {"free_bytes": None, "read_error": "", "write_error": ""}
    with contextlib.suppress(OSError):
        found["free_bytes"] = shutil.disk_usage(directory).free
    if folder is None:
        trial = directory / f"{name}.{nonce}"
        found["write_error"] = write_error(trial, nonce)
        with contextlib.suppress(OSError):
            trial.unlink()
        return found
    try:
        seen = (directory / folder / FROM_RANK_0).read_text(encoding="ascii")
        found["read_error"] = "" if seen == nonce else "what stands there is not what rank 0 wrote"
    except (OSError, ValueError) as error:
        found["read_error"] = _reason(error)
    if not found["read_error"]:
        found["write_error"] = write_error(directory / folder / name, nonce)
    return found


def write_error(path: Path, text: str) -> str:
    """Writes a file; returns why that failed, empty where it did not."""
    try:
        path.write_text(text, encoding="ascii")
    except OSError as error:
        return _reason(error)
    return ""


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error)
