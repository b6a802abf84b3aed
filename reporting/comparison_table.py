"""Tables that compare methods with one of them, as text asks for them: `BASELINE | METHOD | METHOD`, `*` for any characters.

In a Markdown file such a text stands in a comment, `<!-- comparison: BASELINE | METHOD -->`, and the table goes between it and
`<!-- comparison:end -->`.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from reporting.comparison import LEVEL, Comparison, Scores, compare, interval_of_seeds
from reporting.gather import Group, Statistic, by_subject
from reporting.naming import model_label
from reporting.tables import bytes_text, markdown_table, markdown_text, pflops_text, scaled_text
from utils.errors import UserError, shown

BETTER, WORSE, SAME = "better", "worse", "not significant"
SEPARATOR = "|"
HEADINGS = ("method", "n", "last top-1 %", "difference", "p", "verdict", "MACs", "PFLOPs", "compact file")


class ComparisonTable(NamedTuple):
    """A title, texts by row under HEADINGS without the columns that no row fills, and what to know of them."""

    title: str
    headings: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    caption: str

    def markdown(self) -> str:
        return f"{markdown_table(self.headings, self.rows, text_columns=1)}\n{markdown_text(self.caption)}\n"


def comparison_tables(groups: Sequence[Group], text: str) -> list[ComparisonTable]:
    """A table for each network on each dataset that has the baseline. Raises UserError if none has, or nothing beside it."""
    baseline, *patterns = (part.strip() for part in text.split(SEPARATOR))
    tables = [
        table
        for subject, members in by_subject(groups).items()
        if any(group.name == baseline for group in members)
        if (table := _table(subject, _chosen(members, baseline, patterns), baseline)) is not None
    ]
    if not tables:
        names = "; ".join(dict.fromkeys(group.name for group in groups))
        raise UserError(f"--compare {shown(text)}: no such method with two seeds and another beside it; there are {names}")
    return tables


def _chosen(groups: Sequence[Group], baseline: str, patterns: Sequence[str]) -> list[Group]:
    parts = [".*".join(map(re.escape, pattern.split("*"))) for pattern in patterns]
    return [group for group in groups if group.name == baseline or any(re.fullmatch(part, group.name) for part in parts)]


def _scores(group: Group) -> Scores:
    return Scores(
        {record.seed: record.measures["last_top1"] for record in group.records},
        {record.seed: record.hits for record in group.records if record.hits is not None},
    )


def _table(subject: tuple[str, str], groups: Sequence[Group], baseline: str) -> ComparisonTable | None:
    found = compare({group.name: _scores(group) for group in groups}, baseline)
    if found is None:
        return None
    left_out = [group.name for group in groups if group.name not in {baseline, *found.differences}]
    compared = [_over(group, found.seeds) for group in groups if group.name not in left_out]
    rows = [_row(group, found) for group in sorted(compared, key=lambda group: -group.statistic("last_top1").mean)]
    filled = [column for column in range(len(HEADINGS)) if any(row[column] for row in rows)]
    dataset, model = subject
    return ComparisonTable(
        f"{model_label(model)} on {dataset}, beside {baseline}",
        tuple(HEADINGS[column] for column in filled),
        tuple(tuple(row[column] for column in filled) for row in rows),
        _caption(found, compared, left_out),
    )


def _over(group: Group, seeds: Sequence[int]) -> Group:
    """The group with the runs of these seeds alone."""
    return replace(group, records=tuple(record for record in group.records if record.seed in seeds))


def _row(group: Group, found: Comparison) -> tuple[str, ...]:
    difference = found.differences.get(group.name)
    interval, count = interval_of_seeds(group.accuracies), str(len(group.records))
    accuracy = f"{np.mean(group.accuracies):.2f}" + (f" [{interval[0]:.2f}, {interval[1]:.2f}]" if interval else "")
    figures = [_text(group.statistic(name), show) for name, show in (("macs", scaled_text), ("training_pflops", pflops_text))]
    size = _text(group.statistic("compact_bytes"), bytes_text)
    if difference is None:
        return group.name, count, accuracy, "", "", "baseline", *figures, size
    verdict = SAME if not difference.is_told_apart else BETTER if difference.mean > 0 else WORSE
    between = f"{difference.mean:+.2f} [{difference.low:+.2f}, {difference.high:+.2f}]"
    return group.name, count, accuracy, between, f"{difference.p:.2g}", verdict, *figures, size


def _text(figure: Statistic | None, show: Callable[[Statistic], str]) -> str:
    return "" if figure is None else show(figure)


def _caption(found: Comparison, compared: Sequence[Group], left_out: Sequence[str]) -> str:
    count = len(found.differences)
    reaches = [(each.high - each.low) / 2 for name, each in found.differences.items() if name not in found.unlike]
    known = [reach for reach in reaches if np.isfinite(reach)]
    here = f", as here for differences below about {max(known):.1f} points" if known else ""
    picked = max(group.statistic("best_top1").mean - group.statistic("last_top1").mean for group in compared)
    images = "the seed alone" if len(found.without_images) == count else "the seed and the draw of test images"
    seeds = ", ".join(map(str, found.seeds))
    sentences = [
        f"Top-1 after the last epoch with its {LEVEL:.0%} interval over the seeds {seeds}. Differences are from "
        f"{found.baseline}, in points, paired by seed; their errors are those of {images}.",
        f"Intervals and p hold for all {count} of the table together ({LEVEL:.0%}, Bonferroni). Not significant: the interval "
        f"contains 0{here}.",
        f"The best epoch as picked on the test set would add up to {picked:.2f} points.",
    ]
    if 0 < len(found.without_images) < count:
        sentences.append(f"Of the seed alone, for which images were hit was not kept: {'; '.join(found.without_images)}.")
    if found.unlike:
        sentences.append(f"By itself, for its seeds differ far more: {'; '.join(found.unlike)}.")
    if left_out:
        sentences.append(f"Not compared, for want of a seed: {'; '.join(left_out)}.")
    return " ".join(sentences)
