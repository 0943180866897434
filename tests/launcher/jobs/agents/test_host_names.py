"""Which host an agent is on, and where a head can be reached."""

import pytest

from launcher.jobs.agents import host_names
from launcher.jobs.agents.host_names import (
    addresses_of_head,
    find_host,
    head_addresses,
    is_loopback,
    join_head,
    split_head,
)


@pytest.mark.parametrize(
    ("name", "expected", "found"),
    [
        ("n3", ["n1", "n3"], "n3"),
        ("n3", ["n3.cluster"], "n3.cluster"),
        ("n3.cluster", ["n3"], "n3"),
        ("N3", ["n3.cluster"], "n3.cluster"),
        ("n3.a", ["n3.b"], None),
        ("n3", ["n3.a", "n3.b"], None),
        ("n3", ["n3", "n3.cluster"], "n3"),
        ("n33", ["n3"], None),
        ("10.0.0.3", ["10.0.0.3"], "10.0.0.3"),
        ("10.0.0.3", ["10.0.0.4"], None),
        ("10", ["10.0.0.4"], None),
        ("localhost", ["10.0.0.7", "10.0.0.4"], "10.0.0.7"),
        ("fabric-name", ["fd00::7"], "fd00::7"),
    ],
)
def test_a_host_is_found_by_its_short_or_long_name_or_an_address(
    name: str, expected: list[str], found: str | None
) -> None:
    assert find_host(name, ["192.168.0.7", "10.0.0.7", "fd00::7"], expected) == found


def test_addresses_of_the_head_are_read_as_they_are_written() -> None:
    addresses = ["10.0.0.1", "fd00::1", "node1", "127.0.0.1"]
    assert split_head(join_head(addresses, 40123)) == (addresses, 40123)
    assert split_head("[fd00::1]:7") == (["fd00::1"], 7)
    for text in ("", "node1", "node1:", ":7", "node1:port", "node1:0", "node1:70000"):
        with pytest.raises(ValueError):
            split_head(text)


def test_the_head_is_looked_for_at_the_given_addresses_first_and_on_this_host_last() -> None:
    addresses = head_addresses(["ib0.node1"])
    assert addresses[0] == "ib0.node1"
    assert addresses[-1] == "127.0.0.1"
    assert len(set(addresses)) == len(addresses)
    assert not any(map(is_loopback, addresses[:-1]))


def test_an_agent_elsewhere_does_not_look_for_the_head_on_its_own_loopback(monkeypatch: pytest.MonkeyPatch) -> None:
    told = ("10.0.0.1", "172.17.0.1", "n1", "127.0.0.1")

    def on(name: str, address: str) -> tuple[str, ...]:
        monkeypatch.setattr(host_names.socket, "gethostname", lambda: name)
        monkeypatch.setattr(host_names, "own_addresses", lambda *, bridges: (address, *["172.17.0.1"] * bridges))
        return addresses_of_head(told)

    assert on("n2", "10.0.0.2") == told[:-1]
    assert on("n1", "10.1.0.1") == told
    assert on("container", "10.0.0.1") == told
    assert addresses_of_head(("127.0.0.1",)) == ("127.0.0.1",)  # nowhere else was said


def test_no_address_leads_to_nobody_else() -> None:
    assert all(map(is_loopback, ("", "127.0.0.1", "127.0.1.1", "::1")))
    assert not any(map(is_loopback, ("10.0.0.1", "node1")))
