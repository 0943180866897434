"""The one place that knows matplotlib: figures, a few shapes, and how they become SVG for a page or a PNG."""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from html import escape
from typing import TYPE_CHECKING, Any

from cluster.errors import FabricError
from cluster.fabric.report.palette import LIGHT, Palette, placeholders

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    Draw = Callable[[Figure, Palette], None]

_PIXELS_PER_INCH = 72  # a point of the figure is a pixel of the page
_PNG_SCALE = 2
_FONTS = ("Inter", "Source Sans 3", "Helvetica Neue", "Arial", "Liberation Sans", "DejaVu Sans")


def svg(draw: Draw, *, width: float, height: float, name: str, label: str) -> str:
    """What `draw` draws, to be set into a page: colours are the page's CSS variables, the font is the page's.

    width, height: in pixels of the page. name: makes ids unique within the page. label: for those who cannot see it.
    Raises FabricError where matplotlib is missing.
    """
    palette, variables = placeholders()
    text = _saved(draw, palette, width, height, format="svg", transparent=True, metadata={"Date": None}).decode()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>\s*|<defs>\s*<style.*?</style>\s*</defs>\s*", "", text, flags=re.DOTALL)
    text = re.sub(r"font-family: [^;\"]*;? ?", "", text)
    text = re.sub(r"#fe01[0-9a-f]{2}", lambda found: variables[found[0]], text)
    text = re.sub(r'((?: id="|url\(#|href="#))', rf"\g<1>{name}-", text)
    head = f'<svg role="img" aria-label="{escape(label)}" viewBox="0 0 {width:g} {height:g}" xmlns="http://www.w3.org/2000/svg"'
    return re.sub(r"<svg[^>]*>", f'{head} xmlns:xlink="http://www.w3.org/1999/xlink">', text, count=1)


def png(draw: Draw, *, width: float, height: float) -> bytes:
    """What `draw` draws, on light ground, with two pixels for each pixel of `width` and `height`.

    Raises FabricError where matplotlib is missing.
    """
    return _saved(draw, LIGHT, width, height, format="png", dpi=_PNG_SCALE * _PIXELS_PER_INCH)


def _saved(draw: Draw, palette: Palette, width: float, height: float, **options: Any) -> bytes:
    try:
        import matplotlib
        from matplotlib.figure import Figure
        from matplotlib.font_manager import fontManager
    except ImportError as error:
        raise FabricError("a report is drawn by matplotlib, which is not here: pip install 'mega[report]'") from error
    installed = {font.name for font in fontManager.ttflist}
    fonts = [font for font in _FONTS if font in installed]
    buffer = io.BytesIO()
    with matplotlib.rc_context({"font.family": fonts, **_style(palette)}):
        figure = Figure(figsize=(width / _PIXELS_PER_INCH, height / _PIXELS_PER_INCH), facecolor=palette.ground)
        draw(figure, palette)
        figure.savefig(buffer, **options)
    return buffer.getvalue()


def _style(palette: Palette) -> dict[Any, Any]:
    return {
        "font.size": 10,
        "text.parse_math": False,  # a host's name may hold a dollar
        "svg.fonttype": "none",
        "svg.hashsalt": "fabric",
        "text.color": palette.ink,
        "axes.edgecolor": palette.line,
        "axes.labelcolor": palette.muted,
        "axes.linewidth": 1.0,
        "axes.axisbelow": True,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "grid.color": palette.line,
        "grid.linewidth": 0.8,
        "xtick.color": palette.line,
        "ytick.color": palette.line,
        "xtick.labelcolor": palette.muted,
        "ytick.labelcolor": palette.muted,
        "xtick.labelsize": 9,
        "ytick.labelsize": 9,
        "legend.frameon": False,
        "legend.fontsize": 9,
    }


def box(
    axes: Axes, left: float, bottom: float, width: float, height: float, *, radius: float = 4.0, **style: Any
) -> None:
    """A rectangle with round corners, in the units of axes whose two directions have the same scale."""
    from matplotlib.patches import FancyBboxPatch

    shape = f"round,pad=0,rounding_size={radius}"
    axes.add_patch(FancyBboxPatch((left, bottom), width, height, boxstyle=shape, **style))


def bare(axes: Axes, width: float, height: float) -> None:
    """Axes without anything of their own, whose units are pixels from the lower left."""
    axes.set_axis_off()
    axes.set_xlim(0, width)
    axes.set_ylim(0, height)
    axes.set_aspect("equal")
