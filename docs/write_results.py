"""Writes the tables and pictures of docs/results.md, and the headline of the README, from what was measured.

python docs/write_results.py

A line `<!-- study: NAME -->` says that the blocks behind it are those of `docs/studies/NAME.jsonl.gz`; `reporting.publish` says
what blocks there are. Between `<!-- without training: SIZE, LAYOUT -->` and its end goes a table of `benchmarks/results`.
"""

import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from reporting.gather import Results, gather
from reporting.pictures import draw_pictures
from reporting.publish import fill_blocks
from reporting.without_training import PICTURE, draw, read_rows, table_of
from utils.files import write_atomic

ROOT = Path(__file__).resolve().parent.parent
STUDIES, FIGURES, PAGE, README = ROOT / "docs/studies", ROOT / "docs/figures", ROOT / "docs/results.md", ROOT / "README.md"
LINES = ROOT / "benchmarks/results/pruning_without_training.jsonl"
STUDY = re.compile(r"^<!-- study: (\w+) -->\n", re.MULTILINE)
UNTRAINED = re.compile(r"(<!-- without training: ([^\n]*), ([^\n]*) -->\n).*?(<!-- without training:end -->)", re.DOTALL)
PICTURES = {"accuracy_macs.png": ("benchmark", "accuracy_macs"), "kept_filters.png": ("allocation", "kept_filters")}


def study(name: str) -> Results:
    return gather([STUDIES / f"{name}.jsonl.gz"])


def filled(text: str, *, origin: Path) -> str:
    """The text of a page with its blocks as the studies have them. Raises UserError for a block that does not end."""
    first, *parts = STUDY.split(text)
    pages = [
        f"<!-- study: {name} -->\n{fill_blocks(part, study(name).groups, origin=origin)}"
        for name, part in zip(parts[::2], parts[1::2], strict=True)
    ]
    rows = read_rows([LINES])
    return UNTRAINED.sub(
        lambda block: f"{block[1]}{table_of(rows, size=block[2], layout=block[3])}{block[4]}", first + "".join(pages)
    )


def pictures() -> dict[str, bytes]:
    """The pictures of the page as PNG, by their names."""
    drawn = {name: draw_pictures(study(of).groups, names=[picture])[0].png for name, (of, picture) in PICTURES.items()}
    return {**drawn, PICTURE: draw(read_rows([LINES]))}


if __name__ == "__main__":
    for page in (PAGE, README):
        write_atomic(page, filled(page.read_text(), origin=page).encode())
    for name, png in pictures().items():
        write_atomic(FIGURES / name, png)
