"""What the pictures of a report have in common: their look, one panel for each network on each dataset, and legends.

Colours of Okabe and Ito, each with a marker and a line style, so that none needs colour alone.
"""

import io
import textwrap
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from reporting.gather import UNPRUNED_SCRIPT, Group
from reporting.naming import model_label
from utils.errors import printable

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
LINES = ("-", "--", "-.", ":")
STEPS = {UNPRUNED_SCRIPT: "training", "pruning.py": "fine-tuning", "quantize_encode.py": "fine-tuning of codebooks"}
MANY = 14  # methods that one panel can still show apart
LOOK = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#dddddd",
    "axes.axisbelow": True,
    "legend.frameon": False,
    "legend.fontsize": 8,
    "text.parse_math": False,  # a name with dollar signs is no formula
}
PANEL_WIDTH, PANEL_HEIGHT, LEGEND_WIDTH, LEGEND_LINE = 4.6, 3.2, 3.4, 0.17  # inches
DOTS_PER_INCH, MAX_DOTS = 160, 30_000  # a picture of very many panels is drawn coarser
LEGEND_LENGTH, LAYER_LENGTH = 300, 40  # characters of a method's and of a layer's name
FAR_BELOW = 5.0  # points of accuracy; a gap that is also twice as large as all that lies above it ends the axis


class Style(NamedTuple):
    """How one method looks in every picture."""

    color: str
    marker: str
    linestyle: str


def png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    dots = min(DOTS_PER_INCH, MAX_DOTS / max(figure.get_size_inches()))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph|constrained_layout")  # names that the font has not got, or that take all room
        figure.savefig(buffer, format="png", dpi=dots, bbox_inches="tight")
    return buffer.getvalue()


def by_panel(groups: Iterable[Group], *, key: Callable[[Group], tuple[str, ...]]) -> dict[str, list[Group]]:
    """Groups by panel title. Where there are too many for one, those of the best accuracy, unpruned ones first."""
    members: dict[tuple[str, ...], list[Group]] = {}
    for group in groups:
        members.setdefault(key(group), []).append(group)
    chosen = {name: _fewer(group) for name, group in members.items()}
    return {panel_title(name, shown=len(chosen[name]), all_there_are=len(group)): chosen[name] for name, group in members.items()}


def panel_title(key: Sequence[str], *, shown: int, all_there_are: int) -> str:
    """`ResNet-20, digits, fine-tuning`, and how many methods are not shown."""
    dataset, model, *script = key
    limited = f"; the best {shown} of {all_there_are}" if shown < all_there_are else ""
    return ", ".join([model_label(model), dataset, *(STEPS.get(name, name) for name in script)]) + limited


def _fewer(groups: Sequence[Group]) -> list[Group]:
    def rank(group: Group) -> tuple[bool, float]:
        return group.first.script != UNPRUNED_SCRIPT, -group.statistic("last_top1").mean

    chosen = sorted(groups, key=rank)[:MANY]
    return [group for group in groups if group in chosen]


def styles(groups: Sequence[Any]) -> list[Style]:
    """One for each, no two of MANY the same."""
    return [
        Style(COLOURS[index % len(COLOURS)], MARKERS[index % len(MARKERS)], LINES[index // len(COLOURS) % len(LINES)])
        for index in range(len(groups))
    ]


def draw_panels(
    panels: Mapping[str, list[Any]], draw: Callable[[Axes, list[Any]], float | None], *, width: float = PANEL_WIDTH
) -> Figure:
    """One panel below the other, each with its legend at the right; `draw` gives the height that it needs, in inches."""
    figure = Figure(layout="constrained")
    heights = []
    grid = figure.subplots(len(panels), 1, squeeze=False)
    for axes, (title, members) in zip(grid[:, 0], panels.items(), strict=True):
        axes.set_title(title, loc="left")
        height = draw(axes, members) or PANEL_HEIGHT
        lines = 0
        if axes.get_legend_handles_labels()[0]:
            legend = axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5))
            lines = sum(1 + text.get_text().count("\n") for text in legend.get_texts())
        heights.append(max(height, LEGEND_LINE * lines + 0.8))
    grid[0, 0].get_gridspec().set_height_ratios(heights)
    figure.set_size_inches(width + LEGEND_WIDTH, sum(heights))
    return figure


def legend_name(name: str) -> str:
    """On lines of their own; a name that began with an underscore would be left out of a legend."""
    lines = textwrap.fill(printable(name, LEGEND_LENGTH), 44, break_on_hyphens=False)
    return f" {lines}" if lines.startswith("_") else lines


def lowest_shown(accuracies: Sequence[float]) -> float:
    """The lowest accuracy on the axis: one far below all others would press them into a line. At most a quarter is left out."""
    ranked = sorted(accuracies)
    lowest = ranked[0]
    for index in range(len(ranked) // 4):
        above = ranked[index + 1 :]
        if above[0] - ranked[index] > max(FAR_BELOW, 2 * (above[-1] - above[0])):
            lowest = above[0]
    return lowest
