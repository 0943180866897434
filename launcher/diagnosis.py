"""What `mega doctor` looks at: whether this machine has what runs need, with the mend for each thing it lacks."""

from __future__ import annotations

import importlib.metadata
import re
import shutil
import socket
import sys
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from cluster.hardware import Hardware

State = Literal["ok", "optional", "missing"]

_GIB = 2**30
_LEAST_MEMORY = 4 * _GIB
_LEAST_DISK = 5 * _GIB
_LEAST_TORCH = (2, 11)


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One thing looked at. `optional`: absent or scarce, but runs work without; `missing`: they do not."""

    subject: str
    state: State
    detail: str
    mend: str = ""


def diagnose(hardware: Hardware, *, directory: Path, distribution: str = "mega") -> Iterator[Finding]:
    """All findings, from the machine up to the packages. Imports torch, where there is one."""
    yield from _machine(hardware, directory)
    yield from _interpreter()
    yield from _torch(hardware)
    yield from _compiler()
    yield host_name(socket.gethostname())
    yield from packages(distribution)


def _machine(hardware: Hardware, directory: Path) -> Iterator[Finding]:
    yield Finding(subject="processor", state="ok", detail=f"{hardware.cpu_name}, {hardware.num_cores} usable cores")
    yield memory_finding(hardware.memory_bytes)
    yield disk_finding(shutil.disk_usage(directory).free, directory)
    for index, device in enumerate(hardware.accelerators):
        peak = device.peak_bf16_flops
        known = f"published dense bf16 peak {peak / 1e12:g} TFLOP/s" if peak else "peak unknown, so runs show no MFU"
        detail = f"{device.name}, {device.memory_bytes / _GIB:.0f} GiB, {known}"
        yield Finding(subject=f"GPU {index}", state="ok", detail=detail)
    if not hardware.accelerators:
        yield Finding(subject="GPU", state="optional", detail="none that nvidia-smi lists; runs use the processor")


def memory_finding(num_bytes: int) -> Finding:
    """Whether the main memory is enough for the quickstart."""
    scarce = num_bytes < _LEAST_MEMORY
    return Finding(
        subject="memory",
        state="optional" if scarce else "ok",
        detail=f"{num_bytes / _GIB:.1f} GiB",
        mend="below 4 GiB: lower train.micro_batch_size, or take fewer ranks" if scarce else "",
    )


def disk_finding(free_bytes: int, directory: Path) -> Finding:
    """Whether there is room for data sets and checkpoints."""
    scarce = free_bytes < _LEAST_DISK
    return Finding(
        subject="disk",
        state="optional" if scarce else "ok",
        detail=f"{free_bytes / _GIB:.0f} GiB free in {directory}",
        mend="below 5 GiB: free some, or set run.directory and data.cache_directory to another disk" if scarce else "",
    )


def _interpreter() -> Iterator[Finding]:
    yield Finding(subject="Python", state="ok", detail=sys.version.split()[0])
    sample = Path(sysconfig.get_paths()["stdlib"]) / "json" / "decoder.py"
    yield Finding(
        subject="standard library",
        state="ok" if sample.is_file() else "optional",
        detail="its sources are here: the quickstart's corpus" if sample.is_file() else f"no sources ({sample})",
        mend="" if sample.is_file() else 'install Python with its sources, or set data.source = "text" and data.path',
    )


def _torch(hardware: Hardware) -> Iterator[Finding]:
    try:
        import torch
        import torch.distributed as dist
    except ImportError as error:
        mend = "pip install --constraint constraints.txt torch"
        yield Finding(subject="torch", state="missing", detail=f"cannot be imported: {error}", mend=mend)
        return
    yield torch_version_finding(torch.__version__)
    sees_gpu = torch.cuda.is_available()
    if hardware.accelerators and not sees_gpu:
        built = f"is built for CUDA {torch.version.cuda}" if torch.version.cuda else "is built without CUDA"
        yield Finding(
            subject="CUDA",
            state="optional",
            detail=f"there is a GPU, but torch sees none: this torch {built}",
            mend="install a torch built for this driver's CUDA (pytorch.org), and look at CUDA_VISIBLE_DEVICES",
        )
    elif sees_gpu:
        detail = f"{torch.version.cuda}, {torch.cuda.device_count()} visible device(s)"
        yield Finding(subject="CUDA", state="ok", detail=detail)
    gloo = dist.is_available() and dist.is_gloo_available()
    yield Finding(
        subject="gloo",
        state="ok" if gloo else "missing",
        detail="backend for ranks on processors" if gloo else "this torch is built without it",
        mend="" if gloo else "install torch from its official packages",
    )
    nccl = dist.is_available() and dist.is_nccl_available()
    if nccl or sees_gpu:
        yield Finding(
            subject="NCCL",
            state="ok" if nccl else "missing",
            detail="backend for ranks on GPUs" if nccl else "this torch is built without it",
            mend="" if nccl else "install torch from its official packages",
        )


def torch_version_finding(version: str) -> Finding:
    """Whether torch is new enough."""
    numbers = tuple(int(number) for number in re.findall(r"\d+", version)[:2])
    enough = numbers >= _LEAST_TORCH
    mend = "" if enough else "pip install --constraint constraints.txt torch"
    needed = "" if enough else ", but 2.11 or newer is needed"
    return Finding(subject="torch", state="ok" if enough else "missing", detail=version + needed, mend=mend)


def _compiler() -> Iterator[Finding]:
    try:
        import torch

        from megamodel.train.build import find_compiler
    except ImportError:
        return  # said above: there is no torch
    device = "cuda" if torch.cuda.is_available() else "cpu"
    found = find_compiler(device)
    yield Finding(
        subject="compiler",
        state="ok" if found else "optional",
        detail=found or "none: runs work without torch.compile, but slower",
        mend="" if found else "pip install triton" if device == "cuda" else "apt-get install g++, or set CXX",
    )
    header = Path(sysconfig.get_paths()["include"]) / "Python.h"
    if found and not header.is_file():
        mend = f"apt-get install python{sys.version_info.major}.{sys.version_info.minor}-dev"
        detail = f"{header} is not there; torch.compile may need it"
        yield Finding(subject="Python headers", state="optional", detail=detail, mend=mend)


def host_name(name: str) -> Finding:
    """Ranks find one another by name: gloo looks up the host's own."""
    try:
        address = socket.getaddrinfo(name, None)[0][4][0]
    except OSError:
        mend = f"add `127.0.0.1 {name}` to /etc/hosts, or set GLOO_SOCKET_IFNAME=lo for ranks on one machine"
        detail = f"{name} does not resolve, so several ranks may not find one another"
        return Finding(subject="host name", state="optional", detail=detail, mend=mend)
    return Finding(subject="host name", state="ok", detail=f"{name} resolves to {address}")


def packages(distribution: str) -> Iterator[Finding]:
    """The packages that `distribution` names, those of its extras too (the developers' extra left out)."""
    for requirement in importlib.metadata.requires(distribution) or ():
        name = re.split(r"[^A-Za-z0-9._-]", requirement, maxsplit=1)[0]
        extra = re.search(r"extra == ['\"]([^'\"]+)", requirement)
        if name == "torch" or (extra and extra[1] == "dev"):
            continue
        try:
            yield Finding(subject=name, state="ok", detail=importlib.metadata.version(name))
        except importlib.metadata.PackageNotFoundError:
            yield Finding(
                subject=name,
                state="optional" if extra else "missing",
                detail=f"not installed (extra `{extra[1]}`)" if extra else "not installed",
                mend=f"pip install --constraint constraints.txt '.[{extra[1]}]'" if extra else "make setup",
            )
