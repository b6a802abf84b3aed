"""Where a report goes: a folder of its own, a block of a Markdown file, or a collection of runs to commit."""

import os
import re
from collections.abc import Sequence
from pathlib import Path

from reporting.comparison_table import ComparisonTable, comparison_tables
from reporting.gather import Group, Results
from reporting.headline import headline
from reporting.naming import PICTURE_NAMES, README_PICTURES
from reporting.page import GENERATOR, Picture, page
from reporting.pictures import draw_pictures
from reporting.published import matched_table, published_table
from reporting.run_files import COLLECTED, is_study, write_study
from reporting.tables import KEY_MEASURES, caption, comma_separated, markdown, markdown_by_subject, markdown_text, notes
from utils.errors import UserError
from utils.files import write_atomic

PAGE, MARKDOWN, CSV = "report.html", "table.md", "table.csv"
BEGIN, END = "<!-- results:begin -->", "<!-- results:end -->"
INSIDE = r"((?!<!-- )[^\n]*\n)*?"  # lines of a block, none of which begins another
HEADLINE = re.compile(rf"(<!-- headline: ([^\n]*?) -->\n){INSIDE}(<!-- headline:end -->)")
PUBLISHED = re.compile(rf"(<!-- published:begin -->\n){INSIDE}(<!-- published:end -->)")
COMPARISON = re.compile(rf"(<!-- comparison: ([^\n]*?) -->\n){INSIDE}(<!-- comparison:end -->)")
BLOCKS = {"headline": HEADLINE, "published": PUBLISHED, "comparison": COMPARISON}


def check_output(folder: Path) -> None:
    """Raises UserError if writing a report there could overwrite anything but an earlier report."""
    if not folder.exists():
        return
    if not folder.is_dir():
        raise UserError(f"--output {folder}: is a file, expected a folder")
    if any(folder.iterdir()) and not _is_report(folder / PAGE):
        raise UserError(f"--output {folder}: holds other files than a report's; choose a new or empty folder")


def _is_report(path: Path) -> bool:
    if not path.is_file():
        return False
    with path.open(errors="replace") as file:
        return GENERATOR in file.read(1000)


def write_report(
    folder: Path,
    results: Results,
    *,
    title: str,
    picture_names: Sequence[str] = PICTURE_NAMES,
    extra_pictures: Sequence[Picture] = (),
    comparisons: Sequence[ComparisonTable] = (),
) -> None:
    """The page, the table as Markdown and CSV, and the pictures as files of their own."""
    _make_folder(folder, "--output")
    pictures = [*draw_pictures(results.groups, names=picture_names), *extra_pictures]
    comparisons = [*comparisons, *filter(None, [matched_table(results.groups)])]
    for name in PICTURE_NAMES:  # an earlier report may have had pictures that this one has not
        (folder / f"{name}.png").unlink(missing_ok=True)
    for picture in pictures:
        write_atomic(folder / picture.file_name, picture.png)
    table = f"{markdown(results.groups)}\n{caption(results.groups)}\n"
    text = "\n".join([with_remarks(table, results.groups, pictures, folder="."), *map(_titled, comparisons)])
    write_atomic(folder / MARKDOWN, text.encode())
    write_atomic(folder / CSV, comma_separated(results.groups).encode())
    document = page(results, title=title, caption=caption(results.groups), pictures=pictures, comparisons=comparisons)
    write_atomic(folder / PAGE, document.encode())
    print(markdown(results.groups), end="")
    for comparison in comparisons:
        print(f"\n{_titled(comparison)}")
    print(f"{len(results.groups)} methods, {len(pictures)} pictures -> {folder / PAGE}")


def _titled(comparison: ComparisonTable) -> str:
    return f"**{markdown_text(comparison.title)}**\n\n{comparison.markdown()}"


def with_remarks(table: str, groups: Sequence[Group], pictures: Sequence[Picture], *, folder: str) -> str:
    """The table with notes and pictures in Markdown; `folder` holds the pictures, as seen from the Markdown file."""
    links = [f"![{picture.title}]({folder}/{picture.file_name})\n\n{picture.caption}\n" for picture in pictures]
    remarks = [f"- {markdown_text(note)}" for note in notes(groups)]
    return "\n".join([table, *([*remarks, ""] if remarks else []), *links])


