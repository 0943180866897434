"""Whether a device computes rightly, and how fast: a product whose result is known."""

from __future__ import annotations

import csv
import subprocess
import time
from typing import Any

import numpy as np
import torch

_SIDE, _CUDA_SIDE = 512, 2048
"""Of the matrices. The larger one has a tile for each of a GPU's processors."""
_SHARE_NONZERO = 1 / 16
"""So that sums of that many products stay below 256, and are exact in every number format, bfloat16 too."""
_TIMED_S = 0.1
_QUERY = ("name", "driver_version", "ecc.mode.current", "ecc.errors.uncorrected.volatile.total")
_COMMAND_TIMEOUT_S = 20.0


def device_facts(local_rank: int, wanted: str | None = None) -> dict[str, Any]:
    """Of the device of this rank: `name` and `count` of the GPUs that it sees (None, 0 on a processor), `error` of its
    computing, `seconds` of a product, on a GPU alone: ranks on processors share their cores, and `lacks`: why it has no device
    as `wanted` ("auto", "cuda", "cpu", None for whatever there is), empty where it has one."""
    count = torch.cuda.device_count()
    lacks = "" if wanted is None else _lacks(wanted, local_rank, count)
    if not torch.cuda.is_available() or local_rank >= count:
        return {
            "name": None,
            "count": count,
            "error": product_error(torch.device("cpu")),
            "seconds": None,
            "lacks": lacks,
        }
    device = torch.device("cuda", local_rank)
    try:
        error, seconds = product_error(device), _product_seconds(device)
    except RuntimeError as failure:  # CUDA's errors are RuntimeErrors
        error, seconds = (str(failure).strip() or type(failure).__name__).splitlines()[0], None
    return {
        "name": torch.cuda.get_device_name(device),
        "count": count,
        "error": error,
        "seconds": seconds,
        "lacks": lacks,
    }


def _lacks(wanted: str, local_rank: int, count: int) -> str:
    if wanted == "cuda" and not count:
        return 'run.device = "cuda": no CUDA device' + ("" if torch.version.cuda else " (torch is built without CUDA)")
    if wanted != "cpu" and 0 < count <= local_rank:
        return f'run.device = "{wanted}": fewer CUDA devices ({count}) than ranks'
    return ""


def product_error(device: torch.device) -> str:
    """Multiplies two matrices of small whole numbers, and says in what the result is wrong; empty where it is right.

    No element may differ at all: the sums are exact in any order. Against a reference of numpy's, on the processor, by the
    products with a random vector (Freivalds, 1977), which costs a hundredth of the product itself and misses no single wrong
    element.
    """
    rng = np.random.default_rng(20)
    side = _CUDA_SIDE if device.type == "cuda" else _SIDE
    left_SS, right_SS = (
        (rng.random((side, side)) < _SHARE_NONZERO) * rng.choice(np.array([-1.0, 1.0]), (side, side)) for _ in range(2)
    )
    weights_S = rng.integers(1, 1000, side).astype(np.float64)
    expected_S = left_SS @ (right_SS @ weights_S)
    for dtype in (torch.float32, torch.bfloat16):
        result_SS = torch.from_numpy(left_SS).to(device, dtype) @ torch.from_numpy(right_SS).to(device, dtype)
        wrong = np.flatnonzero(result_SS.double().cpu().numpy() @ weights_S != expected_S)
        if wrong.size:
            return f"{wrong.size} of {side} rows of a {str(dtype).removeprefix('torch.')} matrix product are wrong"
    return ""


def _product_seconds(device: torch.device) -> float:
    """Of one product, the shortest of many: so what is told is the device's best, with its clocks up."""
    given_SS = torch.ones(_CUDA_SIDE, _CUDA_SIDE, device=device, dtype=torch.bfloat16)
    shortest, end = float("inf"), time.monotonic() + _TIMED_S
    while time.monotonic() < end:
        torch.cuda.synchronize(device)
        begin = time.perf_counter()
        for _ in range(8):
            torch.mm(given_SS, given_SS)
        torch.cuda.synchronize(device)
        shortest = min(shortest, (time.perf_counter() - begin) / 8)
    return shortest


def graphics_cards(command: str = "nvidia-smi") -> list[dict[str, str]]:
    """Of each GPU of this host `name`, `driver`, `ecc` (its mode) and `uncorrected` (errors of memory since the driver was
    loaded), as nvidia-smi says; none where it is not there or does not answer."""
    query = [command, f"--query-gpu={','.join(_QUERY)}", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, check=True, timeout=_COMMAND_TIMEOUT_S)
    except (OSError, subprocess.SubprocessError):
        return []
    rows = [[cell.strip() for cell in row] for row in csv.reader(done.stdout.splitlines()) if len(row) == len(_QUERY)]
    return [dict(zip(("name", "driver", "ecc", "uncorrected"), row)) for row in rows]
