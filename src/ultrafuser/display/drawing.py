"""What the figures share: matplotlib imported late, sizes and inks, and a figure as SVG or PNG.

matplotlib's object-oriented `Figure` is used throughout: pyplot, its backends and windows play no part.
"""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ultrafuser.errors import MissingExtraError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# PAPER is one off white, so that `svg` can tell it from the white of a label on a dark bar.
INK, MUTED, RULE, PAPER = "#24292f", "#6e7781", "#d0d7de", "#fffffe"
_CSS_VARIABLES = {INK: "--ink", MUTED: "--muted", RULE: "--rule", PAPER: "--paper"}

WIDTH = 9.0  # inches: one point is close to 1.5 pixels in the report's column
TEXT, SMALL = 9.5, 8.5  # points
LABEL: dict[str, Any] = {"size": SMALL, "color": MUTED}  # of axes and small headings
LEGEND_STYLE: dict[str, Any] = {
    "fontsize": TEXT,
    "labelcolor": INK,
    "frameon": False,
    "handlelength": 1.0,
    "handleheight": 0.9,
    "handletextpad": 0.5,
    "columnspacing": 1.6,
}


def matplotlib_module() -> Any:
    """matplotlib, or a `MissingExtraError` with the command that installs it."""
    try:
        import matplotlib
    except ImportError as error:
        raise MissingExtraError("matplotlib", "report", "drawing figures") from error
    return matplotlib


def new_figure(width: float, height: float, *, fixed: bool = False) -> Figure:
    """An empty figure, in inches.

    Args:
        fixed: leave all axes where they are put. Otherwise axes of `subplots` make room for labels and legends.
    """
    matplotlib_module()
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    layout = None if fixed else ConstrainedLayoutEngine(w_pad=0.08, h_pad=0.08, wspace=0.02, hspace=0.03)
    return Figure(figsize=(width, height), layout=layout)


def plain_axes(axes: Axes, *, spines: Sequence[str] = ()) -> None:
    """Only the named spines, no tick marks, small muted tick labels."""
    axes.set_facecolor("none")
    for side, spine in axes.spines.items():
        spine.set_visible(side in spines)
        spine.set_color(RULE)
    axes.tick_params(length=0, labelsize=SMALL, labelcolor=MUTED)


def interval_point(
    axes: Axes, row: float, value: float, bounds: Sequence[float], shade: str, *, hollow: bool = False
) -> None:
    """A number as a point on its row, its interval as a line."""
    axes.plot(bounds, [row, row], color=shade, linewidth=1.8, alpha=0.75, solid_capstyle="butt")
    face = PAPER if hollow else shade
    axes.plot([value], [row], marker="o", markersize=6, color=shade, markerfacecolor=face)


def name_rows(axes: Axes, names: Sequence[str]) -> None:
    """Label the rows 0, 1, ... of the y axis."""
    axes.set_yticks(range(len(names)), names)
    axes.tick_params(axis="y", labelsize=TEXT, labelcolor=INK)


def name_width(names: Sequence[str]) -> float:
    """Inches that the longest of some names takes at size TEXT, generously."""
    return 0.085 * max((len(name) for name in names), default=0)


def legend_shape(names: Sequence[str], width: float = WIDTH - 1) -> tuple[int, float]:
    """How many columns of a legend fit into a width, and how high the legend gets, in inches."""
    columns = max(1, min(len(names), int(width / (name_width(names) + 0.4))))
    return columns, 0.21 * -(-len(names) // columns)


def draw_legend(figure: Figure, handles: Sequence[Any], *, columns: int, loc: Any = "outside upper left") -> None:
    """A legend beside the axes, above them by default."""
    figure.legend(handles=list(handles), loc=loc, ncols=columns, **LEGEND_STYLE)


def svg(figure: Figure, *, themed: bool = True) -> str:
    """The figure as an `<svg>` element without a prolog, equal for equal figures.

    Text stays text. Ink follows the page if `themed` (see `themed_svg`). A file of its own has plain ink.
    """
    buffer = io.StringIO()
    _switch_off_mathematics(figure)
    with (
        matplotlib_module().rc_context({"svg.fonttype": "none", "svg.hashsalt": "ultrafuser"}),
        warnings.catch_warnings(),
    ):
        warnings.filterwarnings("ignore", message="Glyph .* missing")
        figure.savefig(buffer, format="svg", facecolor="none", metadata={"Date": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"\s*<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r'<g id="[^"]*">', "<g>", text)  # ids such as figure_1 would repeat within a page
    # DejaVu Sans, with which the layout was made, is wider than the system's font: nothing can overlap.
    text = re.sub(r"'DejaVu Sans'(?:, [^;\"]*)?", "system-ui, 'DejaVu Sans', sans-serif", text)
    return themed_svg(text.strip()) if themed else text.strip()


def themed_svg(image: str) -> str:
    """An image of `svg` whose ink follows the page's --ink, --muted, --rule and --paper (dark mode)."""
    for ink, variable in _CSS_VARIABLES.items():
        image = image.replace(ink, f"var({variable}, {ink})")
    return image


def png_bytes(figure: Figure, *, dpi: int = 200, metadata: Mapping[str, str] | None = None) -> bytes:
    """The figure as the bytes of a PNG file on white, with `dpi` pixels per inch and further text chunks."""
    buffer = io.BytesIO()
    _switch_off_mathematics(figure)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing")  # no font has every script: boxes instead
        figure.savefig(buffer, format="png", dpi=dpi, facecolor="white", metadata=dict(metadata or {}))
    return buffer.getvalue()


def _switch_off_mathematics(figure: Figure) -> None:
    """Show dollar signs as they are: a token may hold some."""
    from matplotlib.text import Text

    for text in figure.findobj(Text):
        text.set_parse_math(False)
