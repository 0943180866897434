"""Hosts on one machine: a network namespace each, on leaf bridges joined by an uplink, every link shaped.

All switches lie in a namespace of their own, so that the machine's own network is left as it is, and the removal of the
namespaces removes everything. Needs root, ip, tc and bridge.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

LINK_MBIT = 50.0
"""Two cores carry all flows of eight hosts at this rate in software and have time left for those who measure."""
FOREIGN_MBIT = 400.0
"""Of a foreign host's link: no limit to its traffic but the links of others."""
UPLINK_HEADROOM = 1.25
"""The uplink's rate over the sum of the links below a leaf: alone, the own flows never congest it."""
_QUEUE_S = 0.005
"""What a queue holds at its own rate. Shallow, as a switch's: acknowledgements wait in it too, and a deep one before a slow
link would slow down what goes the other way."""
_PACKET_BYTES = 4_000
"""The largest packet a host sends: fewer and larger ones than the wire's keep the shaping cheap, see `_BURST_BYTES`."""
_BURST_BYTES = 5_000
"""Just above the largest packet, which would be cut into those of the wire otherwise, and small against one transfer."""
_COMMAND_SECONDS = 60.0
_GUARD = """read -r _
for name in "$@"; do
    ip netns pids "$name" | xargs -r kill -9
    ip netns delete "$name"
done 2>/dev/null"""
"""Ends what runs in these namespaces and removes them, once its standard input ends."""
_counter = itertools.count()


@dataclass(frozen=True, kw_only=True)
class Host:
    """One namespace with one link, `eth0`. `port` is the other end of that link, at the leaf bridge."""

    name: str
    index: int
    leaf: int
    namespace: str
    foreign: bool
    """It takes no part in what is measured, and is there for traffic of others."""

    @property
    def address(self) -> str:
        """IPv4 address."""
        return f"10.99.0.{self.index + 1}"

    @property
    def mac(self) -> str:
        """Hardware address of its `eth0`."""
        return f"02:99:00:00:00:{self.index + 1:02x}"

    @property
    def port(self) -> str:
        """Name of the switch's end of its link."""
        return f"p-{self.name}"


def run_command(*command: str, stdin: str | None = None) -> str:
    """What the command printed. Raises RuntimeError with its complaint where it fails."""
    done = subprocess.run(command, input=stdin, capture_output=True, text=True, timeout=_COMMAND_SECONDS)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed ({done.returncode}): {done.stderr.strip()}\n{stdin or ''}")
    return done.stdout


def shaping(mbit: float, *, queue_bytes: int | None = None) -> str:
    """Words for tc that let `mbit` Mbit/s through, and queue `queue_bytes`, or for 5 ms, four packets at least."""
    limit = queue_bytes or max(_BURST_BYTES * 4, int(mbit * 1e6 / 8 * _QUEUE_S))
    return f"tbf rate {round(mbit * 1e6)}bit burst {_BURST_BYTES} limit {limit}"


