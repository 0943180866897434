"""What this machine is: cores, memory, accelerators, and the published peak of the accelerators that are well known.

Imports without torch, so that a login node or a launcher can ask too.
"""

from __future__ import annotations

import csv
import math
import os
import platform
import re
import subprocess
from dataclasses import dataclass
from pathlib import Path

import psutil

_TERA = 1e12

# Dense bf16 matrix FLOP/s of one device, without sparsity, with fp32 accumulation, from the vendor's data sheet or
# architecture white paper. The first row whose pattern is found in the device's name counts: the special before the
# general. A device that its driver shows in halves (MI250X) has the peak of one half.
_PUBLISHED_BF16_PEAK: tuple[tuple[str, float], ...] = (
    (r"GB300", 2500 * _TERA),
    (r"GB200", 2500 * _TERA),
    (r"B300", 2250 * _TERA),
    (r"B200", 2250 * _TERA),
    (r"GH200", 989.4 * _TERA),
    (r"H200 NVL", 835 * _TERA),
    (r"H200", 989.4 * _TERA),
    (r"H100 NVL", 835 * _TERA),
    (r"H100 PCIe", 756 * _TERA),
    (r"H100", 989.4 * _TERA),
    (r"H800 PCIe", 756 * _TERA),
    (r"H800", 989.4 * _TERA),
    (r"H20", 148 * _TERA),
    (r"A100", 312 * _TERA),
    (r"A800", 312 * _TERA),
    (r"A30", 165 * _TERA),
    (r"A40", 149.7 * _TERA),
    (r"A10G", 70 * _TERA),
    (r"A10", 125 * _TERA),
    (r"RTX A6000", 154.8 * _TERA),
    (r"RTX 6000 Ada", 364.2 * _TERA),
    (r"L40S", 362 * _TERA),
    (r"L40", 181 * _TERA),
    (r"L4", 121 * _TERA),
    (r"RTX 5090", 209.5 * _TERA),
    (r"RTX 4090", 165.2 * _TERA),
    (r"RTX 3090", 71 * _TERA),
    (r"MI355X", 2516 * _TERA),
    (r"MI325X", 1307.4 * _TERA),
    (r"MI300X", 1307.4 * _TERA),
    (r"MI300A", 980.6 * _TERA),
    (r"MI250X", 191.5 * _TERA),
    (r"MI210", 181 * _TERA),
)


@dataclass(frozen=True, kw_only=True)
class Accelerator:
    """One GPU as its driver tells it."""

    name: str
    memory_bytes: int

    @property
    def peak_bf16_flops(self) -> float | None:
        """Published dense bf16 FLOP/s, or None where the device is not in the table."""
        return published_bf16_peak(self.name)


@dataclass(frozen=True, kw_only=True)
class Hardware:
    """One machine, as far as this process may use it."""

    cpu_name: str
    num_cores: int
    """Cores that this process may use at once."""
    memory_bytes: int
    """Main memory that this process may fill."""
    accelerators: tuple[Accelerator, ...]

    @property
    def device_name(self) -> str:
        """The device that a run would use: the first accelerator, else the processor."""
        return self.accelerators[0].name if self.accelerators else self.cpu_name


def published_bf16_peak(device_name: str) -> float | None:
    """Published dense bf16 FLOP/s of one device of that name, the denominator of MFU; None for an unknown device.

    `device_name` is the name that the driver or `torch.cuda.get_device_name` gives. A MIG slice is unknown: it is a
    part of the device whose name it carries. So are devices without bf16 matrix units, and processors.
    """
    if re.search(r"\bMIG\b", device_name):
        return None
    return next(
        (peak for name, peak in _PUBLISHED_BF16_PEAK if re.search(rf"\b{name}\b", device_name, re.IGNORECASE)), None
    )


def this_machine(*, cgroup: Path = Path("/sys/fs/cgroup")) -> Hardware:
    """The facts of this machine. Accelerators are those that `nvidia-smi` lists, whether visible to CUDA or not."""
    return Hardware(
        cpu_name=cpu_name(),
        num_cores=num_usable_cores(cgroup=cgroup),
        memory_bytes=usable_memory_bytes(cgroup=cgroup),
        accelerators=nvidia_accelerators(),
    )


def num_usable_cores(*, cgroup: Path = Path("/sys/fs/cgroup")) -> int:
    """Cores that this process may use at once: its affinity, and its container's share (cgroup v2, or v1)."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota, period = [*_words(cgroup / "cpu.max"), "", ""][:2]
    if not quota:
        quota = "".join(_words(cgroup / "cpu" / "cpu.cfs_quota_us"))
        period = "".join(_words(cgroup / "cpu" / "cpu.cfs_period_us"))
    if quota.isdecimal() and period.isdecimal() and int(period) > 0:
        return max(1, min(allowed, math.ceil(int(quota) / int(period))))
    return allowed


def usable_memory_bytes(*, cgroup: Path = Path("/sys/fs/cgroup")) -> int:
    """Main memory that this process may fill: the machine's, or its container's limit (cgroup v2, or v1)."""
    total = psutil.virtual_memory().total
    for file in (cgroup / "memory.max", cgroup / "memory" / "memory.limit_in_bytes"):
        limit = "".join(_words(file))
        if limit.isdecimal():
            return min(total, int(limit))
    return total


def cpu_name(*, cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """The processor's name, or its architecture where the system does not tell."""
    try:
        found = re.search(r"^model name\s*:\s*(.+)$", cpuinfo.read_text(encoding="utf-8"), re.MULTILINE)
    except OSError:
        found = None
    return found[1].strip() if found else platform.machine()


def nvidia_accelerators(*, command: str = "nvidia-smi", timeout_seconds: float = 20.0) -> tuple[Accelerator, ...]:
    """The GPUs that NVIDIA's driver lists; none where there is no driver, or it does not answer in time."""
    query = [command, "--query-gpu=name,memory.total", "--format=csv,noheader,nounits"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, check=True, timeout=timeout_seconds).stdout
    except (OSError, subprocess.SubprocessError):
        return ()
    rows = [[cell.strip() for cell in row] for row in csv.reader(answer.splitlines()) if len(row) == 2]
    return tuple(
        # Machines whose GPU shares the main memory answer "[N/A]" for its size.
        Accelerator(name=name, memory_bytes=int(mebibytes) * 2**20 if mebibytes.isdecimal() else 0)
        for name, mebibytes in rows
    )


def _words(file: Path) -> list[str]:
    try:
        return file.read_text(encoding="ascii").split()
    except OSError:
        return []
