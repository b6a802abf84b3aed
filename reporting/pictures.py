"""The pictures of a report.

Each function takes the groups of a report and gives a figure, or None where there is nothing to draw.
"""

import math
import textwrap
from collections.abc import Callable, Sequence
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from reporting.cost_pictures import accuracy_over_bytes, accuracy_over_macs, accuracy_over_pflops, accuracy_over_time
from reporting.gather import Group, Statistic, statistic
from reporting.naming import dashed, model_label, value_text
from reporting.page import Picture
from reporting.panels import (
    COLOURS,
    LAYER_LENGTH,
    LEGEND_LENGTH,
    LOOK,
    MANY,
    PANEL_HEIGHT,
    PANEL_WIDTH,
    by_panel,
    draw_panels,
    legend_name,
    lowest_shown,
    png,
    styles,
)
from reporting.tables import bytes_text
from utils.errors import printable

LONG_TRAINING = 20  # epochs; of a longer one the steep beginning is cut off
MANY_NAMES = 8  # of methods that share a line
SENSITIVITY_FLAGS = ("betas", "gamma", "hap_ts", "samp_batches", "prune_rates")


def draw_pictures(groups: Sequence[Group], *, names: Sequence[str]) -> list[Picture]:
    """Of the pictures called `names`, each that the runs have something for."""
    drawn = []
    for name, title, caption, draw in (picture for picture in PICTURES if picture[0] in names):
        with matplotlib.rc_context(LOOK):
            figure = draw(groups)
            if figure is not None:
                drawn.append(Picture(name, title, caption, png(figure)))
    return drawn


def learning_curves(groups: Sequence[Group]) -> Figure | None:
    """Mean test accuracy by epoch with a band of one standard deviation; a panel a subject and script."""
    curved = [group for group in groups if len(_common_epochs(group)) > 1]
    panels = by_panel(curved, key=lambda group: (*group.subject, group.first.script))
    return draw_panels(panels, _draw_curves) if panels else None


def kept_filters(groups: Sequence[Group]) -> Figure | None:
    """How many filters of each layer are left; methods that keep the same are one line."""
    panels = by_panel([group for group in groups if group.first.kept], key=lambda group: group.subject)
    return draw_panels(panels, _draw_kept, width=1.6 * PANEL_WIDTH) if panels else None


def bytes_by_stage(groups: Sequence[Group]) -> Figure | None:
    """Dense, compact and archived size of every network, and what an archive is made of."""
    sized = [group for group in groups if group.statistic("compact_bytes") or group.statistic("archive_bytes")]
    archived = [group for group in sized if group.statistic("archive_bytes")]
    shown = (archived or sized)[:MANY]
    if not shown:
        return None
    figure = Figure(figsize=(2 * PANEL_WIDTH + 2, 1.2 + 0.62 * len(shown)), layout="constrained")
    stages, parts = figure.subplots(1, 2, sharey=True) if archived else (figure.subplots(), None)
    titles = (f"{model_label(group.subject[1])}, {group.subject[0]}: {group.name}" for group in shown)
    names = [textwrap.fill(printable(title, LEGEND_LENGTH), 40) for title in titles]
    _draw_stages(stages, shown, names)
    if parts is not None:
        _draw_archive_parts(parts, shown)
    return figure


