"""The entry script from its flags to its files, and the committed results."""

import importlib.util
import re
import time
from pathlib import Path

import pytest
from browser import browse, needs_chromium
from saved_runs import write_pruned, write_unpruned

import report
from reporting.gather import gather
from reporting.publish import BEGIN, END
from reporting.tables import headings
from utils import cli

ROOT = Path(report.__file__).resolve().parent


def run_report(*words):
    """Exit status of the script."""
    with pytest.raises(SystemExit) as end:
        cli.run_script(report.get_args_parser, report.main, [str(word) for word in words])
    return end.value.code


@pytest.fixture
def saves(tmp_path):
    write_unpruned(tmp_path / "saves" / "teacher")
    for seed in (1, 2):
        write_pruned(tmp_path / "saves" / f"pruned-{seed}", top1=95.0 + seed, seed=seed)
    return tmp_path / "saves"


def test_from_runs_to_a_page(saves, tmp_path, capsys):
    (saves / "foreign").mkdir()
    assert run_report(saves, "--output", tmp_path / "report", "--title", "My runs") == 0
    output = capsys.readouterr().out
    assert f"left out {saves / 'foreign'}: no run, it has no config.json" in output
    assert "| NGGM + HAP + KD, 0.6 | 2 | 96.50 ± 0.71 |" in output
    document = (tmp_path / "report" / "report.html").read_text()
    assert "<title>My runs</title>" in document
    assert document.count("data:image/png") == 7


def test_only_the_pictures_that_are_asked_for(saves, tmp_path):
    assert run_report(saves, "--output", tmp_path / "report", "--pictures", "bytes", "accuracy_macs") == 0
    assert {path.name for path in (tmp_path / "report").glob("*.png")} == {"bytes.png", "accuracy_macs.png"}
    readme = tmp_path / "README.md"
    readme.write_text(f"{BEGIN}\n{END}\n")
    assert run_report(saves, "--readme", readme, "--output", tmp_path / "figures", "--pictures", "learning_curves") == 0
    assert readme.read_text().count("![") == 1
    assert "(figures/learning_curves.png)" in readme.read_text()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["{tmp}/nowhere"], "nowhere: no such folder"),
        (["{tmp}/empty"], "empty: no finished run found"),
        (["{saves}", "--output", "{tmp}/mine"], "holds other files than a report's"),
        (["{saves}", "--images", "3"], "--images 3: only with --attention RUN"),
        (["{saves}", "--data-dir", "x"], "--data-dir x: only with --attention RUN"),
        (["{saves}", "--attention", "{saves}/teacher"], "this run has no teacher"),
        (["{saves}", "--attention", "{saves}/pruned-1", "--images", "-1"], "--images: '-1' is not a whole number of 0 or more"),
        (["{saves}", "--readme", "{tmp}/mine/own.txt"], "needs the lines <!-- results:begin -->"),
        (["{saves}", "--readme", "a.md", "--collect", "b"], "not allowed with argument"),
        (["{saves}", "--pictures", "bytes", "--collect", "b"], "--pictures bytes: only without --collect"),
        (["{saves}", "--pictures", "byte"], "--pictures: invalid choice: 'byte'"),
        (["{saves}", "--outptu", "x"], "unrecognized arguments: --outptu"),
        (["{saves}", "--output", "{tmp}/mine/own.txt/report"], "cannot be made"),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(saves, tmp_path, capsys, flags, message):
    (tmp_path / "empty").mkdir()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "own.txt").write_text("mine")
    flags = [flag.format(tmp=tmp_path, saves=saves) for flag in flags]
    before = sorted(tmp_path.rglob("*"))
    assert (
        run_report(*flags, *([] if {"--output", "--readme", "--collect"} & {*flags} else ["--output", tmp_path / "report"])) == 2
    )
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert message in lines[0]
    assert sorted(tmp_path.rglob("*")) == before


