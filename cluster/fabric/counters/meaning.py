"""What it means when a counter grows: one table, the only place that knows.

Sources: the kernel's Documentation/ABI/stable/sysfs-class-infiniband; NVIDIA's "Understanding mlx5 Linux Counters and
Status Parameters" (HCA, port and ethtool counters); RFC 3168 (ECN); the kernel's networking/snmp_counter.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Meaning = Literal[
    "congested_ahead",
    "congested_before",
    "loss_out",
    "loss_in",
    "own_queue",
    "link",
    "link_in",
    "link_elsewhere",
    "corruption",
    "cannot_absorb",
    "peer_not_ready",
    "unreachable",
    "down",
    "throttled",
]
"""congested_ahead, congested_before: the network has no room for what this host sends; queues stand before this host.
loss_out, loss_in: of what it sends, of what it is sent. own_queue: it drops what it cannot send fast enough. link,
link_in: its own cable or NIC errs, on what comes in. link_elsewhere: a link further away errs. cannot_absorb: its memory or
processor is too slow for what arrives. peer_not_ready: the far host is. unreachable: no answer in time. down: the port is.
throttled: its processor or GPU is held back."""


@dataclass(frozen=True, kw_only=True)
class Signal:
    """A counter, or several that mean the same."""

    pattern: str
    """Of the full name, with `*` for devices and numbers."""
    meaning: Meaning
    says: str
    """What its growth says, as the second half of a sentence."""
    silence_tells: bool = False
    """Whether its standing still says that the thing did not happen. A TCP stack without ECN counts no marks: no."""
    share_of: str | None = None
    """Name, beside it, of what it is a share of; below `least_share` it is everyday life."""
    least_share: float = 0.0
    only_beside_others: bool = False
    """It grows on healthy hosts too, and only tells where it grows more than theirs."""


def _infiniband(name: str, meaning: Meaning, says: str, **more: bool) -> Signal:
    return Signal(pattern=f"infiniband/*/{name}", meaning=meaning, says=says, **more)  # type: ignore[arg-type]


def _ethtool(name: str, meaning: Meaning, says: str, **more: bool) -> Signal:
    return Signal(pattern=f"ethtool/*/{name}", meaning=meaning, says=says, **more)  # type: ignore[arg-type]


def _tcp(name: str, meaning: Meaning, says: str, *, share_of: str = "OutSegs", least_share: float = 1e-3) -> Signal:
    return Signal(
        pattern=f"tcp/*/{name}", meaning=meaning, says=says, share_of=f"tcp/host/{share_of}", least_share=least_share
    )


SIGNALS: tuple[Signal, ...] = (
    _infiniband("port_xmit_wait", "congested_ahead", "the port had data and no room ahead", silence_tells=True),
    _infiniband("rp_cnp_handled", "congested_ahead", "told to send slower by receivers", silence_tells=True),
    _infiniband("rp_cnp_ignored", "congested_ahead", "told to send slower by receivers, and did not"),
    _infiniband("np_ecn_marked_roce_packets", "congested_before", "packets came in marked by a full queue"),
    _infiniband("np_cnp_sent", "congested_before", "it told senders to slow down"),
)
