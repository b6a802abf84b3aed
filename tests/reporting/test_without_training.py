"""The page on pruning without training: every figure is worked out from the lines that were measured."""

import json

import pytest

from reporting.without_training import PICTURE, page_text, read_rows, write_page
from utils.errors import UserError


def row(weights: str, top1: dict[str, float], **other) -> dict:
    setting = {"criterion": "filter-a", "size": "macs=0.5", "layout": "coupled", "allocation": "uniform", "macs": 0.496}
    head = {"weights": weights, "teacher_top1": 84.0, "data": "cifar10", "model": "resnet20", "test_images": 1000, "images": 256}
    return {**head, **setting, "top1": top1, **other}


MEASURED = {"plain": 20.0, "recalibrated": 60.0, "reconstructed": 80.0, "both": 79.0}


def test_a_mean_comes_with_the_interval_of_students_t():
    lines = [row("a", MEASURED), row("b", {**MEASURED, "reconstructed": 82.0})]
    text = page_text(lines)
    assert "| PFEC | 20.0 [20.0, 20.0] | 60.0 [60.0, 60.0] | 81.0 [68.3, 93.7] | 79.0 [79.0, 79.0] | 49.6 % |" in text
    assert "2 teachers of each kind" in text and "### `--budget macs=0.5`, coupled" in text
    assert "Unpruned: 84.0" in text and "1,000 test images, 256 training images" in text


def test_what_was_not_measured_is_a_dash():
    other = row("a", {"plain": 11.0, "recalibrated": 55.0}, criterion="torch_pruning")
    assert "| torch\\_pruning | 11.0 | 55.0 | - | - | 49.6 % |" in page_text([row("a", MEASURED), other])


def test_the_page_comes_with_its_picture_and_leaves_out_what_failed(tmp_path):
    lines = [row("a", MEASURED), {**row("a", {}, size="macs=0.01"), "fails": "too little"}]
    lines[1].pop("top1")
    (tmp_path / "lines.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    write_page(tmp_path / "page.md", read_rows([tmp_path / "lines.jsonl"]))
    assert "macs=0.01" not in (tmp_path / "page.md").read_text()
    assert (tmp_path / "figures" / PICTURE).read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("text", ["no json", "[1]\n", '{"data": "x"}\n'])
def test_other_files_are_refused(tmp_path, text):
    (tmp_path / "lines.jsonl").write_text(text)
    with pytest.raises(UserError, match=r"--report .*lines\.jsonl"):
        read_rows([tmp_path / "lines.jsonl"])
    with pytest.raises(UserError, match="not one result"):
        write_page(tmp_path / "page.md", [])
