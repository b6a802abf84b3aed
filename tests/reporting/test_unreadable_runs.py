"""Runs that somebody else wrote: none stops a report, and nothing in them is taken for more than text."""

import csv
import json
import os

import pytest
from saved_runs import write_pruned, write_unpruned

from reporting.gather import gather
from reporting.pictures import draw_pictures
from reporting.publish import write_report
from reporting.tables import markdown_text
from utils.errors import spreadsheet_text

HOSTILE = "=1+1 | `code` $\\frac{1}{0$ <script>alert(1)</script> [x](http://a) ![y](b) **b**\n\n# h \x1b[2J \ud800 \u202e 猫 \\"
DEEP = "[" * 1000 + "]" * 1000


def names(results):
    return [record.folder.name for group in results.groups for record in group.records]


def write_file(path, content):
    path.unlink(missing_ok=True)
    path.write_text(content)


def make_pipe(path, _):
    path.unlink()
    os.mkfifo(path)


def make_link(path, target):
    path.unlink()
    path.symlink_to(target)


@pytest.mark.parametrize("file", ["config.json", "summary.json", "metrics.jsonl", "kept_filters.json"])
@pytest.mark.parametrize(
    ("spoil", "content"),
    [
        (write_file, DEEP),
        (write_file, '{"a":' * 5000 + "1" + "}" * 5000),
        (write_file, '"\\ud800"'),
        (write_file, "3"),
        (write_file, "[]"),
        (write_file, '{"flags": {"seed": ' + "9" * 5000 + "}}"),
        (make_pipe, None),
        (make_link, "/dev/zero"),
        (make_link, "nowhere"),
    ],
    ids=["deep list", "deep object", "surrogate", "number", "list", "long number", "pipe", "device", "dangling link"],
)
def test_one_bad_file_leaves_its_run_out_by_name(file, spoil, content, tmp_path):
    write_pruned(tmp_path / "whole", top1=90.0)
    bad = write_pruned(tmp_path / "bad", top1=90.0, seed=2)
    spoil(bad / file, content)
    results = gather([tmp_path])
    if file == "metrics.jsonl" and content in ('{"flags": {"seed": ' + "9" * 5000 + "}}", "nowhere"):
        return  # a last line that is none, and no metrics, are what a crash leaves
    assert names(results) == ["whole"], results.skipped
    ((folder, reason),) = results.skipped
    assert folder == bad and len(str(results.skipped[0]).splitlines()) == 1 and len(reason) < 500


@pytest.mark.parametrize(
    ("file", "path", "value"),
    [
        *(("config.json", ("flags", name), value) for name in ("seed", "dataset", "distill") for value in (1.5, {}, [[]])),
        *(("config.json", ("flags", "prune_rates"), value) for value in ("0.6", [], ["a", "b"], ["a", 1], {}, [1e999], [True])),
        *(("config.json", ("flags", name), value) for name in ("gamma", "alpha") for value in ("x", [0.5], True, 10**400)),
        *(("config.json", ("flags", name), value) for name in ("betas", "samp_batches", "hap_ts") for value in ("x", 0.5, {})),
        ("config.json", ("flags", "betas"), [None]),
        ("config.json", ("flags", "t_model"), ["resnet20"]),
        ("config.json", ("versions",), []),
        ("config.json", ("flags",), dict.fromkeys(map(str, range(1000)))),
        ("summary.json", ("last",), []),
        *(("summary.json", ("last", "top1"), value) for value in ("x", -1, 101, 1e999, True, 10**400)),
        *(("summary.json", ("kept_filters",), value) for value in ([1], {"a": "b"}, {"a": -1}, {"a": 10**12}, {"a": 1.5})),
        ("summary.json", ("kept_filters",), {str(number): 1 for number in range(100_000)}),
        *(("summary.json", ("compact", "compact", "latency", "64", "median_ms"), value) for value in (0, -1, 5e-324, "x")),
        ("summary.json", ("compact", "dense", "macs"), 1e300),
    ],
)
def test_values_of_a_wrong_type_or_size_leave_the_run_out(file, path, value, tmp_path):
    write_pruned(tmp_path / "whole", top1=90.0)
    bad = write_pruned(tmp_path / "bad", top1=90.0, seed=2)
    content = json.loads((bad / file).read_text())
    place = content
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    (bad / file).write_text(json.dumps(content))
    results = gather([tmp_path])
    assert names(results) == ["whole"]
    assert "damaged" in results.skipped[0].reason


@pytest.fixture
def hostile(tmp_path):
    """A whole run whose every text is as bad as text can be, beside an ordinary one."""
    write_unpruned(tmp_path / "saves" / "teacher")
    run = write_pruned(tmp_path / "saves" / "_<b>|x\udcff", top1=90.0, dataset=HOSTILE, prune_mode=HOSTILE, note=HOSTILE)
    write_pruned(tmp_path / "saves" / "other", top1=91.0, dataset=HOSTILE, prune_mode=HOSTILE, note="_" + HOSTILE, gamma=0.1)
    for name in ("config.json", "summary.json", "kept_filters.json"):
        text = (run / name).read_text()
        (run / name).write_text(
            text.replace("resnet20", json.dumps(HOSTILE)[1:-1]).replace("conv_1_3x3", json.dumps(HOSTILE)[1:-1])
        )
    config = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps({**config, "command": HOSTILE, "device": HOSTILE}))
    return gather([tmp_path / "saves"])


def test_texts_of_others_are_escaped_in_every_form(hostile, tmp_path, capsys, recwarn):
    assert hostile.skipped == [] and len(names(hostile)) == 3
    write_report(tmp_path / "report", hostile, title="Title")
    assert [str(warning.message) for warning in recwarn] == []
    page = (tmp_path / "report" / "report.html").read_text()
    assert page.count("<script>") == 1 and "&lt;script&gt;alert(1)" in page
    table = (tmp_path / "report" / "table.md").read_text()
    widths = {line.replace("\\|", "").count("|") for line in table.splitlines() if line.startswith("|")}
    assert len(widths) == 1  # the columns of every row are those of the heading
    assert "<script>" not in table and "](http" not in table and "\n# h" not in table and "![y](b)" not in table
    for row in csv.reader((tmp_path / "report" / "table.csv").read_text().splitlines()):
        assert not any(cell[:1] in ("=", "@", "\t") for cell in row)
    assert "'=1+1 |" in (tmp_path / "report" / "table.csv").read_text()
    for text in (page, table, capsys.readouterr().out):
        assert "\x1b" not in text and "\u202e" not in text


def test_a_name_with_formulas_is_drawn_as_it_is(hostile):
    assert {"accuracy_macs", "kept_filters", "bytes"} <= {
        picture.name for picture in draw_pictures(hostile.groups, names=["accuracy_macs", "kept_filters", "bytes"])
    }


def test_escapes_by_hand():
    assert markdown_text("a|b\n`c` <d> & *e* [f](g)") == "a\\|b \\`c\\` &lt;d&gt; &amp; \\*e\\* [f]\\(g)"
    assert [spreadsheet_text(text) for text in ("=A1", "-1", "+1", "@x", "a=b")] == ["'=A1", "'-1", "'+1", "'@x", "a=b"]
