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