def sensitivity(groups: Sequence[Group]) -> Figure | None:
    """Last accuracy over one setting where groups differ in that setting alone; a panel a setting."""
    pruned = [group for group in groups if "prune_mode" in group.first.settings]
    panels = {flag: families for flag in SENSITIVITY_FLAGS if (families := _families(pruned, flag))}
    if not panels:
        return None
    columns, rows = min(2, len(panels)), -(-len(panels) // 2)
    figure = Figure(figsize=(PANEL_WIDTH * columns, (PANEL_HEIGHT + 0.6) * rows), layout="constrained")
    for index, (flag, families) in enumerate(panels.items()):
        _draw_sensitivity(figure.add_subplot(rows, columns, index + 1), flag, families)
    return figure


PICTURES: tuple[tuple[str, str, str, Callable[[Sequence[Group]], Figure | None]], ...] = (
    (
        "accuracy_macs",
        "Accuracy against MACs",
        "Mean top-1 accuracy after the last epoch, with its 95 % interval over seeds. Up and to the left is better; a line joins "
        "one method at several budgets, rings mark the Pareto front, and a hollow point lies below the axis. Where all cost the "
        "same: a row for each method, the best on top, and the unpruned network as a dashed line.",
        accuracy_over_macs,
    ),
    (
        "accuracy_time",
        "Accuracy against time",
        "The same over the time of a batch of 64 images, on the device of the runs.",
        accuracy_over_time,
    ),
    (
        "accuracy_bytes",
        "Accuracy against bytes",
        "The same over the size of the smallest file that holds the network: the archive, else the compact checkpoint, else "
        "the dense one.",
        accuracy_over_bytes,
    ),
    (
        "accuracy_pflops",
        "Accuracy against PFLOPs",
        "The same over what the training took, without that of the teacher it began from.",
        accuracy_over_pflops,
    ),
    (
        "learning_curves",
        "Learning curves",
        "Mean top-1 accuracy on the test set after each epoch; the band is one standard deviation over seeds.",
        learning_curves,
    ),
    (
        "kept_filters",
        "Filters that stay",
        "Filters of each convolution, in order of depth: all of them in grey, and those that each method keeps.",
        kept_filters,
    ),
    (
        "bytes",
        "Where the bytes go",
        "Size on disk stage by stage, and what the archive consists of.",
        bytes_by_stage,
    ),
    (
        "sensitivity",
        "Sensitivity",
        "Mean top-1 accuracy after the last epoch over one setting, all others the same; one standard deviation up and down.",
        sensitivity,
    ),
)


# ---- learning curves ---------------------------------------------------------------------------------------------------


def _common_epochs(group: Group) -> list[int]:
    return sorted(set.intersection(*(set(record.curve) for record in group.records)))


def _draw_curves(axes: Axes, groups: list[Group]) -> None:
    lows = []
    lowest = lowest_shown([group.statistic("last_top1").mean for group in groups])
    for group, style in zip(groups, styles(groups), strict=True):
        epochs = _common_epochs(group)
        figures = [statistic([record.curve[epoch] for record in group.records]) for epoch in epochs]
        means = [figure.mean for figure in figures]
        is_shown = group.statistic("last_top1").mean >= lowest
        label = legend_name(group.name if is_shown else f"{group.name}: below, ends at {means[-1]:.1f} %")
        shown = [epoch + 1 for epoch in epochs]
        axes.plot(shown, means, color=style.color, linestyle=style.linestyle, marker=style.marker, markersize=4,
                  markevery=max(1, len(shown) // 8), label=label)  # fmt: skip
        if figures[0].deviation is not None:
            spread = [figure.deviation for figure in figures]
            axes.fill_between(shown, *_band(means, spread), color=style.color, alpha=0.18, linewidth=0)
        if is_shown:
            lows.append(sorted(means)[len(means) // 4 if len(means) > LONG_TRAINING else 0])
    top = axes.get_ylim()[1]
    axes.set_ylim(max(0, min(lows) - 0.1 * (top - min(lows))), min(top, 100.5))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set(xlabel="epoch", ylabel="test top-1, %")


def _band(means: Sequence[float], spread: Sequence[float]) -> tuple[list[float], list[float]]:
    pairs = list(zip(means, spread, strict=True))
    return [mean - deviation for mean, deviation in pairs], [mean + deviation for mean, deviation in pairs]


# ---- kept filters ------------------------------------------------------------------------------------------------------


def _draw_kept(axes: Axes, groups: list[Group]) -> None:
    longest_first = sorted(groups, key=lambda group: -len(group.first.kept))
    layers = list(dict.fromkeys(name for group in longest_first for name in group.first.kept))
    filters = {name: count for group in groups for name, count in group.first.filters.items()}
    axes.bar(range(len(layers)), [filters.get(name, 0) for name in layers], width=1, color="#dddddd", label="all filters")
    alike: dict[tuple[float, ...], list[str]] = {}
    for group in groups:
        alike.setdefault(tuple(_mean_kept(group, name) for name in layers), []).append(group.name)
    for (counts, names), style in zip(alike.items(), styles(list(alike)), strict=True):
        axes.plot(range(len(layers)), counts, **style._asdict(), markersize=4,
                  drawstyle="steps-mid", label=legend_name(_listed(names)))  # fmt: skip
    shown = [printable(name, LAYER_LENGTH) for name in layers]
    axes.set_xticks(range(len(layers)), shown, rotation=90, fontsize=max(4, 8 - len(layers) // 15))
    axes.grid(axis="x", visible=False)
    axes.set(ylabel="filters")


def _mean_kept(group: Group, layer: str) -> float:
    """Over the group's runs; no number, which is a gap in the line, for a layer that is not pruned in all of them."""
    counts = [record.kept.get(layer) for record in group.records]
    return math.nan if None in counts else statistic(counts).mean


def _listed(names: Sequence[str]) -> str:
    more = f"; and {len(names) - MANY_NAMES} more" if len(names) > MANY_NAMES else ""
    return "; ".join(names[:MANY_NAMES]) + more


# ---- bytes -------------------------------------------------------------------------------------------------------------

STAGES = (("dense checkpoint", "dense_bytes"), ("compact checkpoint", "compact_bytes"), ("archive", "archive_bytes"))
PARTS = (
    ("coded weights", "archive_payload_bytes"),
    ("codebooks", "archive_codebook_bytes"),
    ("BN, biases", "archive_uncoded_bytes"),
    ("container", "archive_overhead_bytes"),
)


def _draw_stages(axes: Axes, groups: Sequence[Group], names: Sequence[str]) -> None:
    height = 0.8 / len(STAGES)
    for index, ((label, measure), color) in enumerate(zip(STAGES, COLOURS, strict=False)):
        present = [(row, group.statistic(measure)) for row, group in enumerate(groups) if group.statistic(measure)]
        bars = axes.barh(
            [row + (index - 1) * height for row, _ in present],
            [figure.mean for _, figure in present],
            height=height,
            color=color,
            label=label,
        )
        axes.bar_label(bars, [bytes_text(figure) for _, figure in present], padding=2, fontsize=7)
    axes.set_yticks(range(len(groups)), names)
    axes.invert_yaxis()
    axes.margins(x=0.18)
    _finish_bytes(axes, "bytes on disk")


def _draw_archive_parts(axes: Axes, groups: Sequence[Group]) -> None:
    begins = [0.0] * len(groups)
    for (label, measure), color in zip(PARTS, COLOURS[3:], strict=False):
        figures = [group.statistic(measure) for group in groups]
        sizes = [figure.mean if figure else 0.0 for figure in figures]
        axes.barh(range(len(groups)), sizes, left=begins, height=0.5, color=color, edgecolor="white", label=label)
        begins = [begin + size for begin, size in zip(begins, sizes, strict=True)]
    axes.margins(x=0.05)
    _finish_bytes(axes, "bytes of the archive")


def _finish_bytes(axes: Axes, label: str) -> None:
    axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.xaxis.set_major_formatter(lambda value, _: bytes_text(Statistic(value, None, 1)))
    axes.grid(axis="y", visible=False)
    axes.set_xlabel(label)
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=4, columnspacing=1.0, handlelength=1.2)


# ---- sensitivity -------------------------------------------------------------------------------------------------------


def _families(groups: Sequence[Group], flag: str) -> list[list[Group]]:
    """Groups that have all settings in common but `flag`, in the order of its values."""
    families: dict[str, list[Group]] = {}
    for group in groups:
        others = {name: value for name, value in group.first.settings.items() if name != flag}
        families.setdefault(repr(sorted(others.items(), key=lambda item: item[0])), []).append(group)
    return [
        sorted(family, key=lambda group: _rank(group.first.settings.get(flag))) for family in families.values() if len(family) > 1
    ]


def _rank(value: Any) -> tuple[bool, list[float]]:
    """None, which stands for a default such as all batches, comes last."""
    return value is None, list(value) if isinstance(value, list) else [value or 0]


def _draw_sensitivity(axes: Axes, flag: str, families: Sequence[Sequence[Group]]) -> None:
    values = sorted((group.first.settings.get(flag) for family in families for group in family), key=_rank)
    ticks = list(dict.fromkeys(map(value_text, values)))
    for family, style in zip(families, styles(families), strict=True):
        figures = [group.statistic("last_top1") for group in family]
        deviations = [figure.deviation or 0 for figure in figures]
        axes.errorbar(
            [ticks.index(value_text(group.first.settings.get(flag))) for group in family],
            [figure.mean for figure in figures],
            yerr=deviations if any(deviations) else None,
            **style._asdict(),
            capsize=2,
            label=legend_name(_family_name(family)),
        )
    axes.set_xticks(range(len(ticks)), ticks)
    axes.set(xlabel=dashed(flag), ylabel="top-1 accuracy, %")
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.18))


def _family_name(family: Sequence[Group]) -> str:
    dataset, model = family[0].subject
    labels = [group.label for group in family]
    label = labels[0] if len(set(labels)) == 1 else labels[0].partition(",")[0]  # without the ratio retained
    return f"{model_label(model)}, {dataset}: {label}"
