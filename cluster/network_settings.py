"""Which network NCCL and gloo use between hosts, from what this host has: settings with a reason each.

NCCL falls back to TCP where it finds no InfiniBand: a run then trains ten times slower and says nothing. So what is to be used
is settled here, and NCCL_NET makes anything else an error. What a user or an administrator has set is never changed. Names and
meanings are those of NVIDIA's "NCCL environment variables". Imports without torch.
"""

from __future__ import annotations

import re
import socket
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from cluster.errors import NetworkError
from cluster.fabric.counters.sources import Sources

Wanted = Literal["auto", "infiniband", "roce", "socket"]
NetworkKind = Literal["infiniband", "roce", "socket"]

_LAYERS: Mapping[str, NetworkKind] = {"InfiniBand": "infiniband", "Ethernet": "roce"}
_RDMA: tuple[NetworkKind, ...] = ("infiniband", "roce")
"""The better first."""
_WORDS: Mapping[NetworkKind | None, str] = {"infiniband": "InfiniBand", "roce": "RoCE v2"}
_DEVICES = "sys/class/infiniband"
_VERBS = "dev/infiniband"
_PLUG_IN = "libnccl-net.so"


@dataclass(frozen=True, kw_only=True)
class Port:
    """One port of an RDMA device."""

    name: str
    """`device:port`, such as mlx5_0:1."""
    kind: NetworkKind | None
    """None for what NCCL's own transport cannot use, such as EFA."""
    state: str
    """ACTIVE, DOWN, INIT ..."""
    rate_gbit: float
    """Gbit/s; 0 where the driver does not say."""
    pci: str
    """PCI address of the device; empty where it has none."""
    has_roce_ipv4: bool = False
    has_roce_ipv6: bool = False
    """Whether it has an address for RoCE v2 that can be routed, of this family."""

    @property
    def is_active(self) -> bool:
        """Whether the link is up and, on InfiniBand, the subnet manager has set it up."""
        return self.state == "ACTIVE"

    def __str__(self) -> str:
        layer = {"infiniband": "InfiniBand", "roce": "Ethernet"}.get(self.kind or "", "neither InfiniBand nor Ethernet")
        where = f" at {self.pci}" if self.pci else ""
        return f"{self.name}{where} ({layer}, {self.rate_gbit:g} Gbit/s, {self.state})"


@dataclass(frozen=True, kw_only=True)
class Setting:
    """An environment variable, and why it has this value."""

    name: str
    value: str
    reason: str


@dataclass(frozen=True, kw_only=True)
class NetworkChoice:
    """What this host's ranks use between hosts."""

    kind: NetworkKind
    settings: tuple[Setting, ...]
    """To be added to the environment of ranks."""
    kept: tuple[Setting, ...]
    """Set already, by the user or in nccl.conf, and left as they are."""
    ports: tuple[Port, ...]
    """That NCCL is to use."""
    left_out: Mapping[str, str]
    """Ports that are not used, by name, with the reason."""
    interface: str | None
    """Network interface by which ranks find one another; None where all are on this host."""
    interface_mbit: int | None = None
    """Mbit/s of it, where the driver knows."""
    notes: tuple[str, ...] = ()
    """What people should know beside: sentences."""

    @property
    def environment(self) -> dict[str, str]:
        """The settings as variables."""
        return {setting.name: setting.value for setting in self.settings}

    def as_data(self) -> dict[str, Any]:
        """For JSON, and for comparison between hosts: `has` counts ports by what they are, without their names."""
        return {
            "kind": self.kind,
            "has": dict(Counter(f"{port.rate_gbit:g} Gbit/s {_WORDS[port.kind]}" for port in self.ports)),
            "ports": [str(port) for port in self.ports],
            "left_out": dict(self.left_out),
            "interface": self.interface,
            "interface_mbit": self.interface_mbit,
            "settings": {setting.name: setting.value for setting in self.settings},
            "kept": {setting.name: setting.value for setting in self.kept},
            "notes": list(self.notes),
        }


def read_ports(root: Path = Path("/")) -> tuple[Port, ...]:
    """All ports of RDMA devices, from `sys/class/infiniband` below `root`; none where there are no such devices."""
    sources = Sources(root)
    return tuple(
        _port(root, device, number)
        for device in sources.names(_DEVICES)
        for number in sources.names(f"{_DEVICES}/{device}/ports")
    )


