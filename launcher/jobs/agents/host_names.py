"""Hosts by their names and addresses: which of the expected ones an agent is on, and where this one can be reached."""

from __future__ import annotations

import contextlib
import ipaddress
import socket
from collections.abc import Collection, Iterable, Sequence

# Bridges of containers and virtual machines: the same addresses on every host, so they lead to nobody or to oneself.
_VIRTUAL = ("docker", "br-", "virbr", "veth", "cni", "flannel", "cali", "lxc", "podman")


def find_host(name: str, addresses: Iterable[str], expected: Collection[str]) -> str | None:
    """The one of `expected` that `name` means; None where there is none, or several could be meant.

    A short name means the long one and the other way round: "n3" and "n3.cluster", but not "n3.a" and "n3.b". Else the
    one that is given by one of the host's `addresses`.
    """
    if name in expected:
        return name
    own = set(addresses)
    matches = [host for host in expected if _same_name(host, name)] or [host for host in expected if host in own]
    return matches[0] if len(matches) == 1 else None


def _same_name(one: str, other: str) -> bool:
    one, other = one.lower(), other.lower()
    if one == other or one.partition(".")[0] != other.partition(".")[0]:
        return one == other
    return ("." not in one or "." not in other) and not _is_address(one) and not _is_address(other)


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def is_loopback(address: str) -> bool:
    """Whether it means whoever uses it; so does no address at all."""
    return not address or (_is_address(address) and ipaddress.ip_address(address).is_loopback)


def own_addresses(*, bridges: bool = True) -> tuple[str, ...]:
    """Addresses of this host at which others may reach it, the likeliest first: IPv4 before IPv6, `bridges` last."""
    import psutil

    up = {name for name, state in psutil.net_if_stats().items() if state.isup}
    found: list[tuple[bool, bool, str]] = []
    for name, addresses in psutil.net_if_addrs().items():
        is_bridge = name.startswith(_VIRTUAL)
        for each in addresses if name in up and (bridges or not is_bridge) else ():
            if each.family not in (socket.AF_INET, socket.AF_INET6):
                continue
            with contextlib.suppress(ValueError):
                address = ipaddress.ip_address(each.address)
                if not (address.is_loopback or address.is_link_local):
                    found.append((is_bridge, address.version == 6, str(address)))
    return tuple(address for _, _, address in sorted(found, key=lambda each: each[:2]))


def head_addresses(first: Sequence[str] = ()) -> tuple[str, ...]:
    """Where agents may find this host, to be tried in turn: `first`, its addresses, its name, and, for agents beside it, the
    loopback."""
    return tuple(dict.fromkeys((*first, *own_addresses(), socket.gethostname(), "127.0.0.1")))


def addresses_of_head(told: Sequence[str]) -> tuple[str, ...]:
    """Those of MEGA_HEAD that an agent on this host is to try: the loopback only where the head is here too. Elsewhere somebody
    else may listen there."""
    elsewhere = tuple(address for address in told if not is_loopback(address))
    own = {socket.gethostname(), *own_addresses(bridges=False)}
    return tuple(told) if not elsewhere or own & set(elsewhere) else elsewhere


def join_head(addresses: Sequence[str], port: int) -> str:
    """The value of MEGA_HEAD."""
    return f"{','.join(addresses)}:{port}"


def split_head(text: str) -> tuple[list[str], int]:
    """Addresses and port of MEGA_HEAD. Raises ValueError where it holds none."""
    addresses, _, port = text.rpartition(":")
    found = [address.strip().strip("[]") for address in addresses.split(",") if address.strip()]
    if not found or not 0 < int(port) < 1 << 16:
        raise ValueError(text)
    return found, int(port)
