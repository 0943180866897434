"""Which host of a job under torchrun this one is, and who may lead, from the options of `mega launch`."""

from __future__ import annotations

import socket
from typing import Any

import pytest

from launcher.errors import ConfigError
from launcher.jobs.hostfile import ListedHost
from launcher.jobs.torchrun import roster
from launcher.jobs.torchrun.roster import Roster, read_roster


@pytest.fixture(autouse=True)
def _here(monkeypatch: pytest.MonkeyPatch) -> None:
    """This host is n1.cluster, and has the address 10.0.0.1."""
    monkeypatch.setattr(socket, "gethostname", lambda: "n1.cluster")
    monkeypatch.setattr(roster, "own_addresses", lambda: ("10.0.0.1",))


def read(*hosts: str, **options: Any) -> Roster:
    listed = [ListedHost(name=host, slots=None) for host in hosts]
    given = {"run_name": "run", "nodes": len(hosts) or 1, "node_rank": None, "rendezvous": None, **options}
    return read_roster(hosts=listed, **given)


def test_a_host_finds_itself_in_the_hostfile_by_name_or_address() -> None:
    found = read("n0", "n1", "n2")
    assert (found.leaders, found.place, found.name, found.rank) == (("n0", "n1", "n2"), 1, "n1", 1)
    assert (found.others, found.before) == (("n0", "n2"), ("n0",))
    assert read("10.0.0.0", "10.0.0.1").name == "10.0.0.1"


def test_the_port_follows_from_the_run_s_name() -> None:
    ports = {read("n1", run_name=name).port for name in ("one", "two", "one")}
    assert len(ports) == 2
    assert all(30000 <= port < 32700 for port in ports)


def test_a_rendezvous_puts_its_host_first() -> None:
    found = read("n0", "n1", "n2", rendezvous="n2:29400")
    assert (found.leaders, found.place, found.rank, found.port) == (("n2", "n0", "n1"), 2, 1, 29400)
    itself = read("n0", "n1", "n2", rendezvous="10.0.0.1:29400")
    assert (itself.leaders, itself.place, itself.rank) == (("10.0.0.1", "n0", "n2"), 0, 1)


def test_without_a_hostfile_the_first_host_leads_at_the_rendezvous() -> None:
    first = read(nodes=2, node_rank=0, rendezvous="n1:29400")
    assert (first.leaders, first.place, first.name, first.port) == (("n1",), 0, "n1.cluster", 29400)
    second = read(nodes=2, node_rank=1, rendezvous="[fd00::7]:29400")
    assert (second.leaders, second.place, second.rank) == (("fd00::7",), None, 1)
    assert (second.others, second.before) == (("fd00::7",), ("fd00::7",))


def test_hosts_on_one_machine_have_names_of_their_own() -> None:
    assert read(nodes=2, node_rank=1, rendezvous="localhost:29400").name == "n1.cluster.1"
    assert read(nodes=2, node_rank=0, rendezvous="127.0.0.1:29400").name == "n1.cluster.0"


def test_a_host_alone_needs_no_options() -> None:
    assert read() == Roster(leaders=("n1.cluster",), place=0, name="n1.cluster", rank=0, port=0)


@pytest.mark.parametrize(
    ("hosts", "options", "message"),
    [
        ((), {"nodes": 2}, "launch.nodes = 2: --on torchrun must know of the other hosts: give --hostfile"),
        ((), {"nodes": 2, "node_rank": 0}, "--rendezvous HOST:PORT is missing"),
        ((), {"nodes": 2, "rendezvous": "n0:1"}, "--node-rank K is missing"),
        ((), {"nodes": 2, "node_rank": 2, "rendezvous": "n0:1"}, r"--node-rank 2: of 2 hosts \(--nodes\)"),
        ((), {"nodes": 1, "node_rank": 0, "rendezvous": "n0"}, "--rendezvous n0: must be HOST:PORT"),
        ((), {"nodes": 1, "node_rank": 0, "rendezvous": "n0:99999"}, "must be HOST:PORT"),
        (("n0", "n2"), {}, r"this host \(n1.cluster, 10.0.0.1\) is not in the hostfile"),
        (("n0", "n1"), {"node_rank": 1}, "leave --node-rank out"),
        (("n0", "n1"), {"nodes": 3}, "launch.nodes = 3: the hostfile lists 2"),
    ],
)
def test_options_that_make_no_sense(hosts: tuple[str, ...], options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read(*hosts, **options)
