"""The topology as it was measured, with what was found marked at its place."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cluster.fabric.report.canvas import bare, box
from cluster.fabric.report.palette import Palette
from cluster.fabric.report.views import Fabric, Leaf, short_names

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_HOST_TOP, _HOST_HEIGHT = 118.0, 40.0
_LEAF_BOTTOM, _LEAF_HEIGHT = 202.0, 28.0
_SPINE_BOTTOM, _SPINE_HEIGHT = 286.0, 28.0
_GAP, _LEAF_GAP, _MARGIN = 8.0, 34.0, 14.0
HEIGHT = 336.0
"""Of the drawing, in pixels."""
_WORDS = {
    "slow_host": "slow compute",
    "slow_sender": "slow out",
    "slow_receiver": "slow in",
    "slow_link": "slow link",
    "missing_rank": "missing",
    "mismatched_collective": "other collective",
    "transport_fault": "transport",
}
_ON_LINK = {"slow_sender": "-|>", "slow_receiver": "<|-", "slow_link": "<|-|>", "transport_fault": "-"}


def topology_note(fabric: Fabric) -> str:
    """How to read it."""
    num_hosts = sum(len(leaf.hosts) + leaf.num_hidden for leaf in fabric.leaves)
    shown = f"; {len(fabric.hosts)} of {num_hosts:,} hosts below these leaves" if num_hosts > len(fabric.hosts) else ""
    return f"hosts that share a switch stand together; an arrow points where it is slow{shown}"


def topology(axes: Axes, fabric: Fabric, palette: Palette, *, width: float) -> None:
    """Hosts below their leaves, leaves below the spine; arrows tell the direction in which a link or path is slow."""
    bare(axes, width, HEIGHT)
    slots = sum(max(len(leaf.hosts) + bool(leaf.num_hidden), 1) for leaf in fabric.leaves)
    room = width - 2 * _MARGIN - _LEAF_GAP * (len(fabric.leaves) - 1)
    host_width = min(room / slots - _GAP, 120.0)
    left = (
        width - (slots * (host_width + _GAP) - _GAP * len(fabric.leaves) + _LEAF_GAP * (len(fabric.leaves) - 1))
    ) / 2
    names = short_names([host for leaf in fabric.leaves for host in leaf.hosts])
    centres: dict[str, float] = {}
    has_spine = len(fabric.leaves) > 1
    for leaf in fabric.leaves:
        own = max(len(leaf.hosts) + bool(leaf.num_hidden), 1)
        span = own * (host_width + _GAP) - _GAP
        middle = left + span / 2
        for place, host in enumerate(leaf.hosts):
            centres[host] = left + place * (host_width + _GAP) + host_width / 2
            _host(axes, names[host], centres[host], host_width, fabric.marks.get(host, ()), palette)
        if leaf.num_hidden:
            _hidden(axes, leaf.num_hidden, left + span - host_width / 2, host_width, palette)
        _switch(axes, leaf.name, middle, min(max(span, 90.0), span if own > 1 else 90.0), _LEAF_BOTTOM, palette)
        if has_spine:
            _uplink(axes, leaf, middle, palette)
        left += span + _LEAF_GAP
    if has_spine:
        _switch(axes, "uplinks", width / 2, width - 2 * _MARGIN, _SPINE_BOTTOM, palette)
    if fabric.num_hidden_leaves:
        note = f"{fabric.num_hidden_leaves:,} more leaves, nothing found there"
        axes.text(
            width - _MARGIN, _SPINE_BOTTOM + 14, f"{note}  ", color=palette.muted, ha="right", va="center", fontsize=9
        )
    for sender, receiver in fabric.paths:
        if sender in centres and receiver in centres:
            _path(axes, centres[sender], centres[receiver], palette)


def _host(axes: Axes, name: str, middle: float, width: float, marks: tuple[str, ...], palette: Palette) -> None:
    bad = bool(marks)
    filled = "slow_host" in marks or "mismatched_collective" in marks
    gone = "missing_rank" in marks
    on_link = next((kind for kind in marks if kind in _ON_LINK), None)
    colour = palette.bad if on_link else palette.quiet
    axes.annotate(
        "",
        xy=(middle, _LEAF_BOTTOM),
        xytext=(middle, _HOST_TOP),
        arrowprops={
            "arrowstyle": _ON_LINK[on_link] if on_link else "-",
            "color": colour,
            "linewidth": 2.6 if on_link else 1.2,
            "linestyle": (0, (2, 2)) if gone or on_link == "transport_fault" else "solid",
            "shrinkA": 1,
            "shrinkB": 1,
            "mutation_scale": 13,
        },
    )
    box(
        axes,
        middle - width / 2,
        _HOST_TOP - _HOST_HEIGHT,
        width,
        _HOST_HEIGHT,
        facecolor=palette.bad if filled else palette.panel,
        edgecolor=palette.bad if bad else palette.line,
        linewidth=1.6 if bad else 1.0,
        linestyle=(0, (3, 2)) if gone else "solid",
    )
    if width >= 6.2 * len(name) + 4 or bad:
        axes.text(
            middle,
            _HOST_TOP - _HOST_HEIGHT / 2,
            name,
            color=palette.ground if filled else palette.bad if bad else palette.ink,
            ha="center",
            va="center",
            fontsize=9.5,
            fontweight="bold" if bad else "normal",
        )
    for line, kind in enumerate(marks):
        axes.text(
            middle,
            _HOST_TOP - _HOST_HEIGHT - 14 - 15 * line,
            _WORDS[kind],
            color=palette.bad,
            ha="center",
            va="center",
            fontsize=9.5,
        )


def _hidden(axes: Axes, count: int, middle: float, width: float, palette: Palette) -> None:
    axes.text(
        middle,
        _HOST_TOP - _HOST_HEIGHT / 2,
        f"+{count:,}",
        color=palette.muted,
        ha="center",
        va="center",
        fontsize=9.5,
    )


def _switch(axes: Axes, name: str, middle: float, width: float, bottom: float, palette: Palette) -> None:
    box(axes, middle - width / 2, bottom, width, _LEAF_HEIGHT, facecolor=palette.panel, edgecolor=palette.line)
    axes.text(middle, bottom + _LEAF_HEIGHT / 2, name, color=palette.muted, ha="center", va="center", fontsize=9.5)


def _uplink(axes: Axes, leaf: Leaf, middle: float, palette: Palette) -> None:
    colour = palette.warn if leaf.congested else palette.quiet
    bottom, top = _LEAF_BOTTOM + _LEAF_HEIGHT, _SPINE_BOTTOM
    for shift in (-4, 4):
        axes.plot(
            [middle + shift] * 2,
            [bottom, top],
            color=colour,
            linewidth=3.4 if leaf.congested else 1.2,
            solid_capstyle="butt",
        )
    if leaf.congested:
        axes.text(middle + 14, (bottom + top) / 2, "congested", color=palette.warn, va="center", fontsize=9.5)


def _path(axes: Axes, sender: float, receiver: float, palette: Palette) -> None:
    """An arrow below the hosts, from the sender to the receiver."""
    bottom = _HOST_TOP - _HOST_HEIGHT
    distance = receiver - sender
    depth = min(0.14 * abs(distance), 52.0)
    axes.annotate(
        "",
        xy=(receiver, bottom),
        xytext=(sender, bottom),
        arrowprops={
            "arrowstyle": "-|>",
            "color": palette.bad,
            "linewidth": 2.2,
            # The curve comes half as far as its control point, which lies `rad` times the distance aside.
            "connectionstyle": f"arc3,rad={2 * depth / distance}",
            "shrinkA": 3,
            "shrinkB": 3,
            "mutation_scale": 13,
        },
    )
    axes.text(
        (sender + receiver) / 2,
        bottom - depth,
        "bad path",
        color=palette.bad,
        ha="center",
        va="center",
        fontsize=9.5,
        bbox={"boxstyle": "square,pad=0.25", "facecolor": palette.ground, "edgecolor": "none"},
    )
