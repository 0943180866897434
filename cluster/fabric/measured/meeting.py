"""How ranks find rank 0: through a torch TCPStore at the meeting point, which rank 0 or a torchrun agent keeps."""

from __future__ import annotations

import contextlib
import json
import secrets
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch.distributed as dist

from cluster.errors import FabricError
from cluster.fabric.measured.control import Hub
from cluster.fabric.measured.files import allow_connections
from cluster.fabric.measured.place import FabricPlace, MeasureOptions

T = TypeVar("T")
_KEY = "mega fabric"
_POLL_S = 0.1
_CONNECT_S = 5.0


@dataclass(frozen=True, kw_only=True)
class Meeting:
    """A rank's connection to rank 0, and the store in which groups find one another. `hub` on rank 0 alone."""

    store: dist.Store
    token: str
    connection: socket.socket
    hub: Hub | None = None

    def close(self) -> None:
        """Takes rank 0's address back, so that a later run at the same store does not find it."""
        if self.hub is not None:
            with contextlib.suppress(RuntimeError):
                self.store.delete_key(_KEY)


def meet(place: FabricPlace, options: MeasureOptions) -> Meeting:
    """Opens the meeting point on rank 0, finds rank 0 there on the others. Raises FabricError where it is not there in time."""
    if place.rank == 0:
        # From each rank one to the hub, and one to the store where that is here too.
        allow_connections(place.world_size * (1 if place.agent_store else 2))
    host, port = _split(place.address)
    deadline = time.monotonic() + options.start_timeout_s
    seconds = f"{options.start_timeout_s:g} s"
    if place.rank == 0 and not place.agent_store:
        return _open(place, options, _keep_store(place, host, port, options), host)
    keeper = "torchrun's agent" if place.agent_store else "rank 0"
    missing = FabricError(
        f"rank {place.rank} of {place.world_size} ({place.host}) found nobody at {place.address} within {seconds}: "
        f"start {keeper}, and check that the address is right and its port reachable"
    )
    _knock(host, port, deadline, missing)
    store = _within(deadline + 1.0, lambda: _join(host, port, options), missing)
    if place.rank == 0:
        return _open(place, options, store, host)
    nobody = FabricError(
        f"rank 0 has not come to {place.address} within {seconds}, or cannot be reached from there: rank {place.rank} of "
        f"{place.world_size} ({place.host}) waited for it in vain; look at the end of rank 0's log"
    )
    return _within(deadline + 1.0, lambda: _call_rank_0(store, host, deadline, nobody), nobody)


def keep_meeting_point(place: FabricPlace, options: MeasureOptions) -> dist.Store | None:
    """Keeps the meeting point open for as long as what this returns lives; None where somebody else keeps it.

    For ranks that meet there again afterwards, as those of torch's `env://` do: who is ahead of rank 0 then comes to the
    same store, not to one that is about to be closed. Raises FabricError where rank 0 cannot listen there.
    """
    if place.rank > 0 or place.agent_store:
        return None
    return _keep_store(place, *_split(place.address), options)


def _keep_store(place: FabricPlace, host: str, port: int, options: MeasureOptions) -> dist.Store:
    try:
        return dist.TCPStore(
            host,
            port,
            is_master=True,
            wait_for_workers=False,
            timeout=timedelta(seconds=options.round_timeout_s),
            multi_tenant=True,  # one store of this process at this port, whoever of it opens it
        )
    except RuntimeError as error:
        raise FabricError(
            f"rank 0 cannot listen at {place.address} ({_first_line(error)}): give a free port of its host"
        ) from error


def _open(place: FabricPlace, options: MeasureOptions, store: dist.Store, host: str) -> Meeting:
    family = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)[0][0]
    token = secrets.token_hex(16)
    way = _way_to(host)

    def hub_at(address: str) -> Hub:
        return Hub(
            world_size=place.world_size, token=token, silence_s=options.silence_s, family=family, address=address
        )

    try:
        hub = hub_at(way.listens_at)
    except OSError:  # such as an address that needs its interface's name with it
        hub = hub_at("")
    store.set(_KEY, json.dumps({"host": way.elsewhere, "port": hub.port, "token": token}))
    return Meeting(store=store, token=token, connection=hub.attach(), hub=hub)


@dataclass(frozen=True, kw_only=True)
class _Way:
    """How the others find rank 0 from the meeting point."""

    elsewhere: str
    """Rank 0's address where it is on another host; empty on the meeting point's own, by the name that everybody knows."""
    listens_at: str
    """The one address that all of them come to; empty where that is not sure."""


def _way_to(host: str) -> _Way:
    family, _, _, _, address = socket.getaddrinfo(host, 9, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        probe.connect(address)  # sends nothing, and tells which of our addresses leads there
        own = str(probe.getsockname()[0])
    if own.startswith("127.") or own == "::1":
        # Many hosts call themselves by a name that leads to the loopback device there, and elsewhere to them.
        is_for_this_host_alone = host in ("localhost", address[0])
        return _Way(elsewhere="", listens_at=str(address[0]) if is_for_this_host_alone else "")
    return _Way(elsewhere="" if own == address[0] else own, listens_at=own)


def _knock(host: str, port: int, deadline: float, missing: FabricError) -> None:
    """Returns once somebody listens there. torch's own client would fill the log with each try."""
    while True:
        try:
            socket.create_connection((host, port), timeout=max(deadline - time.monotonic(), _POLL_S)).close()
            return
        except OSError as error:
            if time.monotonic() > deadline:
                raise missing from error
            time.sleep(_POLL_S)


def _join(host: str, port: int, options: MeasureOptions) -> dist.Store:
    return dist.TCPStore(host, port, is_master=False, timeout=timedelta(seconds=options.round_timeout_s))


def _call_rank_0(store: dist.Store, host: str, deadline: float, nobody: FabricError) -> Meeting:
    while time.monotonic() < deadline:
        if store.check([_KEY]):
            said = json.loads(store.get(_KEY))
            with contextlib.suppress(OSError):  # what stands there may be of an earlier run
                connection = socket.create_connection((said["host"] or host, said["port"]), timeout=_CONNECT_S)
                return Meeting(store=store, token=said["token"], connection=connection)
        time.sleep(_POLL_S)
    raise nobody


def _within(deadline: float, call: Callable[[], T], failure: FabricError) -> T:
    """`call` in a thread of its own: a store whose keeper is stopped answers never, and lets no signal through."""
    outcome: list[T] = []
    errors: list[BaseException] = []

    def work() -> None:
        try:
            outcome.append(call())
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=work, name="fabric-meeting", daemon=True)
    thread.start()
    while thread.is_alive() and time.monotonic() < deadline:
        thread.join(0.2)
    if errors and isinstance(errors[0], FabricError):
        raise errors[0]
    if not outcome:
        raise failure from (errors[0] if errors else None)
    return outcome[0]


def _split(address: str) -> tuple[str, int]:
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal():
        raise FabricError(f"the meeting point {address!r} is not of the form host:port")
    return host.strip("[]"), int(port)


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
