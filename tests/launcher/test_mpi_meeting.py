"""`mega train` as a rank of mpirun: it takes its place from MPI, and says so where MPI cannot tell it."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.launcher.conftest import Mega
from tests.requirements import requires


def rank_of_two(rank: int) -> dict[str, str]:
    """What mpirun sets for one of two ranks on this host."""
    number = str(rank)
    return {
        "OMPI_COMM_WORLD_RANK": number,
        "OMPI_COMM_WORLD_SIZE": "2",
        "OMPI_COMM_WORLD_LOCAL_RANK": number,
        "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
    }


@pytest.fixture
def without_mpi(tmp_path: Path) -> dict[str, str]:
    """The environment of a machine that lacks mpi4py."""
    package = tmp_path / "lacking" / "mpi4py"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise ImportError('no mpi4py here')\n")
    return {"PYTHONPATH": str(package.parent)}


def test_a_dry_run_needs_no_meeting_and_rank_0_alone_speaks(
    tiny: Path, mega_process: Mega, without_mpi: dict[str, str]
) -> None:
    first = mega_process("train", tiny, "--dry-run", "--json", **without_mpi, **rank_of_two(0))
    assert (first.code, first.json["ranks"]) == (0, 2), first.err
    other = mega_process("train", tiny, "--dry-run", "--json", **without_mpi, **rank_of_two(1))
    assert (other.code, other.out) == (0, ""), other.err


def test_without_mpi4py_the_meeting_point_must_be_given(
    tiny: Path, mega_process: Mega, without_mpi: dict[str, str]
) -> None:
    ended = mega_process("train", tiny, **without_mpi, **rank_of_two(0))
    assert ended.code == 2
    assert "no mpi4py here" in ended.err
    assert "set MASTER_ADDR and MASTER_PORT (mpirun -x MASTER_ADDR=<host of rank 0>" in ended.err


@requires("mpi")
def test_an_mpi_library_that_is_not_mpirun_s_is_told(tiny: Path, mega_process: Mega) -> None:
    ended = mega_process("train", tiny, **rank_of_two(0))
    assert ended.code == 2
    assert "mpi4py's MPI library knows of one alone" in ended.err


def test_other_verbs_take_no_part(tiny: Path, mega_process: Mega, without_mpi: dict[str, str]) -> None:
    ended = mega_process("config", "check", tiny, **without_mpi, **rank_of_two(1))
    assert ended.code == 0, ended.err
