"""The made-up fabric itself: its hosts are apart, have their names, and leave nothing behind."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.requirements import requires
from tests.system.fabric.hosts import FabricOfHosts, run_command
from tests.system.fabric.ranks import HostRank, RankFailureError, Ranks

pytestmark = requires("netns")


def namespaces() -> set[str]:
    return set(run_command("ip", "netns", "list").split())


def test_all_is_removed_even_after_a_failure() -> None:
    fabric = FabricOfHosts(hosts_per_leaf=1, foreign_per_leaf=0)
    made = {fabric.switches, *(host.namespace for host in fabric.hosts)}

    def fail_within() -> None:
        with fabric:
            assert made <= namespaces()
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail_within()
    assert not made & namespaces()
    assert not fabric.hosts_file.exists()


def test_what_was_made_is_removed_where_the_making_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    fabric = FabricOfHosts(hosts_per_leaf=1, foreign_per_leaf=0)
    monkeypatch.setattr(fabric, "_forwarding", lambda: ["fdb add nonsense"])
    with pytest.raises(RuntimeError, match="nonsense"):
        fabric.__enter__()
    assert fabric.switches not in namespaces()


def test_all_is_removed_where_its_maker_is_killed() -> None:
    program = """
from tests.system.fabric.hosts import FabricOfHosts
import signal
with FabricOfHosts(hosts_per_leaf=1, foreign_per_leaf=0) as fabric:
    print(fabric.switches, flush=True)
    signal.pause()
"""
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) as maker:
        assert maker.stdout is not None
        switches = maker.stdout.readline().strip()
        assert switches in namespaces()
        maker.kill()
    deadline = time.monotonic() + 90.0
    while switches in namespaces():
        assert time.monotonic() < deadline, "it is still there"


def look_around(rank: HostRank) -> dict[str, object]:
    rank.parent.send(("heard", rank.parent.recv()))
    return {
        "name": socket.gethostname(),
        "address": socket.gethostbyname(socket.gethostname()),
        "devices": {path.name for path in Path("/sys/class/net").iterdir()},
        "rank": os.environ["RANK"],
        "threads": len(list(Path("/proc/self/task").iterdir())),
    }


def test_a_rank_lives_on_its_host(fabric: FabricOfHosts) -> None:
    with Ranks(fabric, look_around) as ranks:
        assert [ranks.ask(number, number, timeout_s=60) for number in range(8)] == [("heard", n) for n in range(8)]
        seen = ranks.results(timeout_s=60)
    assert [view["name"] for view in seen] == [host.name for host in fabric.hosts]
    assert [view["address"] for view in seen] == [host.address for host in fabric.hosts]
    assert [view["rank"] for view in seen] == [str(number) for number in range(8)]
    assert all(view["devices"] == {"lo", "eth0"} for view in seen)
    assert all(view["threads"] == 1 for view in seen), "a process with threads cannot change its namespace safely"


def fail_in_many_ways(rank: HostRank) -> str:
    if rank.rank == 1:
        raise ValueError("a rank's own words")
    if rank.rank == 2:
        os._exit(7)
    if rank.rank == 3:
        signal.pause()
    return "fine"


def test_every_failing_rank_gives_its_account(fabric: FabricOfHosts) -> None:
    with Ranks(fabric, fail_in_many_ways, hosts=fabric.hosts[:4]) as ranks:
        with pytest.raises(RankFailureError) as caught:
            ranks.results(timeout_s=60)
        assert "3 of 4 ranks failed" in str(caught.value)
        assert "a rank's own words" in str(caught.value)
        assert "died (exit code 7)" in str(caught.value)
        assert "rank 3 was not done in time" in str(caught.value)
        with pytest.raises(RankFailureError, match="said nothing for"):
            ranks.ask(3, "nothing", timeout_s=0.0)
    with pytest.raises(ProcessLookupError):
        os.kill(ranks.process_id(fabric.hosts[3]), 0)
