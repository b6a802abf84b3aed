"""The page on what pruned networks are worth before any training: tables, a picture and what they say, from measured lines.

`benchmarks.reconstruction` measures the lines; every figure of the page is from them.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from prune.criteria import CRITERIA
from reporting.comparison import interval_of_seeds
from reporting.naming import model_label
from reporting.panels import LOOK, PANEL_HEIGHT, PANEL_WIDTH, png, styles
from reporting.tables import markdown_table
from utils.errors import UserError
from utils.files import write_atomic

Row = Mapping[str, Any]
FORMS = ("plain", "recalibrated", "reconstructed", "both")
PICTURE = "pruning_without_training.png"
DRAWN = "filter-a"  # of the picture, for it is the criterion that needs nothing but the weights


def read_rows(paths: Iterable[Path]) -> list[Row]:
    """The lines of the files. Raises UserError for a file that cannot be read or holds others."""
    rows = []
    for path in paths:
        try:
            lines = path.read_text().splitlines()
            rows += [json.loads(line) for line in lines if line.strip()]
        except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
            raise UserError(f"--report {path}: holds no results of benchmarks.reconstruction ({error})") from error
        if any(not isinstance(row, dict) or not {"data", "criterion", "size", "layout"} <= row.keys() for row in rows):
            raise UserError(f"--report {path}: holds lines that are no results of benchmarks.reconstruction")
    return rows


def write_page(page: Path, rows: Sequence[Row]) -> None:
    """Writes the page and, in `figures` beside it, its picture. Raises UserError where there is no result."""
    rows = [row for row in rows if "top1" in row]
    if not rows:
        raise UserError("--report: not one result is in there")
    (page.parent / "figures").mkdir(parents=True, exist_ok=True)
    write_atomic(page.parent / "figures" / PICTURE, draw(rows))
    write_atomic(page, page_text(rows).encode())


def page_text(rows: Sequence[Row]) -> str:
    parts = [
        "# Pruning without training",
        "Top-1 accuracy in percent of pruned networks before any step of training: as they come, with batch norm's statistics "
        "estimated anew (`--recalibrate-bn`), reconstructed (`--reconstruct`), and both, in this order. Estimates and "
        "reconstruction look at training images alone; labels count only for criteria that take gradients. Means over "
        f"{_counted(rows)}, with 95 % intervals of Student's t where there are several.",
        f"![Accuracy before any training](figures/{PICTURE})",
    ]
    for subject, own in _split(rows, "data", "model").items():
        teachers = {row["weights"]: row["teacher_top1"] for row in own}
        parts.append(f"## {model_label(subject[1])}, {subject[0]}")
        parts.append(f"Unpruned: {_figure([*teachers.values()])}. {_test_images(own)}")
        for layout, rows_of_layout in _split(own, "layout").items():
            for size, rows_of_size in _split(rows_of_layout, "size").items():
                parts.append(f"### {_size_text(size[0])}, {layout[0]}")
                parts.append(_table(rows_of_size).strip())
    parts.append(
        "The lines that the tables are made of are written by `python -m benchmarks.reconstruction`, the page by its `--report`."
    )
    return "\n\n".join(parts) + "\n"


def _split(rows: Sequence[Row], *names: str) -> dict[tuple[str, ...], list[Row]]:
    """The rows by the values of these fields, in the order in which they come."""
    found: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        found.setdefault(tuple(row[name] for name in names), []).append(row)
    return found


def _counted(rows: Sequence[Row]) -> str:
    counts = sorted({len({row["weights"] for row in own}) for own in _split(rows, "data", "model").values()})
    span = f"{counts[0]}" if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
    return f"{span} teacher{'s' if counts[-1] > 1 else ''} of each kind"


def _test_images(rows: Sequence[Row]) -> str:
    tests, images = ({row[name] for row in rows} for name in ("test_images", "images"))
    return f"{_listed(tests)} test images, {_listed(images)} training images for the reconstruction."


def _listed(values: Iterable[int]) -> str:
    return " or ".join(f"{value:,}" for value in sorted(values))


def _size_text(size: str) -> str:
    return f"`--budget {size}`" if "=" in size else f"{size} of the filters kept"


def _table(rows: Sequence[Row]) -> str:
    body = []
    for (criterion, allocation), own in _split(rows, "criterion", "allocation").items():
        name = (CRITERIA[criterion].title if criterion in CRITERIA else criterion) + (
            "" if allocation == "uniform" else f", {allocation}"
        )
        cells = [_figure([row["top1"][form] for row in own if form in row["top1"]]) for form in FORMS]
        body.append([name, *cells, f"{100 * np.mean([row['macs'] for row in own]):.1f} %"])
    return markdown_table(["criterion", *FORMS, "MACs left"], body, text_columns=1)


def table_of(rows: Sequence[Row], *, size: str, layout: str) -> str:
    """The table of one size, such as `macs=0.5`, and layout, `coupled` or `by layer`. Raises UserError where none is measured."""
    own = [row for row in rows if (row["size"], row["layout"]) == (size, layout) and "top1" in row]
    if not own:
        raise UserError(f"without training: {size}, {layout} is not measured")
    return f"{_table(own)}\n"


def _figure(values: Sequence[float]) -> str:
    if not values:
        return "-"
    interval = interval_of_seeds(values)
    return f"{np.mean(values):.1f}" + (f" [{interval[0]:.1f}, {interval[1]:.1f}]" if interval else "")


def draw(rows: Sequence[Row]) -> bytes:
    """A PNG: accuracy over what is left of the multiply-accumulates, a panel for each network, a line for each form."""
    drawn = [row for row in rows if row["criterion"] == DRAWN] or list(rows)
    panels = _split(drawn, "data", "model")
    with matplotlib.rc_context(LOOK):
        figure = Figure(figsize=(PANEL_WIDTH * len(panels), PANEL_HEIGHT), layout="constrained")
        for axes, (subject, own) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True):
            _draw_panel(axes, own)
            axes.set_title(f"{model_label(subject[1])}, {subject[0]}, no training", loc="left")
        return png(figure)


def _draw_panel(axes: Axes, rows: Sequence[Row]) -> None:
    budgets = [row for row in rows if "=" in row["size"]]
    layout = (budgets or rows)[0]["layout"]
    points = _split([row for row in (budgets or rows) if row["layout"] == layout and row["allocation"] == "uniform"], "size")
    for form, style in zip(FORMS[:3], styles(FORMS[:3]), strict=True):
        line = [(np.mean([row["macs"] for row in own]), [row["top1"][form] for row in own]) for own in points.values()]
        line = sorted((100 * macs, float(np.mean(values)), min(values), max(values)) for macs, values in line)
        macs, means, lowest, highest = zip(*line, strict=True)
        axes.plot(macs, means, label=form, **style._asdict())
        axes.fill_between(macs, lowest, highest, color=style.color, alpha=0.2, linewidth=0)
    teacher = np.mean([*{row["weights"]: row["teacher_top1"] for row in rows}.values()])
    axes.axhline(teacher, color="black", linewidth=0.8, label=f"unpruned, {teacher:.1f}")
    axes.set_xlabel(f"multiply-accumulates left, % ({layout})")
    axes.set_ylabel("top-1, %")
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=4)
