"""Studies: the runs of many folders in one file, which a report reads like the folders."""

import dataclasses
import gzip
import json

import pytest
from saved_runs import write_pruned, write_quantized, write_unpruned

import reporting.run_files
from reporting.gather import gather
from reporting.publish import collect
from reporting.run_files import read_study
from reporting.tables import comma_separated
from utils.errors import UserError

NO_NAMES = ("../a", "..", ".", "", "a/b", "a\0b", "\ud800")


def packed(content):
    """The same bytes in every process that collects these tests."""
    return gzip.compress(content, mtime=0)


def damaged_in_the_middle(content):
    return content[:12] + bytes(byte ^ 0xFF for byte in content[12:16]) + content[16:]


@pytest.fixture
def saves(tmp_path):
    folder = tmp_path / "saves"
    write_unpruned(folder / "teacher")
    for seed in (1, 2):
        pruned = write_pruned(
            folder / f"pruned-{seed}", top1=90.0 + seed, seed=seed, t_path=str(folder / "teacher" / "model_best.pt")
        )
        (pruned / "hits.json").write_text(json.dumps({"epoch": 3, "images": 3, "labels": "ab", "bits": "oA=="}))
    write_quantized(folder / "quantized", top1=89.0, load_path=str(folder / "pruned-1" / "model_best.pt"))
    return folder


def values(groups):
    return [[dataclasses.replace(record, files=None, hits=None) for record in group.records] for group in groups]


def test_a_study_says_what_its_folders_say(saves, tmp_path):
    folders = gather([saves])
    collect(folders.groups, tmp_path / "study.jsonl.gz")
    study = gather([tmp_path / "study.jsonl.gz"])
    assert values(study.groups) == values(folders.groups)
    assert comma_separated(study.groups) == comma_separated(folders.groups)
    pruned = next(record for group in study.groups for record in group.records if record.script == "pruning.py")
    assert pruned.hits.hits.tolist() == [True, False, True]
    assert pruned.settings["t_path n_epochs"] == 4  # the teacher is found in the study, wherever its folder was


def test_a_study_is_the_same_bytes_for_the_same_runs_and_unpacks_into_them(saves, tmp_path):
    groups = gather([saves]).groups
    collect(groups, tmp_path / "study.jsonl.gz")
    first = (tmp_path / "study.jsonl.gz").read_bytes()
    collect(gather([tmp_path / "study.jsonl.gz"]).groups, tmp_path / "unpacked")
    assert values(gather([tmp_path / "unpacked"]).groups) == values(groups)
    collect(gather([tmp_path / "unpacked"]).groups, tmp_path / "again.jsonl.gz")
    assert (tmp_path / "again.jsonl.gz").read_bytes() == first


def test_a_study_is_collected_again_with_runs_whose_teacher_is_not_in_it(saves, tmp_path):
    study = tmp_path / "study.jsonl.gz"
    for count in (1, 2):
        given = [saves / f"pruned-{number}" for number in range(1, count + 1)]
        collect(gather([study, *given] if study.exists() else given).groups, study)
        assert sorted(record.folder.name for group in gather([study]).groups for record in group.records) == [
            path.name for path in given
        ]


def test_studies_and_folders_are_read_together(saves, tmp_path):
    collect(gather([saves / "pruned-1"]).groups, tmp_path / "one.jsonl.gz")
    groups = gather([tmp_path / "one.jsonl.gz", saves / "pruned-2", saves / "teacher"]).groups
    assert sum(len(group.records) for group in groups) == 3


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"plain text", "no study"),
        (packed(b'{"run": "a", "files": {}}'), "cut off"),
        (packed(b'{"run": "a", "files": {}}\n')[:-9], "damaged"),
        (packed(b"[]\n"), "line 1"),
        *((packed(json.dumps({"run": name, "files": {}}).encode() + b"\n"), "line 1") for name in NO_NAMES),
        (damaged_in_the_middle(packed(b'{"run": "a", "files": {"x": "' + bytes(range(48, 90)) * 9 + b'"}}\n')), "damaged"),
        (packed(b'{"run": "a", "files": {}}\n' * 2), "line 2: a second run"),
        (packed(b'{"run": "a", "files": ' + b"[" * 9000 + b"]" * 9000 + b"}\n"), "line 1"),
    ],
)
def test_a_damaged_study_is_one_line(tmp_path, content, message):
    path = tmp_path / "x.jsonl.gz"
    path.write_bytes(content)
    with pytest.raises(UserError, match=message) as error:
        read_study(path)
    assert str(path) in str(error.value)


def test_a_study_that_unpacks_to_far_more_than_it_says_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(reporting.run_files, "MAX_STUDY_BYTES", 1000)
    path = tmp_path / "x.jsonl.gz"
    path.write_bytes(gzip.compress(b"".join(b'{"run": "%d", "files": {}}\n' % number for number in range(100))))
    with pytest.raises(UserError, match="larger than any study"):
        read_study(path)


def test_a_study_of_empty_lists_without_end_is_refused_before_it_is_parsed(tmp_path):
    """A few kilobytes, compressed, that would be half a gigabyte of objects."""
    line = b'{"run": "%d", "files": {"config.json": [' + b"[]," * 400_000 + b"0]}}\n"
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(b"".join(line.replace(b"%d", b"%d" % run) for run in range(20))))
    with pytest.raises(UserError, match="larger than any study is"):
        read_study(tmp_path / "a.jsonl.gz")


def test_a_damaged_run_of_a_study_is_left_out_by_name(saves, tmp_path):
    collect(gather([saves]).groups, tmp_path / "study.jsonl.gz")
    lines = [json.loads(line) for line in gzip.decompress((tmp_path / "study.jsonl.gz").read_bytes()).splitlines()]
    for line, damage in zip(lines, ({"metrics.jsonl": [{"epoch": -1}]}, {"summary.json": []}, {}), strict=False):
        line["files"] |= damage
    lines[2]["files"]["hits.json"]["bits"] = "AAAA"
    del lines[3]["files"]["summary.json"]
    (tmp_path / "study.jsonl.gz").write_bytes(gzip.compress("".join(json.dumps(line) + "\n" for line in lines).encode()))
    with pytest.raises(UserError, match="no finished run found"):
        gather([tmp_path / "study.jsonl.gz"])
