import importlib.metadata
import socket
from pathlib import Path

import pytest

from cluster.hardware import Accelerator, Hardware
from launcher.diagnosis import (
    Finding,
    diagnose,
    disk_finding,
    host_name,
    memory_finding,
    packages,
    torch_version_finding,
)
from tests.launcher.conftest import Mega

_GIB = 2**30


def test_the_doctor_passes_here_and_says_so_in_json(mega: Mega) -> None:
    ended = mega("doctor", "--json")
    assert ended.code == 0
    assert ended.json["ok"] is True
    subjects = {finding["subject"] for finding in ended.json["findings"]}
    assert {"processor", "memory", "disk", "Python", "torch", "gloo", "compiler", "host name", "tokenizers"} <= subjects
    for finding in ended.json["findings"]:
        assert finding["state"] == "ok" or finding["mend"] or finding["subject"] == "GPU"


def test_a_gpu_is_told_with_the_peak_that_mfu_is_measured_by() -> None:
    gpus = (Accelerator(name="NVIDIA H200", memory_bytes=140 * _GIB), Accelerator(name="Strange", memory_bytes=_GIB))
    machine = Hardware(cpu_name="x", num_cores=2, memory_bytes=8 * _GIB, accelerators=gpus)
    found = {finding.subject: finding.detail for finding in diagnose(machine, directory=Path())}
    assert found["GPU 0"] == "NVIDIA H200, 140 GiB, published dense bf16 peak 989.4 TFLOP/s"
    assert found["GPU 1"] == "Strange, 1 GiB, peak unknown, so runs show no MFU"


def test_what_is_scarce_comes_with_its_mend() -> None:
    assert memory_finding(8 * _GIB).state == "ok"
    assert "lower train.micro_batch_size" in memory_finding(2 * _GIB).mend
    assert disk_finding(50 * _GIB, Path()).state == "ok"
    assert "set run.directory and data.cache_directory to another disk" in disk_finding(_GIB, Path()).mend


def test_an_old_torch_is_missing() -> None:
    assert torch_version_finding("2.13.0+cpu").state == "ok"
    assert torch_version_finding("2.11.0a0+git").state == "ok"
    old = torch_version_finding("2.9.1")
    assert (old.state, old.detail) == ("missing", "2.9.1, but 2.11 or newer is needed")
    assert old.mend == "pip install --constraint constraints.txt torch"


def test_packages_come_with_the_extra_that_brings_them(monkeypatch: pytest.MonkeyPatch) -> None:
    requires = ["torch>=2", "numpy>=2.0", "absent-a>=1", 'absent-b>=1; extra == "hf"', 'pytest>=8; extra == "dev"']
    monkeypatch.setattr(importlib.metadata, "requires", lambda distribution: requires)
    found = {finding.subject: finding for finding in packages("mega")}
    assert set(found) == {"numpy", "absent-a", "absent-b"}
    assert found["numpy"].state == "ok"
    assert (found["absent-a"].state, found["absent-a"].mend) == ("missing", "make setup")
    optional = found["absent-b"]
    assert (optional.state, optional.detail) == ("optional", "not installed (extra `hf`)")
    assert optional.mend == "pip install --constraint constraints.txt '.[hf]'"


def test_a_host_name_that_does_not_resolve(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(name: str, port: None) -> None:
        raise socket.gaierror("unknown")

    monkeypatch.setattr(socket, "getaddrinfo", fail)
    finding = host_name("node7")
    assert finding.state == "optional"
    assert "add `127.0.0.1 node7` to /etc/hosts" in finding.mend


def test_something_missing_ends_with_3(mega: Mega, monkeypatch: pytest.MonkeyPatch) -> None:
    finding = Finding(subject="gloo", state="missing", detail="none", mend="install torch")
    monkeypatch.setattr("launcher.diagnosis.diagnose", lambda hardware, *, directory: [finding])
    ended = mega("doctor")
    assert ended.code == 3
    assert "Missing: gloo." in ended.out
