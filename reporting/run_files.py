"""The small files of runs that a report reads, from the runs' folders or from a study: one file that holds those of many runs.

A study is JSON lines, compressed by gzip, as `report.py --collect NAME.jsonl.gz` writes it. Each line is a run, with the content
of its files: `{"run": NAME, "files": {"config.json": {...}, "metrics.jsonl": [...]}}`.
"""

import gzip
import json
import os
import zlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

from utils.errors import UserError, naming, printable, shown
from utils.files import read_json, write_atomic
from utils.runs.folder import CONFIG, HITS, KEPT_FILTERS, METRICS, SUMMARY
from utils.runs.metrics_file import check_record, read_metrics
from utils.untrusted import MAX_TEXT_BYTES, json_objects, open_regular, parse_json, read_whole

SUFFIX = ".jsonl.gz"
COLLECTED = (CONFIG, SUMMARY, METRICS, KEPT_FILTERS, HITS)
MAX_RUN_BYTES, MAX_STUDY_BYTES = 10_000_000, 200_000_000  # of what a study says is small
MAX_RUNS, MAX_STUDY_OBJECTS = 100_000, 4_000_000


class RunFiles(Protocol):
    """One run, by `place`: its folder, or the study and its name there."""

    place: Path

    def has(self, name: str) -> bool:
        """Whether there is a file of this name."""

    def read(self, name: str) -> Any:
        """A JSON file. Raises UserError if it is missing or damaged."""

    def content(self, name: str) -> bytes:
        """A file as it is in the folder of a run."""

    def metrics(self) -> list[dict[str, Any]]:
        """The records of metrics.jsonl; none where there is no such file. Raises UserError for a damaged one."""

    def origins(self, folder: Path) -> Iterator["RunFiles"]:
        """Other runs that may be the one which `folder`, as a flag of this run says it, stands for."""


class FolderFiles:
    """A run in the folder where it was made."""

    def __init__(self, place: Path):
        self.place = place

    def has(self, name: str) -> bool:
        return os.path.lexists(self.place / name)

    def read(self, name: str) -> Any:
        return read_json(self.place / name)

    def content(self, name: str) -> bytes:
        return read_whole(self.place / name, limit=MAX_TEXT_BYTES)

    def metrics(self) -> list[dict[str, Any]]:
        if self.has(METRICS):
            with naming(METRICS), open_regular(self.place / METRICS):
                pass
        return read_metrics(self.place)

    def origins(self, folder: Path) -> Iterator[RunFiles]:
        for origin in (self.place.parent / folder.name, folder):
            if origin != self.place and (origin / CONFIG).is_file():
                yield FolderFiles(origin)


class StudyFiles:
    """A run of a study, whose runs are `siblings` by name."""

    def __init__(self, place: Path, files: Mapping[str, Any], siblings: Mapping[str, "StudyFiles"]):
        self.place, self.files, self.siblings = place, files, siblings

    def has(self, name: str) -> bool:
        return name in self.files

    def read(self, name: str) -> Any:
        if name not in self.files:
            raise UserError(f"{self.place}: has no {name}")
        return self.files[name]

    def content(self, name: str) -> bytes:
        lines = self.metrics() if name == METRICS else [self.read(name)]
        return "".join(json.dumps(line, indent=None if name == METRICS else 2) + "\n" for line in lines).encode()

    def metrics(self) -> list[dict[str, Any]]:
        records = self.files.get(METRICS, [])
        if not isinstance(records, list):
            raise UserError(f"{METRICS} is damaged: no list of records")
        with naming(f"{METRICS} is damaged"):
            for record in records:
                try:
                    check_record(record)
                except ValueError as error:
                    raise UserError(str(error)) from error
        return records

    def origins(self, folder: Path) -> Iterator[RunFiles]:
        origin = self.siblings.get(folder.name)
        if origin is not None and origin is not self:
            yield origin


def is_study(path: Path) -> bool:
    return path.name.endswith(SUFFIX) and not path.is_dir()


def read_study(path: Path) -> list[StudyFiles]:
    """The runs of a study, in their order. Raises UserError for a file that is none, or that is far larger than it looks."""
    runs: dict[str, StudyFiles] = {}
    try:
        with open_regular(path) as file, gzip.open(file) as lines:
            for number, line in enumerate(_lines(lines), start=1):
                name, files = _run(line, number)
                if name in runs or len(runs) == MAX_RUNS:
                    raise UserError(f"is damaged in line {number}: a second run {shown(name)}, or too many")
                runs[name] = StudyFiles(path / name, files, runs)
    except UserError as error:
        raise UserError(f"{path} {error}") from error
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path} is damaged, or no study: {printable(str(error))}") from error
    return list(runs.values())


def _lines(file: gzip.GzipFile) -> Iterator[bytes]:
    total = objects = 0
    while line := file.readline(MAX_RUN_BYTES):
        total, objects = total + len(line), objects + json_objects(line)
        if not line.endswith(b"\n") or total > MAX_STUDY_BYTES or objects > MAX_STUDY_OBJECTS:
            raise UserError("is refused: cut off, or larger than any study is")
        yield line


def _run(line: bytes, number: int) -> tuple[str, dict[str, Any]]:
    try:
        run = parse_json(line)
        name, files = run["run"], run["files"]
        if not isinstance(name, str) or not isinstance(files, dict) or not _is_name(name):
            raise ValueError("no run")
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f"is damaged in line {number}: not that of a run ({type(error).__name__})") from error
    return name, files


def _is_name(name: str) -> bool:
    """Whether a folder could be called so, wherever it is unpacked."""
    return name not in ("", ".", "..") and name.isprintable() and Path(name).name == name


def write_study(path: Path, runs: Iterable[RunFiles]) -> None:
    """Puts what a report reads of the runs, whose names differ, into one file; the same runs give the same bytes."""
    lines = []
    for run in runs:
        files = {name: run.metrics() if name == METRICS else run.read(name) for name in COLLECTED if run.has(name)}
        lines.append(json.dumps({"run": run.place.name, "files": files}, separators=(",", ":")) + "\n")
    write_atomic(path, gzip.compress("".join(lines).encode(), mtime=0))