def interface_towards(address: str, *, root: Path = Path("/")) -> str | None:
    """The interface of this host that leads to `address`, a name or an IP address. Where that is this host itself by a
    loopback address, as many hosts call themselves, the one of the default route. None where nobody can say."""
    import psutil

    try:
        family, _, _, _, there = socket.getaddrinfo(address, 9, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect(there)  # sends nothing, and tells which of our addresses leads there
            own = str(probe.getsockname()[0])
    except OSError:
        return None
    if own.startswith("127.") or own == "::1":
        return _default_interface(root)
    for name, known in psutil.net_if_addrs().items():
        if any(one.address.partition("%")[0] == own for one in known):
            return name
    return None


def choose_network(
    wanted: Wanted,
    environ: Mapping[str, str],
    *,
    host: str,
    interface: str | None = None,
    on_gpus: bool = True,
    root: Path = Path("/"),
) -> NetworkChoice:
    """What to use on this host, and the settings for it.

    Args:
        wanted: `auto` takes InfiniBand where a port of it is active, else RoCE v2, else TCP.
        environ: what is set already. It is left as it is.
        host: name of this host, for errors.
        interface: by which the hosts of the run find one another; None where all ranks are on one host, which then needs no
            settings for it.
        on_gpus: whether ranks train on GPUs. On processors gloo moves their data, over TCP, and opens no RDMA device.
        root: folder below which `sys`, `proc`, `dev`, `etc` and the folders of LD_LIBRARY_PATH lie.

    Raises:
        NetworkError: InfiniBand or RoCE is wanted, and no port here can do it, or what is set forbids it; or it is to be used,
            and programs cannot open its devices.
    """
    ports = read_ports(root)
    kind = _kind(wanted, ports, environ, host)
    used, left_out = _used(kind, ports)
    given = {**_nccl_conf(root, environ), **environ}
    if kind in _RDMA and on_gpus:
        _check_devices(wanted, kind, used, given, host, root)
    plug_in = None if "NCCL_NET_PLUGIN" in given else _plug_in(environ, root)
    proposed = [*_transport(wanted, kind, used, given, has_plug_in=plug_in is not None), *_bootstrap(interface)]
    # Of the older name torch says that it is deprecated, and follows it.
    aliases = {"TORCH_NCCL_ASYNC_ERROR_HANDLING": "NCCL_ASYNC_ERROR_HANDLING"}
    settings: list[Setting] = []
    kept: list[Setting] = []
    for setting in proposed:
        name = next((name for name in (setting.name, aliases.get(setting.name, "")) if name in given), None)
        if name is None:
            settings.append(setting)
        else:
            where = "set in the environment" if name in environ else "set in nccl.conf"
            kept.append(Setting(name=name, value=given[name], reason=f"{where}, and left as it is"))
    speed = Sources(root).number(f"sys/class/net/{interface}/speed") if interface else None
    return NetworkChoice(
        kind=kind,
        settings=tuple(settings),
        kept=tuple(kept),
        ports=used,
        left_out=left_out,
        interface=interface,
        interface_mbit=speed if speed and speed > 0 else None,  # -1 where the driver does not know
        notes=_notes(kind, plug_in, given, host),
    )


def _kind(wanted: Wanted, ports: Sequence[Port], environ: Mapping[str, str], host: str) -> NetworkKind:
    if wanted == "socket":
        return "socket"
    forbidden = environ.get("NCCL_IB_DISABLE", "0") not in ("", "0")
    usable = [kind for kind in _RDMA if _candidates(kind, ports)]
    if wanted == "auto":
        return "socket" if forbidden else next(iter(usable), "socket")
    if forbidden:
        raise NetworkError(
            f'{host}: launch.network = "{wanted}", and NCCL_IB_DISABLE={environ["NCCL_IB_DISABLE"]} is set in the '
            "environment, which forbids it: unset one of them"
        )
    if wanted not in usable:
        found = "; ".join(map(str, ports)) or f"there is no device in /{_DEVICES}"
        needs = {"infiniband": "an active InfiniBand port", "roce": "an active Ethernet port with a RoCE v2 address"}
        raise NetworkError(
            f'{host}: launch.network = "{wanted}" needs {needs[wanted]}, and has none: {found}. Look at its cables and '
            'driver (ibstat), or set launch.network = "auto"'
        )
    return wanted


def _check_devices(
    wanted: Wanted, kind: NetworkKind, used: Sequence[Port], given: Mapping[str, str], host: str, root: Path
) -> None:
    """Raises NetworkError where ports are seen and cannot be opened: a container shows its host's /sys, and not its /dev."""
    if given.get("NCCL_NET", "IB") != "IB":  # someone has taken another way
        return
    if not any(name.startswith("uverbs") for name in Sources(root).names(_VERBS)):
        raise NetworkError(
            f'{host}: launch.network = "{wanted}" uses {_WORDS[kind]} ({", ".join(port.name for port in used)}), and there is no '
            f"/{_VERBS}/uverbs* to open it by: load ib_uverbs, or start the container with /{_VERBS} (docker, podman: --device "
            f'/{_VERBS}; apptainer: --bind /{_VERBS}). launch.network = "socket" trains over TCP, far slower'
        )


def _plug_in(environ: Mapping[str, str], root: Path) -> str | None:
    """The network plug-in that NCCL finds by itself."""
    folders = [folder for folder in environ.get("LD_LIBRARY_PATH", "").split(":") if folder.startswith("/")]
    paths = (f"{folder.rstrip('/')}/{_PLUG_IN}" for folder in folders)
    return next((path for path in paths if Sources(root).has(path.lstrip("/"))), None)


def _notes(kind: NetworkKind, plug_in: str | None, given: Mapping[str, str], host: str) -> tuple[str, ...]:
    if kind not in _RDMA or plug_in is None or "NCCL_NET" in given:
        return ()
    return (
        f"{host}: NCCL loads {plug_in} (LD_LIBRARY_PATH), and may use its network instead of {_WORDS[kind]}: NCCL_NET is "
        "left open, so look in NCCL's own log (NCCL_DEBUG=INFO) which one it takes; NCCL_NET_PLUGIN=none shuts it out",
    )


def _candidates(kind: NetworkKind, ports: Sequence[Port]) -> list[Port]:
    """Ports that can carry it."""
    active = [port for port in ports if port.kind == kind and port.is_active]
    return active if kind == "infiniband" else [port for port in active if port.has_roce_ipv4 or port.has_roce_ipv6]


def _used(kind: NetworkKind, ports: Sequence[Port]) -> tuple[tuple[Port, ...], dict[str, str]]:
    """The ports that training shall use, and why it shall not use the others."""
    candidates = _candidates(kind, ports) if kind in _RDMA else []
    fastest = max((port.rate_gbit for port in candidates), default=0.0)
    used = tuple(port for port in candidates if port.rate_gbit == fastest)
    left_out: dict[str, str] = {}
    for port in ports:
        if port in used:
            continue
        if port in candidates:
            reason = f"slower than the fastest ({fastest:g} Gbit/s): for storage or management"
        elif port.kind == kind and not port.is_active:
            reason = f"it is {port.state}"
        elif port.kind == kind:
            reason = "it has no RoCE v2 address that can be routed"
        else:
            reason = f"training uses {_WORDS.get(kind, 'TCP')}"
        left_out[str(port)] = reason
    return used, left_out


def _transport(
    wanted: Wanted, kind: NetworkKind, used: Sequence[Port], given: Mapping[str, str], *, has_plug_in: bool
) -> list[Setting]:
    """How NCCL moves data between hosts. A plug-in of the site's has a network of its own, by another name."""
    settings = [
        Setting(
            name="TORCH_NCCL_ASYNC_ERROR_HANDLING",
            value="3",
            reason="a rank whose collective fails ends its process, instead of leaving the others in theirs",
        )
    ]
    if kind == "socket":
        # Left open where nobody asked for TCP: a plug-in of the site's may know a network that shows no such port.
        if wanted == "socket":
            settings.append(Setting(name="NCCL_NET", value="Socket", reason='launch.network = "socket"'))
        return settings
    if given.get("NCCL_NET_PLUGIN", "none") == "none" and not has_plug_in:
        settings.append(
            Setting(
                name="NCCL_NET", value="IB", reason=f"without {_WORDS[kind]} NCCL fails, and never falls back to TCP"
            )
        )
    listing = ",".join(port.name for port in used)
    settings.append(
        Setting(
            name="NCCL_IB_HCA",
            value=f"={listing}",
            reason=f"exactly the active {_WORDS[kind]} ports of {used[0].rate_gbit:g} Gbit/s",
        )
    )
    if kind == "roce" and "NCCL_IB_GID_INDEX" not in given and not all(port.has_roce_ipv4 for port in used):
        # NCCL finds the index of the address itself since 2.21, which is older than any torch that runs here; but it looks
        # for one of IPv4, and takes one that cannot be routed where there is none.
        settings.append(
            Setting(
                name="NCCL_IB_ADDR_FAMILY", value="AF_INET6", reason="the ports have RoCE v2 addresses of IPv6 alone"
            )
        )
    settings += [
        Setting(
            name="NCCL_IB_TIMEOUT", value="20", reason="4.096 us * 2^20, 4.3 s: a route that changes is no failure"
        ),
        Setting(name="NCCL_IB_RETRY_CNT", value="7", reason="the most that the hardware allows"),
    ]
    return settings


def _bootstrap(interface: str | None) -> list[Setting]:
    """How ranks find one another."""
    if interface is None:
        return []
    reason = f"{interface} leads to the ranks' meeting point"
    return [
        Setting(name="NCCL_SOCKET_IFNAME", value=f"={interface}", reason=reason),
        # gloo goes by the host's name otherwise, which leads to the loopback device on many hosts.
        Setting(name="GLOO_SOCKET_IFNAME", value=interface, reason=reason),
    ]


def _port(root: Path, device: str, number: str) -> Port:
    sources = Sources(root)
    folder = f"{_DEVICES}/{device}/ports/{number}"
    kind = _LAYERS.get(sources.text(f"{folder}/link_layer").strip())
    rate = re.match(r"([\d.]+) Gb/sec", sources.text(f"{folder}/rate"))
    physical = sources.text(f"{folder}/phys_state")
    state = sources.text(f"{folder}/state").rpartition(":")[2].strip() or "in an unknown state"
    if state == "ACTIVE" and physical and "LinkUp" not in physical:
        state = physical.rpartition(":")[2].strip()
    families = _roce_families(sources, folder) if kind == "roce" else set()
    return Port(
        name=f"{device}:{number}",
        kind=kind,
        state=state,
        rate_gbit=float(rate[1]) if rate else 0.0,
        pci=_pci_address(root / _DEVICES / device / "device"),
        has_roce_ipv4=4 in families,
        has_roce_ipv6=6 in families,
    )


def _roce_families(sources: Sources, folder: str) -> set[int]:
    """Of the addresses for RoCE v2 that can be routed: 4, 6, both or none. Hundreds of entries, most of them empty."""
    families: set[int] = set()
    for index in sources.names(f"{folder}/gid_attrs/types"):
        if "RoCE v2" in sources.text(f"{folder}/gid_attrs/types/{index}"):
            address = sources.text(f"{folder}/gids/{index}").strip().replace(":", "")
            if address.startswith("0" * 20 + "ffff"):
                families.add(4)
            elif address.strip("0") and not address.startswith("fe80"):
                families.add(6)
    return families


def _pci_address(link: Path) -> str:
    try:
        name = link.resolve(strict=True).name
    except OSError:
        return ""
    return name if re.fullmatch(r"[0-9a-f]{4,}:[0-9a-f]{2}:[0-9a-f]{2}\.[0-7]", name) else ""


def _default_interface(root: Path) -> str | None:
    """Of `proc/net/route`, whose lines begin with an interface and a destination; eight zeros are the default."""
    rows = [line.split() for line in Sources(root).text("proc/net/route").splitlines()[1:]]
    return next((row[0] for row in rows if len(row) > 1 and row[1] == "00000000"), None)


def _nccl_conf(root: Path, environ: Mapping[str, str]) -> dict[str, str]:
    """What an administrator or the user has set for NCCL in files; NCCL itself reads these where a variable is not set."""
    user_file = environ.get("NCCL_CONF_FILE") or f"{environ.get('HOME', '')}/.nccl.conf"
    found: dict[str, str] = {}
    for path in ("etc/nccl.conf", user_file.lstrip("/")):
        for line in Sources(root).text(path).splitlines():
            name, is_set, value = line.partition("=")
            if is_set and not name.strip().startswith("#"):
                found[name.strip()] = value.strip()
    return found
