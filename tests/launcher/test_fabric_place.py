"""A rank's place in the world that measures: names of hosts come from the job, from options, from SLURM, from the host."""

from __future__ import annotations

import socket

from launcher.fabric_place import fabric_place, rank_hosts_variable

RANK = {
    "RANK": "3",
    "WORLD_SIZE": "4",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "2",
    "MASTER_ADDR": "n0",
    "MASTER_PORT": "29400",
}


def test_a_place_is_what_torchruns_variables_say() -> None:
    place = fabric_place(RANK)
    assert (place.rank, place.world_size, place.local_rank, place.local_world_size) == (3, 4, 1, 2)
    assert (place.address, place.host, place.agent_store) == ("n0:29400", socket.gethostname(), False)
    assert fabric_place({**RANK, "TORCHELASTIC_USE_AGENT_STORE": "True"}).agent_store


def test_a_host_is_called_as_the_job_calls_it_unless_an_option_says_otherwise() -> None:
    named = {**RANK, "MEGA_HOST_NAME": "n1"}
    assert fabric_place(named).host == "n1"
    assert fabric_place(named, host_name="other").host == "other"


def test_a_job_that_names_its_hosts_gives_each_rank_one() -> None:
    assert rank_hosts_variable(["n9", "n1"]) == {"MEGA_RANK_HOSTS": "n9,n1"}
    assert fabric_place({**RANK, **rank_hosts_variable(["n9", "n1"])}).hosts == ("n9", "n9", "n1", "n1")
    assert fabric_place({**RANK, **rank_hosts_variable(["n9", "n1", "n2"])}).hosts == ()
    assert fabric_place(RANK).hosts == ()


def test_without_it_slurms_step_tells() -> None:
    step = {
        "SLURM_STEP_ID": "0",
        "SLURM_STEP_NODELIST": "n[3-4]",
        "SLURM_STEP_TASKS_PER_NODE": "2(x2)",
    }
    assert fabric_place({**RANK, **step}).hosts == ("n3", "n3", "n4", "n4")