class FabricOfHosts:
    """A context: within it there are `num_leaves * hosts_per_leaf` hosts h0, h1, ... and foreign ones x0, x1, ...

    link_mbit: rate of each host's link, each way, in Mbit/s. uplink_mbit: rate between the leaf and the one other leaf,
    each way; by default no own flow can congest it. The two leaves are joined directly; one leaf has no uplink.
    """

    def __init__(
        self,
        *,
        hosts_per_leaf: int = 4,
        num_leaves: int = 2,
        foreign_per_leaf: int = 2,
        link_mbit: float = LINK_MBIT,
        uplink_mbit: float | None = None,
    ) -> None:
        if num_leaves not in (1, 2):
            raise ValueError(f"one leaf or two, not {num_leaves}")
        self.link_mbit = link_mbit
        self.uplink_mbit = uplink_mbit or UPLINK_HEADROOM * hosts_per_leaf * link_mbit
        self.needed_mbit = hosts_per_leaf * link_mbit
        """What the hosts of one leaf can send over the uplink at most."""
        self._prefix = f"mega-{os.getpid()}-{next(_counter)}"
        self.switches = f"{self._prefix}-switches"
        self._num_leaves = num_leaves
        own = num_leaves * hosts_per_leaf
        self.hosts = tuple(self._host(f"h{i}", i, i // hosts_per_leaf, False) for i in range(own))
        self.foreign = tuple(
            self._host(f"x{i}", own + i, i // foreign_per_leaf, True) for i in range(num_leaves * foreign_per_leaf)
        )
        self._cleanup = contextlib.ExitStack()
        self.hosts_file = Path()

    def _host(self, name: str, index: int, leaf: int, foreign: bool) -> Host:
        return Host(name=name, index=index, leaf=leaf, namespace=f"{self._prefix}-{name}", foreign=foreign)

    def __enter__(self) -> Self:
        namespaces = [self.switches, *(host.namespace for host in self.all_hosts)]
        with contextlib.ExitStack() as stack:
            directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="fabric-of-hosts-")))
            self.hosts_file = directory / "hosts"
            self.hosts_file.write_text(self._names())
            stack.enter_context(_removed_at_the_end(namespaces))
            for namespace in namespaces:
                run_command("ip", "netns", "add", namespace)
            self._wire()
            self._cleanup = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._cleanup.close()

    @property
    def all_hosts(self) -> tuple[Host, ...]:
        """Own hosts, then foreign ones."""
        return self.hosts + self.foreign

    def host_named(self, name: str) -> Host:
        """The host of that name."""
        return next(host for host in self.all_hosts if host.name == name)

    def set_rate_out(self, host: Host, mbit: float | None = None) -> None:
        """Shapes what `host` sends; None: as it was made."""
        self.set_queue(host.namespace, "eth0", shaping(mbit or self._mbit_of(host)))

    def set_rate_in(self, host: Host, mbit: float | None = None) -> None:
        """Shapes what `host` receives, at its leaf's port; None: as it was made."""
        self.set_queue(self.switches, host.port, shaping(mbit or self._mbit_of(host)))

    def set_filtering(self, active: bool) -> None:
        """Whether the switches' namespace applies its iptables rules to what they forward: it costs time, and is off."""
        # -e: without the kernel's module there is no such setting, and no filtering.
        setting = f"net.bridge.bridge-nf-call-iptables={int(active)}"
        run_command("ip", "netns", "exec", self.switches, "sysctl", "-eqw", setting)

    def set_queue(self, namespace: str, device: str, words: str) -> None:
        """Replaces a device's queueing discipline; what waits in the old one is lost."""
        run_command("tc", "-n", namespace, "qdisc", "replace", "dev", device, "root", *words.split())

    def _names(self) -> str:
        lines = [f"{host.address} {host.name}" for host in self.all_hosts]
        return "\n".join(["127.0.0.1 localhost", *lines]) + "\n"

    def _wire(self) -> None:
        links: list[str] = [f"link add leaf{leaf} type bridge mcast_snooping 0" for leaf in range(self._num_leaves)]
        if self._num_leaves > 1:
            links.append("link add up0 type veth peer name up1")
            links += [f"link set up{leaf} master leaf{leaf} up" for leaf in range(2)]
        for host in self.all_hosts:
            links.append(f"link add {host.port} type veth peer name eth0 address {host.mac} netns {host.namespace}")
            links.append(f"link set {host.port} master leaf{host.leaf} up")
        links += [f"link set leaf{leaf} up" for leaf in range(self._num_leaves)]
        self._batch("ip", self.switches, links)
        self.set_filtering(False)
        self._batch("bridge", self.switches, self._forwarding())
        for host in self.all_hosts:
            self._set_up(host)
        self._batch("tc", self.switches, [f"qdisc replace dev {d} root {w}" for d, w in self._switch_queues()])

    def _forwarding(self) -> list[str]:
        """Fixed tables: a switch that learns floods what it has not learnt, and a silent sink is never learnt."""
        ports = {host.port: host.leaf for host in self.all_hosts}
        if self._num_leaves > 1:
            ports |= {"up0": 0, "up1": 1}
        lines = [f"link set dev {port} learning off flood off" for port in ports]
        for host in self.all_hosts:
            lines.append(f"fdb add {host.mac} dev {host.port} master static")
            if self._num_leaves > 1:
                lines.append(f"fdb add {host.mac} dev up{1 - host.leaf} master static")
        return lines

    def _switch_queues(self) -> list[tuple[str, str]]:
        queues = [(host.port, shaping(self._mbit_of(host))) for host in self.all_hosts]
        if self._num_leaves > 1:
            queues += [(f"up{leaf}", shaping(self.uplink_mbit)) for leaf in range(2)]
        return queues

    def _mbit_of(self, host: Host) -> float:
        return FOREIGN_MBIT if host.foreign else self.link_mbit

    def _set_up(self, host: Host) -> None:
        # What one connection learnt of a path must not tell the next one: a fault between them came or went.
        for setting in ("net.ipv4.tcp_no_metrics_save=1", "net.ipv6.conf.all.disable_ipv6=1"):
            run_command("ip", "netns", "exec", host.namespace, "sysctl", "-qw", setting)
        lines = [
            "link set lo up",
            f"address add {host.address}/24 dev eth0",
            f"link set eth0 gso_max_size {_PACKET_BYTES} up",
            # The machine's default may be bbr, which takes more than its share of a shaped link and hides loss.
            "route change 10.99.0.0/24 dev eth0 congctl cubic",
        ]
        # Addresses are known: a lost ARP packet would look like a fault.
        others = (other for other in self.all_hosts if other is not host)
        lines += [f"neighbour add {other.address} lladdr {other.mac} dev eth0 nud permanent" for other in others]
        self._batch("ip", host.namespace, lines)
        self.set_rate_out(host)

    @staticmethod
    def _batch(program: str, namespace: str, lines: Sequence[str]) -> None:
        run_command(program, "-n", namespace, "-batch", "-", stdin="\n".join(lines) + "\n")


@contextlib.contextmanager
def _removed_at_the_end(namespaces: Sequence[str]) -> Iterator[None]:
    """Namespaces of these names are removed afterwards: by another process, so that they are even if this one is killed."""
    command = ["sh", "-c", _GUARD, "guard", *namespaces]
    with subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True) as guard:
        assert guard.stdin is not None
        try:
            yield
        finally:
            guard.stdin.close()
            guard.wait(timeout=_COMMAND_SECONDS)
