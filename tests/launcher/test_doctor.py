import importlib.metadata
import json
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
from tests.launcher.named_hosts import ranks_on_hosts

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


def test_the_cluster_is_looked_at_by_ranks_that_are_started_here(mega_process: Mega, tmp_path: Path) -> None:
    exclude, output = tmp_path / "exclude", tmp_path / "verdict.json"
    (tmp_path / "shared").mkdir()
    files = ("--exclude-file", exclude, "--output", output, "--directory", tmp_path / "shared")
    ended = mega_process("doctor", "--cluster", "--ranks", "2", "--json", *files)
    assert ended.code == 0, ended.err
    assert ended.json["ok"] is True
    assert ended.json["details"]["fabric"] == {"skipped": "all ranks are on one host"}
    assert json.loads(output.read_text()) == ended.json
    assert exclude.read_text() == ""
    assert list((tmp_path / "shared").iterdir()) == []


def test_hosts_that_differ_are_told_and_excluded_with_3(tmp_path: Path) -> None:
    exclude = tmp_path / "exclude"
    words = ["doctor", "--cluster", "--no-fabric", "--directory", str(tmp_path), "--exclude-file", str(exclude)]
    first, *others = ranks_on_hosts(words, {}, {}, {"LD_PRELOAD": "", "NCCL_ALGO": "Ring"})
    assert first.code == 3, first.err
    assert [(other.code, other.out) for other in others] == [(0, ""), (0, "")], "rank 0 alone speaks"
    lines = first.out.splitlines()
    assert lines[0].startswith(
        'n2 differs from the others in the variable LD_PRELOAD ("" there, and not set elsewhere)'
    )
    assert "NCCL_ALGO (Ring there, and not set elsewhere)" in lines[0]
    assert lines[1].startswith("Preflight of 3 ranks on 3 hosts: something is wrong (")
    assert "The network was not measured: it is switched off." in lines
    assert "Network between hosts: socket." in lines
    assert lines[-1].endswith(": n2")
    assert exclude.read_text() == "n2\n"


def test_the_network_between_hosts_is_measured(tmp_path: Path) -> None:
    words = ["doctor", "--cluster", "--json", "--directory", str(tmp_path)]
    told = ranks_on_hosts(words, {}, {})[0]
    # Whatever the noise of a busy machine may look like, the answer has its form.
    assert told.code == (0 if told.json["ok"] else 3), told.err
    assert told.json["details"]["fabric"]["beta_s_per_byte"] > 0


def test_options_of_the_cluster_mean_nothing_without_it(mega: Mega) -> None:
    ended = mega("doctor", "--ranks", "2", "--no-fabric")
    assert ended.code == 2
    assert "--ranks, --no-fabric means something only with --cluster: add that, or leave it out" in ended.err


def test_one_host_alone_is_looked_at_too(mega_process: Mega, tmp_path: Path) -> None:
    for more in ((), ("--no-fabric",)):
        alone = mega_process("doctor", "--cluster", "--directory", tmp_path, *more)
        assert alone.code == 0, alone.err
        assert "Preflight of 1 rank on 1 host: nothing is wrong (" in alone.out
        assert "The network was not measured: one rank alone has none. Give --ranks N (N >= 2)" in alone.out


def test_the_folder_of_a_typo_is_told_and_not_made(mega: Mega, tmp_path: Path) -> None:
    nowhere = tmp_path / "nowhere"
    ended = mega("doctor", "--cluster", "--directory", nowhere)
    assert ended.code == 2
    assert f"--directory {nowhere}: there is no such folder; make it first" in ended.err
    # Who is a rank already cannot speak for the other hosts.
    (joined,) = ranks_on_hosts(["doctor", "--cluster", "--no-fabric", "--directory", str(nowhere)], {})
    assert joined.code == 3, joined.err
    assert "n0 cannot write there (No such file or directory)" in joined.out
    assert not nowhere.exists()
