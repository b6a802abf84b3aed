"""The sentence at the head of a page."""

import pytest
from saved_runs import write_pruned

from reporting.gather import gather
from reporting.headline import headline
from reporting.publish import update_readme
from utils.errors import UserError


@pytest.fixture
def groups(tmp_path):
    for seed, top1 in enumerate((95.0, 96.0)):
        write_pruned(tmp_path / "saves" / f"hap-{seed}", top1=top1, seed=seed)
    write_pruned(tmp_path / "saves" / "single", top1=90.0, prune_mode="filter-a", distill=["none"])
    return gather([tmp_path / "saves"]).groups


def test_it_says_what_the_runs_have(groups):
    # interval: 12.706 times half a point; 40.55 of 17.6 M
    assert headline(groups, "NGGM + HAP + KD, 0.6") == (
        "ResNet-20 on digits, NGGM + HAP + KD, 0.6: **95.50 %** top-1 [89.15, 101.85] from 98.00 %, "
        "2.3 times fewer multiply-accumulates, 430 kB in place of 1.11 MB (2 seeds, 95 % interval).\n"
    )


def test_it_stands_where_a_page_asks_for_it(groups, tmp_path):
    page = tmp_path / "page.md"
    page.write_text("<!-- headline: NGGM + HAP + KD, 0.6 -->\n<!-- headline:end -->\n")
    for _ in range(2):
        update_readme(page, groups, figures=tmp_path)
        assert page.read_text().count("**95.50 %**") == 1


@pytest.mark.parametrize("method", ["NGGM", "PFEC, 0.6"])
def test_without_such_a_method_or_seeds_there_is_none(groups, method):
    with pytest.raises(UserError, match="needs one method of this name and two seeds"):
        headline(groups, method)
