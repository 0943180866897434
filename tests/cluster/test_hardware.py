import os
from pathlib import Path

import psutil
import pytest

from cluster.hardware import (
    cpu_name,
    num_usable_cores,
    nvidia_accelerators,
    published_bf16_peak,
    this_machine,
    usable_memory_bytes,
)


@pytest.mark.parametrize(
    ("device", "tera"),
    [
        ("NVIDIA H200", 989.4),
        ("NVIDIA H200 NVL", 835),
        ("NVIDIA H100 80GB HBM3", 989.4),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H20", 148),
        ("NVIDIA GB200", 2500),
        ("NVIDIA B200", 2250),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA A10G", 70),
        ("NVIDIA A10", 125),
        ("NVIDIA L4", 121),
        ("NVIDIA L40S", 362),
        ("NVIDIA GeForce RTX 4090", 165.2),
        ("AMD Instinct MI300X", 1307.4),
    ],
)
def test_well_known_devices_have_their_published_peak(device: str, tera: float) -> None:
    assert published_bf16_peak(device) == pytest.approx(tera * 1e12)


@pytest.mark.parametrize(
    "device",
    ["AMD EPYC 7763", "Tesla V100-SXM2-32GB", "Tesla T4", "NVIDIA A1000", "NVIDIA H100 80GB HBM3 MIG 1g.10gb", ""],
)
def test_an_unknown_device_has_no_peak(device: str) -> None:
    assert published_bf16_peak(device) is None


def test_cores_are_bounded_by_the_share_of_a_container(tmp_path: Path) -> None:
    allowed = len(os.sched_getaffinity(0))
    assert num_usable_cores(cgroup=tmp_path) == allowed
    (tmp_path / "cpu.max").write_text("max 100000\n")
    assert num_usable_cores(cgroup=tmp_path) == allowed
    (tmp_path / "cpu.max").write_text("50000 100000\n")
    assert num_usable_cores(cgroup=tmp_path) == 1
    (tmp_path / "cpu.max").write_text("99900000 100000\n")
    assert num_usable_cores(cgroup=tmp_path) == allowed


def test_cores_of_a_container_of_the_first_kind(tmp_path: Path) -> None:
    (tmp_path / "cpu").mkdir()
    (tmp_path / "cpu" / "cpu.cfs_period_us").write_text("100000\n")
    (tmp_path / "cpu" / "cpu.cfs_quota_us").write_text("-1\n")
    assert num_usable_cores(cgroup=tmp_path) == len(os.sched_getaffinity(0))
    (tmp_path / "cpu" / "cpu.cfs_quota_us").write_text("20000\n")
    assert num_usable_cores(cgroup=tmp_path) == 1


def test_memory_is_bounded_by_the_limit_of_a_container(tmp_path: Path) -> None:
    total = psutil.virtual_memory().total
    assert usable_memory_bytes(cgroup=tmp_path) == total
    (tmp_path / "memory.max").write_text("max\n")
    assert usable_memory_bytes(cgroup=tmp_path) == total
    (tmp_path / "memory.max").write_text("1048576\n")
    assert usable_memory_bytes(cgroup=tmp_path) == 2**20


def test_the_processor_is_named_where_the_system_names_it(tmp_path: Path) -> None:
    (tmp_path / "cpuinfo").write_text("processor\t: 0\nmodel name\t: Great CPU @ 3 GHz\n")
    assert cpu_name(cpuinfo=tmp_path / "cpuinfo") == "Great CPU @ 3 GHz"
    assert cpu_name(cpuinfo=tmp_path / "none") == os.uname().machine


def _driver(path: Path, script: str) -> str:
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return str(path)


def test_accelerators_are_what_the_driver_lists(tmp_path: Path) -> None:
    command = _driver(tmp_path / "smi", "echo 'NVIDIA H200, 143771'; echo 'NVIDIA GB10, [N/A]'")
    first, second = nvidia_accelerators(command=command)
    assert (first.name, first.memory_bytes) == ("NVIDIA H200", 143771 * 2**20)
    assert first.peak_bf16_flops == pytest.approx(989.4e12)
    assert (second.name, second.memory_bytes, second.peak_bf16_flops) == ("NVIDIA GB10", 0, None)


def test_no_driver_means_no_accelerators(tmp_path: Path) -> None:
    assert nvidia_accelerators(command=str(tmp_path / "absent")) == ()
    assert nvidia_accelerators(command=_driver(tmp_path / "smi", "echo failed >&2; exit 9")) == ()
    assert nvidia_accelerators(command=_driver(tmp_path / "slow", "exec sleep 60"), timeout_seconds=0.2) == ()


def test_this_machine_names_the_device_that_a_run_would_use() -> None:
    machine = this_machine()
    assert machine.num_cores >= 1
    assert machine.memory_bytes > 0
    expected = machine.accelerators[0].name if machine.accelerators else machine.cpu_name
    assert machine.device_name == expected
