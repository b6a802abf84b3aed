"""Figures of papers beside those of runs: the same network, dataset and method, at the nearest cost.

What is compared is the drop of top-1 accuracy, for the networks that were pruned differ. In a Markdown file the table goes
between `<!-- published:begin -->` and `<!-- published:end -->`.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from reporting.comparison_table import ComparisonTable
from reporting.gather import Group
from reporting.naming import method_label, model_label
from reporting.tables import markdown_table

FIGURES = Path(__file__).with_name("published.json")
HEADINGS = ("method", "network", "published top-1 %", "drop", "FLOPs left")
HEADINGS += ("ours top-1 %", "drop", "MACs left", "difference", "source")


class Published(NamedTuple):
    """What a paper says of a method: top-1 accuracy in percent before and after, and percent of the FLOPs that are left."""

    dataset: str
    model: str
    method: str
    before: float
    after: float
    cost_percent: float
    source: str


def published_figures() -> list[Published]:
    return [Published(**figure) for figure in json.loads(FIGURES.read_text())]


def beside(figure: Published, groups: Sequence[Group]) -> Group | None:
    """The runs of this method on the same network and dataset, or a copy of it such as `cifar10-jpeg`, at the nearest cost."""
    alike = [
        group
        for group in groups
        if group.first.model == figure.model
        and group.first.dataset.split("-")[0] == figure.dataset
        and method_label(group.first.settings, with_size=False) == figure.method
        and None not in (group.statistic("drop"), _share(group))
    ]
    return min(alike, key=lambda group: abs(_share(group) - figure.cost_percent), default=None)


def _share(group: Group) -> float | None:
    """MACs that are left, in percent."""
    small, dense = group.statistic("macs"), group.statistic("dense_macs")
    return None if small is None or dense is None else 100 * small.mean / dense.mean


def published_table(groups: Sequence[Group]) -> str:
    """Every published figure as a row of Markdown, with ours where there are runs."""
    rows = [_row(figure, beside(figure, groups)) for figure in published_figures()]
    return markdown_table(HEADINGS, rows, text_columns=2)


def matched_table(groups: Sequence[Group]) -> ComparisonTable | None:
    """Those published figures that there are runs for; None if there are none."""
    pairs = [(figure, beside(figure, groups)) for figure in published_figures()]
    rows = tuple(tuple(_row(figure, ours)) for figure, ours in pairs if ours is not None)
    caption = "Drops of top-1 accuracy, and how far ours is from that of the paper, in points; above 0 ours loses more."
    return ComparisonTable("Beside published figures", HEADINGS, rows, caption) if rows else None


def _row(figure: Published, ours: Group | None) -> list[str]:
    drop = figure.before - figure.after
    paper = [figure.method, f"{model_label(figure.model)}, {figure.dataset}", f"{figure.before:.2f} to {figure.after:.2f}"]
    paper += [f"{drop:.2f}", f"{figure.cost_percent:.1f} %"]
    if ours is None:
        return [*paper, "not measured", "", "", "", figure.source]
    own = ours.statistic("drop").mean
    after = ours.statistic("last_top1").mean
    found = [f"{after + own:.2f} to {after:.2f} ({ours.first.dataset})", f"{own:.2f}", f"{_share(ours):.1f} %"]
    return [*paper, *found, f"{own - drop:+.2f}", figure.source]
