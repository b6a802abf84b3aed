"""Figures of papers beside those of runs."""

import json

import pytest
from saved_runs import write_pruned

from reporting.gather import Results, gather
from reporting.publish import update_readme, write_report
from reporting.published import beside, matched_table, published_figures, published_table


@pytest.fixture
def groups(tmp_path):
    """FPGM on ResNet-56 at three costs, one of them on another dataset."""
    for name, macs, data_dir in (("near", 60e6, "cifar10-jpeg"), ("far", 20e6, "cifar10-jpeg"), ("other", 60e6, "cifar100")):
        flags = {"prune_mode": "filter-gm", "distill": ["none"], "prune_rates": [macs / 1e8], "dataset": "folder"}
        folder = write_pruned(tmp_path / "saves" / name, top1=92.0, teacher=93.0, data_dir=data_dir, **flags)
        summary = json.loads((folder / "summary.json").read_text())
        summary["model"] = "resnet56"
        summary["compact"]["dense"]["macs"], summary["compact"]["compact"]["macs"] = 126e6, macs
        (folder / "summary.json").write_text(json.dumps(summary))
    return gather([tmp_path / "saves"]).groups


def figure(method):
    return next(figure for figure in published_figures() if figure.method == method)


def test_the_nearest_cost_of_the_same_method_network_and_dataset_counts(groups):
    assert beside(figure("FPGM"), groups).first.folder.name == "near"
    assert beside(figure("CHIP"), groups) is None


def test_drops_are_compared(groups):
    (row,) = [line for line in published_table(groups).splitlines() if line.startswith("| FPGM ")]
    # 93.59 to 93.49 loses 0.10, 93 to 92 loses 1.00
    assert [cell.strip() for cell in row.split("|")[3:11]] == [
        *("93.59 to 93.49", "0.10", "47.4 %"),
        *("93.00 to 92.00 (cifar10-jpeg)", "1.00", "47.6 %", "+0.90", "He et al., CVPR 2019, from a trained network"),
    ]
    assert published_table(groups).count("not measured") == len(published_figures()) - 1


def test_a_page_gets_the_table_where_it_asks_for_it(groups, tmp_path):
    page = tmp_path / "page.md"
    page.write_text("# Title\n<!-- published:begin -->\nold\n<!-- published:end -->\nend\n")
    update_readme(page, groups, figures=tmp_path)
    assert page.read_text() == f"# Title\n<!-- published:begin -->\n{published_table(groups)}<!-- published:end -->\nend\n"


def test_a_report_has_those_that_there_are_runs_for(groups, tmp_path):
    write_report(tmp_path / "report", Results(groups, []), title="Title")
    page = (tmp_path / "report" / "report.html").read_text()
    assert "<h2>Beside published figures</h2>" in page and "<td>+0.90</td>" in page and "not measured" not in page
    assert matched_table([group for group in groups if group.first.dataset == "cifar100"]) is None


def test_every_figure_is_an_accuracy_and_a_share_with_a_source():
    for each in published_figures():
        assert 50 < each.after < 100 and 50 < each.before < 100 and 0 < each.cost_percent < 100 and each.source
