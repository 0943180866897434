"""Ranks that mpirun or srun started know their place; what is no rank stays none."""

from __future__ import annotations

import pytest

from launcher.errors import ConfigError
from launcher.rank_environment import adopt, hosts_of_ranks, leaf_switch

STEP = {
    "SLURM_JOB_ID": "1207",
    "SLURM_STEP_ID": "3",
    "SLURM_PROCID": "5",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "2",
    "SLURM_STEP_NUM_TASKS": "7",
    "SLURM_STEP_NODELIST": "gpu[07-09],login1",
    "SLURM_STEP_TASKS_PER_NODE": "2(x3),1",
}
OPEN_MPI = {
    "OMPI_COMM_WORLD_RANK": "1",
    "OMPI_COMM_WORLD_SIZE": "4",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
}


def adopted(environ: dict[str, str]) -> dict[str, str]:
    """What was added, when rank 0 of the MPI job says that it is at n0:4711."""
    after = dict(environ)
    adopt(after, meet_over_mpi=lambda: ("n0", 4711))
    return {name: value for name, value in after.items() if environ.get(name) != value}


def test_a_step_of_slurm() -> None:
    assert adopted(STEP) == {
        "RANK": "5",
        "WORLD_SIZE": "7",
        "LOCAL_RANK": "1",
        "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "gpu07",
        "MASTER_PORT": str(15000 + (1207 * 101 + 3) % 15000),
    }
    assert adopted({**STEP, "SLURM_NODEID": "3"})["LOCAL_WORLD_SIZE"] == "1"


def test_two_steps_of_one_job_meet_at_different_ports() -> None:
    assert adopted(STEP)["MASTER_PORT"] != adopted({**STEP, "SLURM_STEP_ID": "4"})["MASTER_PORT"]


def test_open_mpi_stands_before_slurm() -> None:
    expected = {
        "RANK": "1",
        "WORLD_SIZE": "4",
        "LOCAL_RANK": "1",
        "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "n0",
        "MASTER_PORT": "4711",
    }
    assert adopted({**STEP, **OPEN_MPI}) == expected


def test_mpich() -> None:
    found = adopted({"PMI_RANK": "3", "PMI_SIZE": "4", "MPI_LOCALRANKID": "0", "MPI_LOCALNRANKS": "1"})
    assert (found["RANK"], found["LOCAL_RANK"], found["MASTER_ADDR"]) == ("3", "0", "n0")


def test_a_given_meeting_point_wins() -> None:
    found = adopted({**STEP, "MASTER_ADDR": "head", "MASTER_PORT": "29500"})
    assert "MASTER_ADDR" not in found
    assert found["RANK"] == "5"


@pytest.mark.parametrize(
    "environ",
    [
        {},
        {**STEP, "RANK": "0", "WORLD_SIZE": "2"},  # torchrun, within a step of one task a host
        {name: value for name, value in STEP.items() if name != "SLURM_STEP_ID"},  # a batch script's shell
        {**STEP, "SLURM_STEP_NUM_TASKS": "1"},
        {**STEP, **OPEN_MPI, "OMPI_COMM_WORLD_SIZE": "1"},
    ],
)
def test_what_is_no_rank_of_several_stays_as_it_is(environ: dict[str, str]) -> None:
    assert adopted(environ) == {}


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"SLURM_STEP_TASKS_PER_NODE": "two"}, "SLURM_STEP_TASKS_PER_NODE='two' in the environment is not a list of numbers"),
        ({"SLURM_NODEID": "9"}, "SLURM_NODEID=9 is beyond"),
        ({"SLURM_LOCALID": "x"}, "SLURM_LOCALID is 'x' in the environment, and must be a whole number"),
        ({"SLURM_STEP_NODELIST": "n[0-"}, "SLURM_STEP_NODELIST='n\\[0-' in the environment is not a list of hosts"),
    ],
)  # fmt: skip
def test_nonsense_is_told(wrong: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        adopted({**STEP, **wrong})


def test_a_missing_variable_is_named() -> None:
    with pytest.raises(ConfigError, match="OMPI_COMM_WORLD_LOCAL_RANK is not set in the environment"):
        adopted({"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "4"})


def test_hosts_of_all_ranks_are_known_in_a_step_of_slurm() -> None:
    environ = dict(STEP)
    adopt(environ, meet_over_mpi=lambda: ("n0", 4711))
    assert hosts_of_ranks(environ) == ("gpu07", "gpu07", "gpu08", "gpu08", "gpu09", "gpu09", "login1")
    assert hosts_of_ranks({**environ, "SLURM_DISTRIBUTION": "cyclic"}) == ()
    assert hosts_of_ranks({**environ, "WORLD_SIZE": "2"}) == ()  # torchrun, one a host, within the step
    assert hosts_of_ranks({"RANK": "0", "WORLD_SIZE": "2"}) == ()


@pytest.mark.parametrize(
    ("address", "pattern", "leaf"),
    [
        ("core1.leaf7.n42", "switch.switch.node", "leaf7"),
        ("n42", "node", None),
        ("s0.s1.n42", "switch.node", None),
        ("", "", None),
    ],
)
def test_the_leaf_switch_is_the_last_one_that_slurm_names(address: str, pattern: str, leaf: str | None) -> None:
    environ = {"SLURM_TOPOLOGY_ADDR": address, "SLURM_TOPOLOGY_ADDR_PATTERN": pattern}
    assert leaf_switch(environ) == leaf
    assert leaf_switch({}) is None
