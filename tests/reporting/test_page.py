import json
import re

import pytest
from browser import browse, needs_chromium
from saved_runs import write_pruned, write_unpruned

from reporting.gather import Skipped, gather
from reporting.page import Picture, page


@pytest.fixture
def results(tmp_path):
    write_unpruned(tmp_path / "teacher", top1=98.0)
    write_pruned(tmp_path / "good", top1=97.0)
    write_pruned(tmp_path / "bad", top1=9.5, prune_mode="filter-r")
    return gather([tmp_path])


def render(results, **changes):
    picture = Picture("name", "Title", "Caption", b"\x89PNG")
    return page(results, **{"title": "Results", "caption": "How to read it.", "pictures": [picture], **changes})


def test_the_page_holds_everything_itself(results):
    document = render(results)
    assert "data:image/png;base64,iVBORw==" in document
    assert not re.findall(r"(?:src|href)=\"(?!data:)", document)
    assert "http" not in document.replace("http-equiv", "")


def test_text_of_runs_cannot_become_markup(results):
    hostile = "<script>alert(1)</script>&\"'"
    document = render(results._replace(skipped=[Skipped(hostile, hostile)]), title=hostile, caption=hostile)
    assert document.count("<script>") == 1  # our own
    assert "&lt;script&gt;alert(1)&lt;/script&gt;&amp;&quot;&#x27;" in document


def test_skipped_runs_and_commands_are_on_it(results):
    document = render(results._replace(skipped=[Skipped("saves/broken", "damaged, cut short")]))
    assert "saves/broken: damaged, cut short" in document
    assert "<code>pruning.py --seed 1</code>" in document


def test_what_rows_have_in_common_is_one_line(tmp_path):
    for number, mode in enumerate(("filter-a", "filter-gm")):
        for seed in (1, 2):
            folder = write_pruned(tmp_path / f"{mode}-{seed}", top1=90.0, seed=seed, prune_mode=mode)
            config = json.loads((folder / "config.json").read_text())
            (folder / "config.json").write_text(json.dumps({**config, "git_sha": f"{seed}{number}abcdef"}))
    document = render(gather([tmp_path]))
    assert "<li>runs of 2 methods differ in commit: 10abcde; 11abcde; 20abcde; 21abcde</li>" in document
    assert document.count("differ in commit") == 1


def shown_cells(document, row):
    cells = re.findall(r"<td[^>]*>[^<]*</td>", re.findall(r"<tr[^>]*>(.*?)</tr>", document)[row + 1])
    return [re.sub("<[^>]*>", "", cell) for cell in cells if 'hidden=""' not in cell]


@needs_chromium
@pytest.mark.parametrize(("width", "cells"), [(400, 4), (1400, 12)])
def test_a_screen_begins_with_the_columns_that_fit(results, tmp_path, width, cells):
    path = tmp_path / "page.html"
    path.write_text(render(results))
    document, console = browse(path, tmp_path / "profile", width=width)
    assert console == []
    pruned = shown_cells(document, 1)
    assert len(pruned) == cells
    assert {"NGGM + HAP + KD, 0.6", "97.00", "17.6 M"} <= {*pruned}
    assert document.count("data-column=") == 15  # each can be chosen


@needs_chromium
def test_rows_are_picked_by_method(results, tmp_path):
    path = tmp_path / "page.html"
    path.write_text(render(results))
    document, console = browse(path, tmp_path / "profile", fragment="#sort=-5&method=nggm + hap")
    rows = re.findall(r"<tr([^>]*)>", document.partition("<tbody>")[2])
    assert [('hidden=""' in row) for row in rows] == [True, False, True]
    assert re.search(r'id="shown">(\d+)<', document)[1] == "1"
    assert console == []


@needs_chromium
@pytest.mark.parametrize(
    ("sort", "order"),
    [
        ("", ["unpruned", "NGGM", "Random"]),
        ("#sort=5", ["Random", "NGGM", "unpruned"]),  # 9.50 before 97.00: numbers, not text
        ("#sort=-5", ["unpruned", "NGGM", "Random"]),
        ("#sort=3", ["NGGM", "Random", "unpruned"]),
        ("#sort=-7", ["Random", "NGGM", "unpruned"]),  # the drop, which the unpruned network has not got: last
        ("#sort=99", ["unpruned", "NGGM", "Random"]),
    ],
)
def test_the_table_sorts_in_a_browser(results, tmp_path, sort, order):
    path = tmp_path / "page.html"
    path.write_text(render(results))
    document, console = browse(path, tmp_path / "profile", fragment=sort)
    rows = re.findall(r'<td class="text name"[^>]*>(\w+)', document)
    assert rows == order
    assert console == []
    assert document.count('aria-sort="ascending"') + document.count('aria-sort="descending"') == (
        sort in ("#sort=5", "#sort=-5", "#sort=3", "#sort=-7")
    )
