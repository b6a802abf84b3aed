"""metrics.jsonl: a torn last line is passed over, any other damage stops with the number of its line."""

import json

import pytest

from utils.errors import UserError
from utils.runs.metrics_file import known_metrics, read_metrics

LINES = [{"epoch": epoch, "split": split, "loss": 0.5, "seconds": 1.5} for epoch in range(3) for split in ("train", "test")]
TEXTS = [json.dumps(line) for line in LINES]
DAMAGED = ["", "{", "null", "[]", "3", "{}", '{"epoch": 1, "split": "test"}', "[" * 100_000, "\\x00"] + [
    json.dumps({**LINES[0], **wrong})
    for wrong in ({"epoch": "0"}, {"epoch": True}, {"epoch": -1}, {"split": 1}, {"loss": "0.5"}, {"loss": None},
                  {"loss": float("nan")}, {"loss": float("inf")}, {"loss": [1]}, {"loss": 10**400}, {"seconds": {}})
]  # fmt: skip


def write(folder, texts, *, end="\n"):
    (folder / "metrics.jsonl").write_text("\n".join(texts) + end)


@pytest.mark.parametrize("text", DAMAGED, ids=lambda text: text[:40])
def test_damage_is_named_by_its_line(text, tmp_path):
    write(tmp_path, [*TEXTS[:2], text, *TEXTS[2:]])
    with pytest.raises(UserError, match=r"metrics\.jsonl is damaged in line 3: "):
        read_metrics(tmp_path)
    assert read_metrics(tmp_path, skip_damaged=True) == LINES


@pytest.mark.parametrize("end", ["\n", '\n{"epoch": 3, "spl', "", "\n\0\0\0"])
def test_a_torn_last_line_is_passed_over(end, tmp_path):
    write(tmp_path, TEXTS, end=end)
    assert read_metrics(tmp_path) == LINES


def test_no_file(tmp_path):
    assert read_metrics(tmp_path) == []


@pytest.mark.parametrize("texts", [TEXTS[:3], TEXTS[1:], [TEXTS[1], TEXTS[0], *TEXTS[2:]], [TEXTS[0], *TEXTS], []])
def test_lines_that_are_missing_or_there_twice(texts, tmp_path):
    write(tmp_path, texts, end="\n" if texts else "")
    with pytest.raises(UserError, match=r"line of epoch \d, counted from 0, is missing, out of place or there twice"):
        known_metrics(tmp_path, epochs=2)


def test_later_epochs_do_not_matter(tmp_path):
    write(tmp_path, TEXTS[:5])
    assert known_metrics(tmp_path, epochs=2) == LINES[:4]
