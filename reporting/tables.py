"""The table of methods as Markdown, CSV, and rows for the page."""

import csv
import io
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import NamedTuple

from reporting.gather import Group, Statistic, by_subject
from reporting.measures import LATENCY_BATCH
from reporting.naming import model_label
from utils.errors import spreadsheet_text


class Column(NamedTuple):
    """A measure as a column: its name in `Record.measures`, its heading, how a figure of it is written, and what it means."""

    measure: str
    title: str
    show: Callable[[Statistic], str]
    meaning: str = ""


class Cell(NamedTuple):
    """What is read, and the number or text that it is sorted by; None where there is no figure."""

    text: str
    value: float | str | None


def accuracy_text(figure: Statistic) -> str:
    """`93.59 ± 0.13`, without a deviation where there is only one run."""
    deviation = "" if figure.deviation is None else f" ± {figure.deviation:.2f}"
    return f"{figure.mean:.2f}{deviation}"


def scaled_text(figure: Statistic) -> str:
    """Three significant digits with a decimal prefix: 126550000 -> `127 M`."""
    for factor, prefix in ((1e9, " G"), (1e6, " M"), (1e3, " k")):
        if figure.mean >= 0.9995 * factor:
            return f"{figure.mean / factor:#.3g}".rstrip(".") + prefix
    return f"{figure.mean:.0f}"


def bytes_text(figure: Statistic) -> str:
    """As `scaled_text`, in bytes: `1.70 MB`."""
    text = scaled_text(figure)
    return f"{text}B" if " " in text else f"{text} B"


def milliseconds_text(figure: Statistic) -> str:
    return f"{figure.mean:.3g} ms"


def pflops_text(figure: Statistic) -> str:
    return f"{figure.mean:.3g}"


COLUMNS = (
    Column("last_top1", "last top-1 %", accuracy_text, "Last: after the last epoch."),
    Column("best_top1", "best top-1 %", accuracy_text, "Best: the best epoch as picked on the test set."),
    Column(
        "drop",
        "drop",
        accuracy_text,
        "Drop: top-1 of the teacher, or of the network that was quantized, minus the last, in points; below 0 is a gain.",
    ),
    Column("parameters", "parameters", scaled_text),
    Column("macs", "MACs", scaled_text, "MACs of one image."),
    Column("dense_bytes", "dense file", bytes_text),
    Column("compact_bytes", "compact file", bytes_text),
    Column("archive_bytes", "archive", bytes_text),
    Column(
        "latency_ms",
        "latency",
        milliseconds_text,
        f"Latency: of one batch of {LATENCY_BATCH} images on the device of the run.",
    ),
    Column("speedup", "speed-up", lambda figure: f"{figure.mean:.2f}x", "Speed-up: over the unpruned network in the same run."),
    Column(
        "training_pflops",
        "PFLOPs",
        pflops_text,
        "PFLOPs: 10^15 floating point operations of all training steps, forward and backward, a teacher's forward pass included.",
    ),
    Column("minutes", "minutes", lambda figure: f"{figure.mean:.1f}", "Minutes: wall time of training."),
)
SUBJECT_TITLES = ("dataset", "network")
ALL_MEASURES = tuple(column.measure for column in COLUMNS)
KEY_MEASURES = ("last_top1", "best_top1", "drop", "parameters", "macs", "compact_bytes", "archive_bytes")


def headings(groups: Sequence[Group]) -> list[str]:
    return [*SUBJECT_TITLES, "method", "n", *(column.title for column in _used(groups))]


def rows(groups: Sequence[Group]) -> list[list[Cell]]:
    """A row for each group under `headings(groups)`; columns of which no group has a figure are left out."""
    columns = _used(groups)
    return [[*_subject_cells(group), *_method_cells(group, columns)] for group in groups]


def caption(groups: Sequence[Group], measures: Collection[str] = ALL_MEASURES) -> str:
    """How to read the columns of these measures."""
    meanings = [column.meaning for column in _used(groups, measures)]
    return " ".join(["Mean ± sample standard deviation over n seeds.", *filter(None, meanings)])


def markdown(groups: Sequence[Group]) -> str:
    """The table in GitHub's Markdown."""
    return _markdown(headings(groups), rows(groups), text_columns=len(SUBJECT_TITLES) + 1)


