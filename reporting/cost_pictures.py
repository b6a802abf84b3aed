"""Accuracy against what a network costs: curves over budgets with the Pareto front, or dots by method where all cost the same."""

import textwrap
from collections.abc import Callable, Sequence
from typing import NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator

from reporting.comparison import interval_of_seeds
from reporting.gather import UNPRUNED_SCRIPT, Group, Statistic, by_subject
from reporting.naming import method_label
from reporting.panels import COLOURS, LEGEND_LENGTH, MANY, draw_panels, legend_name, lowest_shown, panel_title, styles
from reporting.tables import bytes_text, milliseconds_text, pflops_text, scaled_text
from utils.errors import printable

SAME_COST = 0.05  # of the largest cost: those that differ by no more are drawn as one
MANY_DOTS = 40  # methods that one panel shows as dots
DOT_HEIGHT = 0.2  # inches a method
SIZES = ("budget", "prune_rates")  # settings that move a method along its curve


class Point(NamedTuple):
    """A method at one budget: mean accuracy, half of its 95 % interval over seeds where there are several, and its cost."""

    group: Group
    accuracy: float
    reach: float | None
    cost: float


def accuracy_over_macs(groups: Sequence[Group]) -> Figure | None:
    return _accuracy_over(groups, "MACs of one image", lambda group: group.statistic("macs"), scaled_text)


def accuracy_over_time(groups: Sequence[Group]) -> Figure | None:
    return _accuracy_over(groups, "time of a batch", lambda group: group.statistic("latency_ms"), milliseconds_text)


def accuracy_over_bytes(groups: Sequence[Group]) -> Figure | None:
    return _accuracy_over(groups, "bytes of the smallest file", shipped_bytes, bytes_text, log=True)


def accuracy_over_pflops(groups: Sequence[Group]) -> Figure | None:
    return _accuracy_over(
        groups, "PFLOPs of the training", lambda group: group.statistic("training_pflops"), pflops_text, log=True
    )


def shipped_bytes(group: Group) -> Statistic | None:
    """Bytes of the smallest file that holds the network."""
    figures = map(group.statistic, ("archive_bytes", "compact_bytes", "dense_bytes"))
    return next((figure for figure in figures if figure is not None), None)


def _accuracy_over(
    groups: Sequence[Group],
    label: str,
    cost: Callable[[Group], Statistic | None],
    show: Callable[[Statistic], str],
    *,
    log: bool = False,
) -> Figure | None:
    def text(value: float, _: object = None) -> str:
        return show(Statistic(value, None, 1))

    def draw(axes: Axes, points: list[Point]) -> float | None:
        if _costs_the_same(points):
            return _draw_dots(axes, points, cost=f"{label}: {_range(points, text)}")
        axes.set_xscale("log" if log else "linear")
        _draw_curves(axes, points)
        if log:
            axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter(text)
        axes.set(xlabel=label, ylabel="top-1 accuracy, %")
        return None

    panels = {}
    for subject, members in by_subject([group for group in groups if cost(group)]).items():
        points = [_point(group, cost(group).mean) for group in members]
        if all(map(_is_unpruned, points)):
            continue
        shown = _fewer(points, MANY_DOTS if _costs_the_same(points) else MANY)
        panels[panel_title(subject, shown=_methods(shown), all_there_are=_methods(points))] = shown
    return draw_panels(panels, draw) if panels else None


def _point(group: Group, cost: float) -> Point:
    interval = interval_of_seeds(group.accuracies)
    return Point(group, group.statistic("last_top1").mean, None if interval is None else (interval[1] - interval[0]) / 2, cost)


def _is_unpruned(point: Point) -> bool:
    """Whether the network is whole, trained as such or distilled without pruning."""
    small, dense = point.group.statistic("macs"), point.group.statistic("dense_macs")
    is_whole = small is not None and dense is not None and small.mean == dense.mean
    return is_whole or point.group.first.script == UNPRUNED_SCRIPT


def _pruned_costs(points: Sequence[Point]) -> list[float]:
    return [point.cost for point in points if not _is_unpruned(point)]


def _costs_the_same(points: Sequence[Point]) -> bool:
    """Whether an axis of costs would show the pruned networks one above the other."""
    costs = _pruned_costs(points)
    return len(costs) >= 3 and max(costs) - min(costs) <= SAME_COST * max(costs)


def _range(points: Sequence[Point], text: Callable[[float], str]) -> str:
    costs = _pruned_costs(points)
    ends = dict.fromkeys([text(min(costs)), text(max(costs))])
    return " to ".join(ends)


def _curves(points: Sequence[Point]) -> list[list[Point]]:
    """Points of one method at several budgets together, in the order of their cost."""
    curves: dict[str, list[Point]] = {}
    for point in points:
        settings = {name: value for name, value in point.group.first.settings.items() if name not in SIZES}
        curves.setdefault(repr(sorted(settings.items(), key=lambda item: item[0])), []).append(point)
    return [sorted(curve, key=lambda point: point.cost) for curve in curves.values()]


def _methods(points: Sequence[Point]) -> int:
    return len(_curves(points))