def update_readme(path: Path, groups: Sequence[Group], *, figures: Path, picture_names: Sequence[str] = README_PICTURES) -> None:
    """Puts tables of the key measures and pictures between the markers of a Markdown file; the PNG files go to `figures`.

    Headlines, comparisons and published figures go where comments ask for them (`reporting.headline`, `.comparison_table` and
    `.published`). Raises UserError if the file cannot be read, or has neither such a comment nor each marker once, in order.
    """
    try:
        text = path.read_text()
    except OSError as error:
        raise UserError(f"--readme {path}: cannot be read: {error.strerror}") from error
    _check_blocks(path, text)
    filled = _filled(text, groups)
    if BEGIN not in text and any(block.search(text) for block in BLOCKS.values()):
        write_atomic(path, filled.encode())
        print(f"{len(groups)} methods -> {path}")
        return
    text = filled
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise UserError(f"--readme {path}: needs the lines {BEGIN} and {END} once each, for the results to go between")
    pictures = draw_pictures(groups, names=picture_names)
    _make_folder(figures, "--output")
    for picture in pictures:
        write_atomic(figures / picture.file_name, picture.png)
    table = f"{markdown_by_subject(groups, KEY_MEASURES)}\n{caption(groups, KEY_MEASURES)}\n"
    block = with_remarks(table, groups, pictures, folder=os.path.relpath(figures, path.parent))
    before, after = text.split(BEGIN)[0], text.split(END)[1]
    write_atomic(path, f"{before}{BEGIN}\n{block}{END}{after}".encode())
    print(f"{len(groups)} methods, {len(pictures)} pictures -> {path}")


def fill_blocks(text: str, groups: Sequence[Group], *, origin: Path) -> str:
    """The text with headlines, comparisons and published figures where its comments ask for them, as `update_readme` has them.

    Raises UserError, which names `origin`, for a block that does not end.
    """
    _check_blocks(origin, text)
    return _filled(text, groups)


def _check_blocks(path: Path, text: str) -> None:
    """Raises UserError unless every block that begins ends as well, before another one begins."""
    for name, block in BLOCKS.items():
        whole, marks = len(block.findall(text)), len(re.findall(rf"^<!-- {name}:", text, re.MULTILINE))
        if marks != 2 * whole:
            raise UserError(
                f"--readme {path}: each <!-- {name}: ... --> needs its <!-- {name}:end -->, both on lines of their own"
            )


def _filled(text: str, groups: Sequence[Group]) -> str:
    """The text with what its comments ask for."""
    text = HEADLINE.sub(lambda found: f"{found[1]}{headline(groups, found[2])}{found[4]}", text)
    text = PUBLISHED.sub(lambda found: f"{found[1]}{published_table(groups)}{found[3]}", text)
    return COMPARISON.sub(lambda found: f"{found[1]}{_compared(groups, found[2])}{found[4]}", text)


def _compared(groups: Sequence[Group], asked: str) -> str:
    tables = comparison_tables(groups, asked)
    return "\n".join(_titled(table) if len(tables) > 1 else table.markdown() for table in tables)


def collect(groups: Sequence[Group], folder: Path) -> None:
    """Copies what a report reads of every run to `folder/<run>/`, or into the study that `folder` names by its suffix.

    Runs that were read from there give way to others of their names. Raises UserError if two of the others have one name.
    """
    found = [record.files for group in groups for record in group.records]
    new = {run.place.name for run in found if run.place.parent != folder}
    runs = [run for run in found if run.place.parent != folder or run.place.name not in new]
    names = [run.place.name for run in runs]
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"--collect {folder}: two of the runs are called {name}; rename one")
    if is_study(folder):
        _make_folder(folder.parent, "--collect")
        write_study(folder, runs)
    else:
        for run in runs:
            _make_folder(folder / run.place.name, "--collect")
            for name in filter(run.has, COLLECTED):
                write_atomic(folder / run.place.name / name, run.content(name))
    print(f"{len(runs)} runs -> {folder}")


def _make_folder(folder: Path, flag: str) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{flag} {folder}: cannot be made: {error.strerror}") from error