def test_a_thousand_runs_take_less_than_20_seconds(tmp_path):
    for number in range(250):
        for seed in range(4):
            write_pruned(tmp_path / "saves" / f"{number}-{seed}", top1=90.0 + seed, seed=seed, lr=number / 1000)
    start = time.process_time()  # of this process alone, however busy the machine is
    assert run_report(tmp_path / "saves", "--output", tmp_path / "report") == 0
    assert time.process_time() - start < 20
    assert (tmp_path / "report" / "table.csv").read_text().count("\n") == 1 + 250


def results_writer():
    spec = importlib.util.spec_from_file_location("write_results", ROOT / "docs" / "write_results.py")
    writer = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(writer)
    return writer


@pytest.mark.parametrize("name", ["README.md", "docs/results.md"])
def test_documents_have_the_committed_results(name):
    page = ROOT / name
    text = page.read_text()
    assert "<!-- study: benchmark -->\n" in text
    emptied = re.sub(r"(<!-- (?:headline|comparison|without training): .* -->\n)(?:.*\n)*?(<!-- .*:end -->)", r"\1\2", text)
    assert len(emptied) < len(text)
    assert results_writer().filled(emptied, origin=page) == text, "run python docs/write_results.py"


def test_the_pictures_of_the_results_are_drawn_by_the_same_command():
    writer = results_writer()
    for name in writer.pictures():
        assert f"(figures/{name})" in (ROOT / "docs" / "results.md").read_text()
        assert (ROOT / "docs" / "figures" / name).is_file()


@pytest.mark.parametrize(
    ("study", "method", "baseline", "said"),
    [
        ("benchmark", "unpruned", "NGGM + HAP + KD, macs=0.45", "the unpruned network is {:.2f} points better"),
        ("tiny_imagenet", "NGGM, macs=0.45", "NGGM + KD, macs=0.45", "KD gains {:.2f} points over no loss"),
        ("allocation", "NGGM + HAP + KD, macs=0.45, coupled", "NGGM + HAP + KD, macs=0.45", "({:.2f} points on NGGM,"),
        ("allocation", "PFEC + HAP + KD, macs=0.45, coupled", "PFEC + HAP + KD, macs=0.45", " {:.2f} on PFEC)"),
        ("allocation", "NGGM + HAP + KD, macs=0.45 global, coupled", "NGGM + HAP + KD, macs=0.45", "by {:.2f} and 2.83 points"),
        ("allocation", "PFEC + HAP + KD, macs=0.45 global, coupled", "PFEC + HAP + KD, macs=0.45", " and {:.2f} points"),
        ("allocation", "NGGM + HAP + KD, latency=0.7, coupled", "NGGM + HAP + KD, macs=0.45", "costs {:.2f} points on NGGM"),
    ],
)
def test_differences_in_the_text_of_the_results_are_those_of_the_studies(study, method, baseline, said):
    groups = {group.name: group for group in gather([ROOT / "docs" / "studies" / f"{study}.jsonl.gz"]).groups}
    top1 = [groups[name].statistic("last_top1").mean for name in (method, baseline)]
    text = " ".join((ROOT / "docs" / "results.md").read_text().split())
    assert said.format(abs(top1[0] - top1[1])) in text


@pytest.mark.parametrize("study", sorted(path.name for path in (ROOT / "docs" / "studies").iterdir()))
def test_committed_results_are_all_whole(study):
    results = gather([ROOT / "docs" / "studies" / study])
    assert results.skipped == []
    for group in results.groups:
        for record in group.records:
            assert record.files.read("summary.json")["script"] == record.script


@needs_chromium
def test_the_page_of_the_committed_results_sorts_in_a_browser(tmp_path):
    assert run_report(report.COMMITTED_RESULTS, "--output", tmp_path / "report") == 0
    groups = gather([report.COMMITTED_RESULTS]).groups
    column = headings(groups).index("last top-1 %")
    document, console = browse(tmp_path / "report" / "report.html", tmp_path / "profile", fragment=f"#sort=-{column + 1}")
    shown = [re.findall(r"<td[^>]*>([^<]*)</td>", row)[column] for row in re.findall(r"<tr>(.*?)</tr>", document)[1:]]
    accuracies = [float(text.split(" ")[0]) for text in shown]
    assert accuracies == sorted((round(group.statistic("last_top1").mean, 2) for group in groups), reverse=True)
    assert console == []
