"""What a rank says of itself, and what it never says."""

from __future__ import annotations

import importlib
import importlib.metadata
import sys
from pathlib import Path

import numpy
import pytest
import torch

from cluster.preflight.facts import (
    FROM_RANK_0,
    SECTIONS,
    RankFacts,
    digest,
    distributions,
    environment,
    shared_folder,
    sources,
    versions,
)


def facts(**environ: str) -> RankFacts:
    return RankFacts(environ=environ, packages=("cluster",), local_rank=0, network={"kind": "socket"})


def test_only_variables_that_matter_to_all_ranks_alike_are_told() -> None:
    matter = {
        "NCCL_IB_TC": "106",
        "OMP_NUM_THREADS": "4",
        "PYTHONPATH": "/a",
        "LD_LIBRARY_PATH": "/b",
        "TORCH_LOGS": "",
    }
    others = {"HOME": "/root", "AWS_SECRET_ACCESS_KEY": "x", "MEGA_JOB_TOKEN": "x", "MY_NCCL_X": "1", "FIREFLY": "1"}
    devices = {"CUDA_VISIBLE_DEVICES": "3", "ROCR_VISIBLE_DEVICES": "3", "NVIDIA_VISIBLE_DEVICES": "GPU-3"}
    of_one_rank = {**devices, "TORCHELASTIC_RUN_ID": "7", "NCCL_DEBUG_FILE": "/tmp/3.log"}
    assert environment({**matter, **others, **of_one_rank}) == matter
    assert "NCCL_IB_TC" not in environment(matter, not_compared=("NCCL_IB_TC",))


def test_folders_that_a_launcher_lists_twice_make_no_difference() -> None:
    once = environment({"LD_LIBRARY_PATH": "/a:/b", "NCCL_X": "1:1"})
    assert environment({"LD_LIBRARY_PATH": "/a:/a:/b:", "NCCL_X": "1:1"}) == once
    assert environment({"LD_LIBRARY_PATH": "/b:/a", "NCCL_X": "1:1"}) != once
    assert once["NCCL_X"] == "1:1"


def test_a_secret_is_told_by_its_hash_alone() -> None:
    one, other = (environment({"CUDA_REGISTRY_TOKEN": secret}) for secret in ("hunter2", "hunter3"))
    assert "hunter" not in str(one) + str(other)
    assert one != other


def test_equal_sections_have_equal_hashes_and_no_others() -> None:
    said = facts(NCCL_IB_TC="106").answer({"ask": "rank"})
    assert said["hashes"].keys() == set(SECTIONS)
    assert said["hashes"] == facts(NCCL_IB_TC="106").answer({"ask": "rank"})["hashes"]
    other = facts(NCCL_IB_TC="0").answer({"ask": "rank"})["hashes"]
    assert [name for name in SECTIONS if other[name] != said["hashes"][name]] == ["environment"]
    assert said["network"] == {"kind": "socket"}
    assert said["device"]["error"] == ""
    assert facts(NCCL_IB_TC="0").answer({"ask": "section", "section": "environment"}) == {"values": {"NCCL_IB_TC": "0"}}


def test_versions_are_those_in_use() -> None:
    told = versions()
    assert (told["torch"], told["numpy"]) == (torch.__version__, numpy.__version__)
    assert told["Python"].endswith(sys.version.split()[0])


def test_a_changed_or_another_source_file_changes_the_hash(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "ownpackage" / "inner"
    package.mkdir(parents=True)
    (package / "one.py").write_text("a = 1\n")
    monkeypatch.syspath_prepend(tmp_path)
    importlib.invalidate_caches()
    before = sources(["ownpackage", "no_such_package"])
    assert list(before) == ["ownpackage/inner/one.py"]
    (package / "one.py").write_text("a = 2\n")
    after = sources(["ownpackage"])
    assert after.keys() == before.keys()
    assert digest(after) != digest(before)


def test_installed_distributions_are_those_that_python_names() -> None:
    told = distributions(sys.path)
    named = {
        one.name.lower().replace("_", "-").replace(".", "-"): one.version for one in importlib.metadata.distributions()
    }
    assert told.keys() == named.keys()
    assert told["numpy"] == numpy.__version__


def test_of_two_installations_the_one_that_is_found_first_counts(tmp_path: Path) -> None:
    for folder, version in (("first", "1.0"), ("second", "2.0")):
        (tmp_path / folder / f"Some_Thing-{version}.dist-info").mkdir(parents=True)
    path = [str(tmp_path / name) for name in ("first", "absent", "second")]
    assert distributions(path) == {"some-thing": "1.0"}


def test_a_host_tells_whether_it_sees_and_writes_the_shared_folder(tmp_path: Path) -> None:
    (tmp_path / "shared").mkdir()
    (tmp_path / "shared" / FROM_RANK_0).write_text("nonce")
    fine = shared_folder(tmp_path, "shared", "nonce", "mine.txt")
    assert (fine["read_error"], fine["write_error"]) == ("", "")
    assert fine["free_bytes"] > 0
    assert (tmp_path / "shared" / "mine.txt").read_text() == "nonce"

    stale = shared_folder(tmp_path, "shared", "another", "mine.txt")
    assert stale["read_error"] == "what stands there is not what rank 0 wrote"
    apart = shared_folder(tmp_path / "elsewhere", "shared", "nonce", "mine.txt")
    assert (apart["free_bytes"], apart["read_error"]) == (None, "No such file or directory")
    cannot_write = shared_folder(tmp_path, "shared", "nonce", "no folder/mine.txt")
    assert cannot_write["write_error"] == "No such file or directory"


def test_where_rank_0_cannot_write_a_host_tries_by_itself_and_leaves_nothing(tmp_path: Path) -> None:
    assert shared_folder(tmp_path, None, "nonce", "mine.txt")["write_error"] == ""
    assert list(tmp_path.iterdir()) == []
    assert shared_folder(tmp_path / "absent", None, "nonce", "mine.txt")["write_error"] == "No such file or directory"


def test_the_outcome_is_taken_note_of() -> None:
    rank = facts()
    assert rank.verdict is None
    assert rank.answer({"ask": "verdict", "ok": False, "sentences": ["n1 is bad"]}) == {}
    assert rank.verdict is not None
    assert rank.verdict["sentences"] == ["n1 is bad"]
