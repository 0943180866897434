"""The meeting point on rank 0: where it listens, and whether there is room for all."""

from __future__ import annotations

import resource
import socket
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch.distributed as dist

from cluster.errors import FabricError
from cluster.fabric.measured import meeting
from cluster.fabric.measured.files import allow_connections
from cluster.fabric.measured.meeting import Meeting, meet
from cluster.fabric.measured.place import FabricPlace, MeasureOptions

Opened = Callable[..., Meeting]


@pytest.fixture
def opened() -> Iterator[Opened]:
    """Rank 0's meeting at a host's name."""
    made: list[Meeting] = []

    def open_at(host: str, world_size: int = 2) -> Meeting:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            address = f"{host}:{probe.getsockname()[1]}"
        place = FabricPlace(rank=0, world_size=world_size, local_rank=0, local_world_size=1, address=address, host="n0")
        made.append(meet(place, MeasureOptions(start_timeout_s=5.0)))
        return made[-1]

    yield open_at
    for one in made:
        assert one.hub is not None
        one.close()
        one.hub.stop(clean=False)


def listens_at(one: Meeting, address: str) -> bool:
    assert one.hub is not None
    try:
        socket.create_connection((address, one.hub.port), timeout=5.0).close()
    except ConnectionRefusedError:
        return False
    return True


def test_rank_0_listens_at_the_meeting_points_address_alone(opened: Opened) -> None:
    one = opened("127.0.0.1")
    assert listens_at(one, "127.0.0.1")
    assert not listens_at(one, "127.0.0.2")


def test_a_name_that_leads_to_this_host_here_alone_says_nothing_of_where_others_come_in(
    opened: Opened, monkeypatch: pytest.MonkeyPatch
) -> None:
    known = socket.getaddrinfo

    def resolve(host: Any, *arguments: Any, **options: Any) -> Any:
        return known("127.0.1.1" if host == "myself" else host, *arguments, **options)

    def keep_store(place: FabricPlace, host: str, port: int, options: MeasureOptions) -> dist.Store:
        return dist.TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False)

    monkeypatch.setattr("socket.getaddrinfo", resolve)
    monkeypatch.setattr(meeting, "_keep_store", keep_store)
    assert listens_at(opened("myself"), "127.0.0.2")


@pytest.fixture
def limits(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """A process that may open 64 files, and 400 if it asks for them. What it asks for."""
    asked: list[tuple[int, int]] = []
    monkeypatch.setattr(resource, "getrlimit", lambda which: asked[-1] if asked else (64, 400))
    monkeypatch.setattr(resource, "setrlimit", lambda which, limit: asked.append(limit))
    return asked


def test_rank_0_takes_all_the_files_it_may_open(opened: Opened, limits: list[tuple[int, int]]) -> None:
    opened("127.0.0.1", 100)
    assert limits == [(400, 400)]


def test_more_ranks_than_rank_0_may_have_connections_to_are_refused_at_the_start(
    opened: Opened, limits: list[tuple[int, int]]
) -> None:
    with pytest.raises(
        FabricError, match="rank 0 may open 400 files, and needs about 428 for its connections to all ranks"
    ):
        opened("127.0.0.1", 150)
    allow_connections(150)  # with an agent's store
