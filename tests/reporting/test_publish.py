import json

import pytest
from saved_runs import write_pruned, write_unpruned

from reporting.gather import gather
from reporting.publish import BEGIN, END, check_output, collect, update_readme, write_report
from utils.errors import UserError


@pytest.fixture
def results(tmp_path):
    write_unpruned(tmp_path / "saves" / "teacher")
    write_pruned(tmp_path / "saves" / "pruned", top1=97.0)
    return gather([tmp_path / "saves"])


def test_a_report_replaces_an_earlier_one_and_its_pictures(tmp_path, results):
    folder = tmp_path / "report"
    check_output(folder)
    write_report(folder, results, title="First")
    first = {path.name for path in folder.iterdir()}
    assert {"report.html", "table.md", "table.csv", "accuracy_macs.png", "kept_filters.png"} <= first
    check_output(folder)
    write_report(folder, results._replace(groups=results.groups[:1]), title="Second")
    assert "Second" in (folder / "report.html").read_text()
    assert "kept_filters.png" not in {path.name for path in folder.iterdir()}


def test_the_markdown_names_only_files_that_are_there(tmp_path, results):
    write_report(tmp_path / "report", results, title="Title")
    text = (tmp_path / "report" / "table.md").read_text()
    links = [part.split(")")[0] for part in text.split("](")[1:]]
    assert len(links) >= 4
    assert all((tmp_path / "report" / link).is_file() for link in links)


def test_other_peoples_files_are_not_overwritten(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(UserError, match="holds other files than a report's"):
        check_output(tmp_path)
    with pytest.raises(UserError, match=r"thesis\.tex: is a file"):
        check_output(tmp_path / "thesis.tex")


def test_an_empty_or_new_folder_will_do(tmp_path):
    check_output(tmp_path)
    check_output(tmp_path / "new" / "folder")


def test_a_readme_changes_between_its_markers_only(tmp_path, results):
    readme = tmp_path / "README.md"
    readme.write_text(f"# Title\n\n{BEGIN}\nold\n{END}\n\nEnd without newline")
    update_readme(readme, results.groups, figures=tmp_path / "docs" / "figures")
    text = readme.read_text()
    assert text.startswith(f"# Title\n\n{BEGIN}\n**ResNet-20 on digits**\n\n| method | n |")
    assert text.endswith(f"{END}\n\nEnd without newline")
    assert "old" not in text
    links = [part.split(")")[0] for part in text.split("](")[1:]]
    assert links == ["docs/figures/accuracy_macs.png", "docs/figures/bytes.png"]
    assert all((tmp_path / link).is_file() for link in links)
    update_readme(readme, results.groups, figures=tmp_path / "docs" / "figures")
    assert readme.read_text() == text


@pytest.mark.parametrize("text", ["", BEGIN, f"{END}\n{BEGIN}", f"{BEGIN}{BEGIN}{END}"])
def test_a_readme_without_both_markers_stays_as_it_is(tmp_path, results, text):
    readme = tmp_path / "README.md"
    readme.write_text(text)
    with pytest.raises(UserError, match="once each"):
        update_readme(readme, results.groups, figures=tmp_path / "figures")
    assert readme.read_text() == text
    assert not (tmp_path / "figures").exists()


@pytest.mark.parametrize(
    "text",
    [
        "<!-- comparison: A -->\nmine\n",
        "<!-- comparison: A -->\nmine\n<!-- comparison: B -->\n<!-- comparison:end -->\n",
        "<!-- headline: A --> \n<!-- headline:end -->\n",
        "<!-- published:end -->\n<!-- published:begin -->\n",
    ],
)
def test_a_block_that_does_not_end_takes_nothing_with_it(tmp_path, results, text):
    page = tmp_path / "page.md"
    page.write_text(text)
    with pytest.raises(UserError, match="both on lines of their own"):
        update_readme(page, results.groups, figures=tmp_path)
    assert page.read_text() == text


def test_a_readme_that_is_not_there(tmp_path, results):
    with pytest.raises(UserError, match=r"--readme .*nowhere: cannot be read"):
        update_readme(tmp_path / "nowhere", results.groups, figures=tmp_path)


def test_collected_runs_give_the_same_groups_without_their_networks(tmp_path, results):
    (tmp_path / "saves" / "pruned" / "model_best.pt").write_bytes(b"large")
    collect(results.groups, tmp_path / "docs")
    assert not list((tmp_path / "docs").rglob("*.pt"))
    again = gather([tmp_path / "docs"])
    assert [group.name for group in again.groups] == [group.name for group in results.groups]
    assert [group.first.measures for group in again.groups] == [group.first.measures for group in results.groups]
    assert again.groups[1].first.filters == results.groups[1].first.filters
    assert json.loads((tmp_path / "docs" / "pruned" / "config.json").read_text())["script"] == "pruning.py"


def test_two_runs_of_one_name_are_not_collected_over_each_other(tmp_path, results):
    write_pruned(tmp_path / "more" / "pruned", top1=50.0, lr=1.0)
    both = gather([tmp_path / "saves", tmp_path / "more"])
    with pytest.raises(UserError, match="two of the runs are called pruned"):
        collect(both.groups, tmp_path / "docs")