def markdown_by_subject(groups: Sequence[Group], measures: Collection[str]) -> str:
    """A table of its own for each network on each dataset, with these measures alone."""
    tables = []
    for (dataset, model), members in by_subject(groups).items():
        columns = _used(members, measures)
        titles = ["method", "n", *(column.title for column in columns)]
        table = _markdown(titles, [_method_cells(group, columns) for group in members], text_columns=1)
        tables.append(f"**{markdown_text(f'{model_label(model)} on {dataset}')}**\n\n{table}")
    return "\n".join(tables)


def _markdown(titles: Sequence[str], body: Sequence[Sequence[Cell]], *, text_columns: int) -> str:
    return markdown_table(titles, [[cell.text for cell in row] for row in body], text_columns=text_columns)


def markdown_table(titles: Sequence[str], body: Sequence[Sequence[str]], *, text_columns: int) -> str:
    """Texts as a table, all columns but the first ones to the right."""
    lines = [titles, ["---"] * text_columns + ["---:"] * (len(titles) - text_columns)]
    lines += [[markdown_text(text) for text in row] for row in body]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def markdown_text(text: str) -> str:
    """Text as Markdown shows it, whatever it holds: no HTML, no link, no picture, no code, and no cell of its own."""
    return " ".join(text.split()).translate(MARKDOWN_ESCAPES).replace("](", "]\\(").replace("][", "]\\[")


MARKDOWN_ESCAPES = str.maketrans({**{sign: f"\\{sign}" for sign in "\\`*_|~"}, "&": "&amp;", "<": "&lt;", ">": "&gt;"})


def comma_separated(groups: Sequence[Group]) -> str:
    """Every measure unrounded, mean and deviation in columns of their own, in percent, bytes, milliseconds, minutes."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    figures = [name for measure in ALL_MEASURES for name in (f"{measure}_mean", f"{measure}_std")]
    writer.writerow(["dataset", "model", "method", "differs_in", "n", "seeds", *figures])
    for group in groups:
        seeds = " ".join(str(record.seed) for record in group.records)
        texts = map(spreadsheet_text, (*group.subject, group.label, ", ".join(group.differs_in)))
        writer.writerow(
            [
                *texts,
                len(group.records),
                seeds,
                *(value for measure in ALL_MEASURES for value in _mean_and_deviation(group, measure)),
            ]
        )
    return buffer.getvalue()


def notes(groups: Iterable[Group]) -> list[str]:
    """What the runs of one method do not have in common, by circumstance, and scores of a part of a test set."""
    groups, mixed = list(groups), {}
    for group in groups:
        for circumstance in group.mixed:
            mixed.setdefault(circumstance, []).append(group)
    lines = [f"{_whose(found)} differ in {name}: {_values(found, name)}" for name, found in mixed.items()]
    return lines + [f"{_whose(found)}: top1 of {tested_on}" for tested_on, found in _limited(groups).items()]


def _limited(groups: Iterable[Group]) -> dict[str, list[Group]]:
    found: dict[str, list[Group]] = {}
    for group in groups:
        for tested_on in sorted({record.tested_on for record in group.records} - {""}):
            found.setdefault(tested_on, []).append(group)
    return found


def _whose(groups: Sequence[Group]) -> str:
    group = groups[0]
    return f"runs of {', '.join(group.subject)}, {group.name}" if len(groups) == 1 else f"runs of {len(groups)} methods"


def _values(groups: Sequence[Group], circumstance: str) -> str:
    return "; ".join(sorted({value for group in groups for value in group.mixed[circumstance]}))


def _used(groups: Sequence[Group], measures: Collection[str] = ALL_MEASURES) -> list[Column]:
    chosen = [column for column in COLUMNS if column.measure in measures]
    return [column for column in chosen if any(group.statistic(column.measure) for group in groups)]


def _subject_cells(group: Group) -> list[Cell]:
    dataset, model = group.subject
    return [Cell(dataset, dataset), Cell(model_label(model), model)]


def _method_cells(group: Group, columns: Sequence[Column]) -> list[Cell]:
    count = len(group.records)
    return [Cell(group.name, group.name), Cell(str(count), count), *(_cell(group, column) for column in columns)]


def _cell(group: Group, column: Column) -> Cell:
    figure = group.statistic(column.measure)
    return Cell("", None) if figure is None else Cell(column.show(figure), figure.mean)


def _mean_and_deviation(group: Group, measure: str) -> tuple[float | str, float | str]:
    figure = group.statistic(measure)
    if figure is None:
        return "", ""
    return figure.mean, "" if figure.deviation is None else figure.deviation
