"""The topology as it was measured, with what was found marked at its place."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from cluster.fabric.report.canvas import bare, box
from cluster.fabric.report.palette import Palette
from cluster.fabric.report.views import Fabric, Leaf, short_names

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_HOST_TOP, _HOST_HEIGHT = 122.0, 40.0
_LEAF_BOTTOM, _LEAF_HEIGHT = 202.0, 32.0
_SPINE_BOTTOM, _SPINE_HEIGHT = 288.0, 28.0
_MARGIN = 14.0
_LABEL_WIDTH, _LABEL_HEIGHT = 74.0, 15.0
_NARROW = 26.0
"""Hosts below this width have no room for a name."""
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
    names = short_names(fabric.hosts)
    many = len(fabric.hosts) > 16
    gap, leaf_gap = (2.0, 24.0) if many else (8.0, 34.0)
    slots, num_leaves = max(len(fabric.hosts), 1), len(fabric.leaves)
    pitch = min((width - 2 * _MARGIN - leaf_gap * (num_leaves - 1)) / slots, 128.0)
    left = (width - slots * pitch - leaf_gap * (num_leaves - 1)) / 2
    centres: dict[str, float] = {}
    for leaf in fabric.leaves:
        span = pitch * len(leaf.hosts)
        middle = left + span / 2
        for place, host in enumerate(leaf.hosts):
            centres[host] = left + (place + 0.5) * pitch
            _host(axes, names[host], centres[host], pitch - gap, fabric.marks.get(host, ()), palette)
        label = f"{leaf.name}\n+{leaf.num_hidden:,} hosts" if leaf.num_hidden else leaf.name
        _switch(axes, label, middle, max(span - gap, 58.0), _LEAF_BOTTOM, _LEAF_HEIGHT, palette)
        if num_leaves > 1:
            _uplink(axes, leaf, middle, palette)
        left += span + leaf_gap
    if num_leaves > 1:
        more = f"     {fabric.num_hidden_leaves:,} more leaves, nothing found there" if fabric.num_hidden_leaves else ""
        _switch(axes, f"uplinks{more}", width / 2, width - 2 * _MARGIN, _SPINE_BOTTOM, _SPINE_HEIGHT, palette)
    for sender, receiver in fabric.paths:
        if sender in centres and receiver in centres:
            _path(axes, centres[sender], centres[receiver], palette)
    hidden = {host for host in centres if not _fits(names[host], pitch - gap)}
    ends: dict[str, tuple[str, ...]] = {host: () for path in fabric.paths for host in path if host in hidden}
    _labels(axes, {**ends, **fabric.marks}, centres, {host: names[host] for host in hidden}, palette)


def _labels(
    axes: Axes,
    marks: Mapping[str, tuple[str, ...]],
    centres: Mapping[str, float],
    names: Mapping[str, str],
    palette: Palette,
) -> None:
    """What was found of each host, below it; one label lower than its neighbour's where both have no room.

    names: of hosts whose boxes have no room for them.
    """
    taken: list[tuple[float, float]] = []
    for host in sorted(marks.keys() & centres.keys(), key=lambda host: centres[host]):
        lines = [*([names[host]] if host in names else []), *(_WORDS[kind] for kind in marks[host])]
        top = _HOST_TOP - _HOST_HEIGHT - 14
        while any(abs(centres[host] - middle) < _LABEL_WIDTH and top > bottom for middle, bottom in taken):
            top -= _LABEL_HEIGHT
        taken.append((centres[host], top - _LABEL_HEIGHT * len(lines)))
        for number, line in enumerate(lines):
            axes.text(
                centres[host],
                top - _LABEL_HEIGHT * number,
                line,
                color=palette.bad,
                ha="center",
                va="center",
                fontsize=9.5,
                fontweight="bold" if host in names and number == 0 else "normal",
                zorder=5,
                bbox={"boxstyle": "square,pad=0.1", "facecolor": palette.ground, "edgecolor": "none"},
            )


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
        radius=min(4.0, width / 3),
        edgecolor=palette.bad if bad else palette.line,
        linewidth=1.6 if bad else 1.0,
        linestyle=(0, (3, 2)) if gone else "solid",
    )
    if _fits(name, width):
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


def _fits(name: str, width: float) -> bool:
    return width >= max(_NARROW, 6.2 * len(name))


def _switch(axes: Axes, name: str, middle: float, width: float, bottom: float, height: float, palette: Palette) -> None:
    box(axes, middle - width / 2, bottom, width, height, facecolor=palette.panel, edgecolor=palette.line)
    axes.text(
        middle, bottom + height / 2, name, color=palette.muted, ha="center", va="center", fontsize=9, linespacing=1.15
    )


def _uplink(axes: Axes, leaf: Leaf, middle: float, palette: Palette) -> None:
    """Two lines: what leaves the leaf, and what comes to it."""
    bottom, top = _LEAF_BOTTOM + _LEAF_HEIGHT, _SPINE_BOTTOM
    for way, shift, start, end in (("out", -5, bottom, top), ("in", 5, top, bottom)):
        congested = way in leaf.congested
        axes.annotate(
            "",
            xy=(middle + shift, end),
            xytext=(middle + shift, start),
            arrowprops={
                "arrowstyle": "-|>" if congested else "-",
                "color": palette.warn if congested else palette.quiet,
                "linewidth": 2.6 if congested else 1.2,
                "shrinkA": 1,
                "shrinkB": 1,
                "mutation_scale": 12,
            },
        )
    if leaf.congested:
        axes.text(middle + 17, (bottom + top) / 2, "congested", color=palette.warn, va="center", fontsize=9.5)


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