def _fewer(points: Sequence[Point], count: int) -> list[Point]:
    """The methods of the best accuracy, unpruned ones first, where there are more than a panel can show."""

    def rank(curve: Sequence[Point]) -> tuple[bool, float]:
        return not _is_unpruned(curve[0]), -max(point.accuracy for point in curve)

    best = sorted(_curves(points), key=rank)[:count]
    chosen = [point for curve in best for point in curve]
    return [point for point in points if point in chosen]


# ---- curves over budgets ---------------------------------------------------------------------------------------------------


def _draw_curves(axes: Axes, points: Sequence[Point]) -> None:
    lowest = lowest_shown([point.accuracy for point in points])
    curves = _curves(points)
    names = _names_of(curves)
    shown = [point for point in points if point.accuracy >= lowest]
    _fit_limits(axes, points, lowest)
    for curve, name, style in zip(curves, names, styles(curves), strict=True):
        above = [point for point in curve if point.accuracy >= lowest]
        look = {"color": style.color, "marker": style.marker, "markersize": 6}
        if above:
            reaches = [point.reach or 0 for point in above]
            axes.errorbar(
                [point.cost for point in above],
                [point.accuracy for point in above],
                yerr=reaches if any(reaches) else None,
                linestyle=style.linestyle,
                linewidth=1,
                capsize=2,
                label=legend_name(name),
                **look,
            )
        for point in (point for point in curve if point.accuracy < lowest):
            axes.plot(
                [point.cost], [axes.get_ylim()[0]], markerfacecolor="white", clip_on=False, linestyle="none",
                label=legend_name(f"{point.group.name}: below, {point.accuracy:.1f} %"), **look,
            )  # fmt: skip
    front = pareto_front(shown)
    if len(front) > 1:
        costs, accuracies = [point.cost for point in front], [point.accuracy for point in front]
        axes.plot(costs, accuracies, color="#888888", linestyle=":", linewidth=1, drawstyle="steps-post", zorder=1)
        axes.plot(costs, accuracies, linestyle="none", marker="o", markersize=11, markerfacecolor="none",
                  markeredgecolor="#888888", label="on the Pareto front")  # fmt: skip


def pareto_front(points: Sequence[Point]) -> list[Point]:
    """Those that no other point equals in one respect and beats in the other, from the cheapest on."""
    front: list[Point] = []
    for point in sorted(points, key=lambda point: (point.cost, -point.accuracy)):
        if not front or point.accuracy > front[-1].accuracy:
            front.append(point)
    return front


def _names_of(curves: Sequence[Sequence[Point]]) -> list[str]:
    """A name for each curve: that of its method without the sizes, where no other has it."""
    short = [method_label(curve[0].group.first.settings, with_size=False) for curve in curves]
    alone = [len(curve) == 1 or short.count(name) > 1 for curve, name in zip(curves, short, strict=True)]
    return [curve[0].group.name if own else name for curve, name, own in zip(curves, short, alone, strict=True)]


def _fit_limits(axes: Axes, points: Sequence[Point], lowest: float) -> None:
    for point in points:
        reach = (point.reach or 0) if point.accuracy >= lowest else 0
        height = max(point.accuracy, lowest)
        axes.update_datalim([(point.cost, height - reach), (point.cost, height + reach)])
    axes.margins(x=0.12)
    axes.autoscale_view()
    low, high = axes.get_ylim()
    axes.set_ylim(max(low, 0), min(high, 100.5))  # an interval of few seeds reaches further than an accuracy can
    axes.set_autoscale_on(False)


# ---- dots by method --------------------------------------------------------------------------------------------------------


def _draw_dots(axes: Axes, points: Sequence[Point], *, cost: str) -> float:
    """The best on top; gives the height that the rows need, in inches."""
    lowest = lowest_shown([point.accuracy for point in points])
    rows = sorted((point for point in points if not _is_unpruned(point)), key=lambda point: point.accuracy)
    left = min(point.accuracy - (point.reach or 0) for point in points if point.accuracy >= lowest)
    names = []
    for row, point in enumerate(rows):
        is_shown = point.accuracy >= lowest
        axes.errorbar(
            [point.accuracy if is_shown else left],
            [row],
            xerr=[point.reach] if is_shown and point.reach is not None else None,
            fmt="o",
            color=COLOURS[0],
            markerfacecolor=COLOURS[0] if is_shown else "white",
            markersize=5,
            capsize=2,
        )
        name = point.group.name if is_shown else f"{point.group.name}: below, {point.accuracy:.1f} %"
        names.append(textwrap.fill(printable(name, LEGEND_LENGTH), 56, break_on_hyphens=False))
    for point, style in zip(filter(_is_unpruned, points), styles(points)[1:], strict=False):
        axes.axvline(point.accuracy, color=style.color, linestyle="--", linewidth=1, label=legend_name(point.group.name))
    axes.set_yticks(range(len(rows)), names, fontsize=8)
    axes.set_ylim(-0.7, len(rows) - 0.3)
    axes.xaxis.set_major_locator(MaxNLocator(6))
    axes.set(xlabel=f"top-1 accuracy, % ({cost})")
    return DOT_HEIGHT * sum(1 + name.count("\n") for name in names) + 1
