"""What rank 0 makes of what all ranks said of themselves: endpoints, transport, addresses. Imports without torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from cluster.errors import FabricError
from cluster.fabric.measured.control import Hub, Message
from cluster.fabric.measured.place import TransportChoice
from cluster.fabric.probing import Endpoint


def require_agreement(hellos: Mapping[int, Message]) -> None:
    """Raises FabricError naming the ranks that differ from rank 0 in what all must have the same, and in what."""
    reference: dict[str, Any] = hellos[0]["agreed"]
    differing: dict[tuple[str, Any], list[int]] = {}
    for rank, hello in sorted(hellos.items()):
        for name, value in reference.items():
            if hello["agreed"].get(name) != value:
                differing.setdefault((name, hello["agreed"].get(name)), []).append(rank)
    if differing:
        lines = [
            f"{name} is {value} on rank(s) {', '.join(map(str, ranks))} ({', '.join(_hosts(hellos, ranks))}), and "
            f"{reference[name]} on rank 0 ({hellos[0]['host']})"
            for (name, value), ranks in differing.items()
        ]
        raise FabricError(f"ranks differ, and would not understand one another: {'; '.join(lines)}")


def choose_transport(hellos: Mapping[int, Message], choice: TransportChoice) -> str:
    """gloo, nccl or mpi. Raises FabricError where nccl was asked for and a rank has no CUDA device of its own."""
    without = [rank for rank, hello in sorted(hellos.items()) if not hello["has_device"]]
    if choice == "nccl" and without:
        raise FabricError(
            f"nccl needs a CUDA device for each rank, and rank(s) {', '.join(map(str, without))} "
            f"({', '.join(_hosts(hellos, without))}) have none: measure over gloo"
        )
    if choice != "auto":
        return choice
    return "gloo" if without else "nccl"


def endpoints_of(
    hellos: Mapping[int, Message], *, rails: bool, missing: Sequence[int] = (), hosts: Sequence[str] = ()
) -> tuple[Endpoint, ...]:
    """The lowest rank of each host; every rank with `rails`, and where there is one host alone.

    Ranks of one host alone get names of their own, `host:local rank`: they stand for hosts on a laptop. `missing` ranks
    are among the endpoints where `hosts` (by rank) has their names; their leaf switches nobody tells.
    """
    known = {
        rank: Endpoint(
            rank=rank, host=hello["host"], machine=hello["machine"], rail=hello["local_rank"], leaf=hello["leaf"]
        )
        for rank, hello in hellos.items()
    }
    known |= {rank: Endpoint(rank=rank, host=hosts[rank], machine=hosts[rank]) for rank in missing if rank < len(hosts)}
    ordered = [known[rank] for rank in sorted(known)]
    if rails:
        return tuple(ordered)
    if len({endpoint.host for endpoint in ordered}) == 1 and len(ordered) > 1:
        return tuple(replace(one, host=f"{one.host}:{one.rail}", rail=0) for one in ordered)
    first: dict[str, Endpoint] = {}
    for endpoint in ordered:
        first.setdefault(endpoint.host, replace(endpoint, rail=0))
    return tuple(first.values())


def network_addresses(hub: Hub) -> dict[int, str]:
    """Each rank's address on the network that leads to rank 0.

    Rank 0, and ranks beside it that came over the loopback device, have the address of rank 0's host that others reached.
    """
    outer = [address for address in hub.reached_at.values() if not _is_loopback(address)]
    own = outer[0] if outer else "127.0.0.1"
    return {rank: own if _is_loopback(hello["address"]) else hello["address"] for rank, hello in hub.hellos.items()}


def _is_loopback(address: str) -> bool:
    return address in ("", "::1") or address.startswith("127.")


def _hosts(hellos: Mapping[int, Message], ranks: Sequence[int]) -> list[str]:
    return list(dict.fromkeys(hellos[rank]["host"] for rank in ranks))
