import csv
import io

import pytest
from saved_runs import write_pruned, write_unpruned

from reporting.gather import Statistic, gather
from reporting.tables import (
    KEY_MEASURES,
    accuracy_text,
    bytes_text,
    caption,
    comma_separated,
    headings,
    markdown,
    markdown_by_subject,
    scaled_text,
)


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (999, "999"), (1000, "1.00 k"), (269722, "270 k"), (999_600, "1.00 M"), (126_550_000, "127 M"), (4.1e9, "4.10 G")],
)
def test_numbers_have_three_digits_and_a_prefix(value, text):
    assert scaled_text(Statistic(value, None, 1)) == text


def test_bytes_and_accuracies():
    assert bytes_text(Statistic(1_700_000, None, 1)) == "1.70 MB"
    assert bytes_text(Statistic(12, None, 1)) == "12 B"
    assert accuracy_text(Statistic(93.589, 0.126, 4)) == "93.59 ± 0.13"
    assert accuracy_text(Statistic(93.589, None, 1)) == "93.59"


@pytest.fixture
def groups(tmp_path):
    write_unpruned(tmp_path / "teacher", top1=98.0)
    for seed, top1 in enumerate((95.0, 96.0)):
        write_pruned(tmp_path / f"pruned-{seed}", top1=top1, best=97.0, seed=seed)
    return gather([tmp_path]).groups


def test_markdown_row_by_hand(groups):
    head, _, unpruned, pruned = markdown(groups).splitlines()
    assert head == (
        "| dataset | network | method | n | last top-1 % | best top-1 % | drop | parameters | MACs | dense file "
        "| compact file | latency | speed-up | PFLOPs | minutes |"
    )
    assert unpruned == "| digits | ResNet-20 | unpruned | 1 | 98.00 | 98.00 |  | 270 k | 40.6 M | 1.11 MB |  |  |  | 2.5 | 1.5 |"
    # sqrt(0.5) of 95 and 96; 60 ms over 40 ms
    assert pruned == (
        "| digits | ResNet-20 | NGGM + HAP + KD, 0.6 | 2 | 95.50 ± 0.71 | 97.00 ± 0.00 | 2.50 ± 0.71 | 100 k | 17.6 M | 1.11 MB "
        "| 430 kB | 40 ms | 1.50x | 2.5 | 1.5 |"
    )


def test_a_table_for_each_network_and_dataset(groups, tmp_path):
    write_pruned(tmp_path / "other" / "pruned", top1=50.0, dataset="cifar10")
    both = [*gather([tmp_path / "other"]).groups, *groups]
    assert markdown_by_subject(both, KEY_MEASURES).splitlines() == [
        "**ResNet-20 on cifar10**",
        "",
        "| method | n | last top-1 % | best top-1 % | drop | parameters | MACs | compact file |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
        "| NGGM + HAP + KD, 0.6 | 1 | 50.00 | 50.00 | 48.00 | 100 k | 17.6 M | 430 kB |",
        "",
        "**ResNet-20 on digits**",
        "",
        "| method | n | last top-1 % | best top-1 % | drop | parameters | MACs | compact file |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
        "| unpruned | 1 | 98.00 | 98.00 |  | 270 k | 40.6 M |  |",
        "| NGGM + HAP + KD, 0.6 | 2 | 95.50 ± 0.71 | 97.00 ± 0.00 | 2.50 ± 0.71 | 100 k | 17.6 M | 430 kB |",
    ]


def test_the_caption_explains_the_columns_that_are_there(groups):
    assert "Latency: of one batch of 64 images" in caption(groups)
    assert "Latency" not in caption(groups, KEY_MEASURES) and "Drop: top-1 of the teacher" in caption(groups, KEY_MEASURES)


def test_csv_is_unrounded(groups):
    rows = list(csv.DictReader(io.StringIO(comma_separated(groups))))
    assert [row["method"] for row in rows] == ["unpruned", "NGGM + HAP + KD, 0.6"]
    assert rows[1]["seeds"] == "0 1"
    assert float(rows[1]["last_top1_mean"]) == 95.5
    assert float(rows[1]["last_top1_std"]) == pytest.approx(0.5**0.5, rel=1e-15)
    assert float(rows[1]["macs_mean"]) == 17_600_000
    assert rows[0]["last_top1_std"] == rows[0]["drop_mean"] == ""


def test_columns_without_a_figure_are_left_out(tmp_path):
    write_unpruned(tmp_path / "teacher")
    assert headings(gather([tmp_path]).groups)[4:] == ["last top-1 %", "best top-1 %", "parameters", "PFLOPs", "minutes"]


def test_a_bar_in_a_name_does_not_break_the_table(tmp_path):
    write_unpruned(tmp_path / "teacher", dataset="a|b")
    assert markdown(gather([tmp_path]).groups).splitlines()[2].startswith("| a\\|b | ResNet-20 |")
