"""Runs on disk to records, and records to groups: everything that a report says is counted here.

Of a run only its small files are read, from its folder or from a study (`reporting.run_files`). Runs with the same
settings form a group; a setting is every flag but the seed and those of where a run computes, reads, writes and saves. A
flag that names a checkpoint counts as the settings of the run that wrote it, where that run's config.json is found beside
this one or where the flag says; otherwise as its own text, in which the run's seed does not count.
"""

import contextlib
import json
import os
import re
import statistics
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

from reporting.measures import measures_of
from reporting.naming import ORIGIN_FLAGS, flag_label, method_label, model_label
from reporting.run_files import FolderFiles, RunFiles, is_study, read_study
from reporting.settings import check_flags
from utils.errors import UserError, naming, printable, shown
from utils.runs.folder import CONFIG, HITS, KEPT_FILTERS, METRICS, SUMMARY
from utils.training.hits import TestHits, read_hits

UNPRUNED_SCRIPT = "initial_train.py"
PLACE_FLAGS = frozenset(
    ("seed", "run_name", "save_dir", "log_name", "data_dir", "device", "dev_idx", "workers", "evaluate", "budget_table")
)
STATE_FLAGS = frozenset(("checkpoint_interval", "checkpoint_minutes", "force"))
SCRIPT_ORDER = (UNPRUNED_SCRIPT, "pruning.py", "quantize_encode.py")
SWITCHED_OFF = ("false", "null", "[]")
MEASURED_TIMES = ("latency_ms", "speedup", "minutes")  # mean little over different machines
MAX_LAYERS, MAX_COUNT = 500, 10**9  # of a run that a report can show
NAME_LENGTH, TEXT_LENGTH = 80, 4000  # characters that are shown of a name and of a command
ORIGIN_DEPTH = 4  # files from files: a quantized from a pruned from a trained network, and one to spare


class Statistic(NamedTuple):
    """Mean and sample standard deviation, which a single value has not got."""

    mean: float
    deviation: float | None
    n: int


class Skipped(NamedTuple):
    """A folder that no figure comes from, and why."""

    folder: Path
    reason: str

    def __str__(self) -> str:
        """One line that can be written anywhere."""
        return printable(f"{self.folder}: {self.reason}", TEXT_LENGTH)


@dataclass(frozen=True)
class Record:
    """One finished run. `curve` is top-1 accuracy on the test set, in percent, by epoch; `hits` are those of the last one."""

    files: RunFiles
    label: str
    settings: dict[str, Any]
    circumstances: dict[str, str]
    dataset: str
    model: str
    seed: int
    command: str
    measures: dict[str, float]
    curve: dict[int, float]
    kept: dict[str, int]
    filters: dict[str, int]
    hits: TestHits | None = None
    tested_on: str = ""  # where not all test images were shown: "48 of 360 test images"

    @property
    def folder(self) -> Path:
        """The run's folder, or the study and its name there."""
        return self.files.place

    @property
    def script(self) -> str:
        return self.settings["script"]


@dataclass(frozen=True)
class Group:
    """The runs of one method: the same settings, different seeds. `differs_in` tells it from groups of the same label.

    `mixed` holds the circumstances that its runs do not have in common, with the values of each.
    """

    label: str
    records: tuple[Record, ...]
    differs_in: tuple[str, ...] = ()
    mixed: dict[str, tuple[str, ...]] = field(default_factory=dict)
    inherited: dict[str, float] = field(default_factory=dict)

    @property
    def first(self) -> Record:
        return self.records[0]

    @property
    def name(self) -> str:
        """The label, made unique."""
        return f"{self.label} [{', '.join(self.differs_in)}]" if self.differs_in else self.label

    @property
    def subject(self) -> tuple[str, str]:
        """Dataset and network: only within one subject are methods compared."""
        return self.first.dataset, self.first.model

    @property
    def accuracies(self) -> list[float]:
        """Top-1 after the last epoch of each run, in percent."""
        return [record.measures["last_top1"] for record in self.records]

    def statistic(self, measure: str) -> Statistic | None:
        """Over the group's runs; None unless every one of them has the measure, times also on the same kind of machine."""
        values = [record.measures.get(measure, self.inherited.get(measure)) for record in self.records]
        mixed_machines = measure in MEASURED_TIMES and len({record.circumstances["device"] for record in self.records}) > 1
        return None if None in values or mixed_machines else statistic(values)


class Results(NamedTuple):
    """What a report is made from."""

    groups: list[Group]
    skipped: list[Skipped]


def by_subject(groups: Iterable[Group]) -> dict[tuple[str, str], list[Group]]:
    """Groups by dataset and network."""
    subjects: dict[tuple[str, str], list[Group]] = {}
    for group in groups:
        subjects.setdefault(group.subject, []).append(group)
    return subjects


def statistic(values: Sequence[float]) -> Statistic:
    """Mean and sample standard deviation (n - 1 in the denominator) of one value or more."""
    return Statistic(statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None, len(values))


def gather(paths: Iterable[str | os.PathLike], *, skip_missing: bool = False) -> Results:
    """Reads every run in `paths`, each a run's folder, a folder of runs, or a study.

    Folders that are unfinished, damaged, or no run are skipped by name, with `skip_missing` also those that are not there. Raises
    UserError for a path that does not exist otherwise, and if no finished run is found at all.
    """
    paths, skipped = [Path(path) for path in paths], []
    if skip_missing:
        skipped = [Skipped(path, "has not begun") for path in paths if not os.path.lexists(path)]
        paths = [path for path in paths if os.path.lexists(path)]
    reader, records = _Reader(), []
    for place, files in {files.place: files for path in paths for files in _runs(path)}.items():
        try:
            records.append(reader.record(files))
        except UserError as error:
            skipped.append(Skipped(place, str(error)))
    if not records:
        reasons = "; ".join(f"{folder}: {reason}" for folder, reason in skipped[:3]) or "there is no folder in it"
        raise UserError(f"{' '.join(map(str, paths)) or 'runs'}: no finished run found ({reasons}); train one first")
    groups, repeated = _group(records)
    return Results(_with_dense_sizes(groups), skipped + repeated)


class ListedRun(NamedTuple):
    """A run that need not be finished, as far as its small files tell; `top1` is that of the last epoch so far."""

    network: str
    method: str
    top1: float | None
    epochs: int
    n_epochs: str


def listed(files: RunFiles) -> ListedRun:
    """What a list says of a run. Raises UserError for one that is damaged."""
    return _Reader().listed(files)


def _runs(path: Path) -> Sequence[RunFiles]:
    return read_study(path) if path.exists() and is_study(path) else [FolderFiles(folder) for folder in _run_folders(path)]


def _run_folders(path: Path) -> list[Path]:
    try:
        if not path.exists():
            raise UserError(f"{path}: no such folder; expected a run such as saves/1625594011, or a folder of runs")
        if not path.is_dir():
            return []  # a text log beside the runs, caught by saves/*
        children = [] if (path / CONFIG).is_file() else sorted(child for child in path.iterdir() if child.is_dir())
        return children if any((child / CONFIG).is_file() for child in children) else [path]
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from error


class _Reader:
    """Reads runs; each config.json once, though many runs come from one teacher."""

    def __init__(self) -> None:
        self._configs: dict[Path, dict[str, Any]] = {}

    def record(self, files: RunFiles) -> Record:
        """Raises UserError, saying why, for anything but a finished, whole run."""
        try:
            if not files.has(CONFIG):
                raise UserError(f"no run, it has no {CONFIG}")
            config = self._config(files)
            if files.has(SUMMARY):
                return self._read(files, config, _clean(files.read(SUMMARY)))
            raise UserError(f"unfinished, {_progress(files, config['flags'])}")
        except UserError:
            raise
        except OSError as error:
            raise UserError(f"cannot be read: {error.strerror}") from error
        except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError, RecursionError) as error:
            raise UserError(f"damaged, not what a run writes ({type(error).__name__}: {printable(str(error))})") from error

    def listed(self, files: RunFiles) -> ListedRun:
        """Raises UserError for a run whose files are not those of a run."""
        try:
            config = self._config(files)
            flags, summary = config["flags"], _clean(files.read(SUMMARY)) if files.has(SUMMARY) else {}
            curve = {_count(line["epoch"], "an epoch"): line["top1"] for line in files.metrics() if line["split"] == "test"}
            settings = self._settings(files, config, seed=_text(flags.get("seed")), depth=ORIGIN_DEPTH)
            top1 = _accuracy(curve[max(curve)]) if curve else None
            return ListedRun(
                model_label(_model(flags, summary)), method_label(settings), top1, len(curve), _text(flags.get("n_epochs"))
            )
        except UserError:
            raise
        except (OSError, LookupError, TypeError, ValueError, AttributeError, ArithmeticError, RecursionError) as error:
            raise UserError(f"damaged, not what a run writes ({type(error).__name__}: {printable(str(error))})") from error

    def _config(self, files: RunFiles) -> dict[str, Any]:
        if files.place not in self._configs:
            config = _clean(files.read(CONFIG))
            if not isinstance(config, dict) or not isinstance(config.get("flags"), dict) or "script" not in config:
                raise UserError(f"{files.place / CONFIG} is damaged: not that of a run")
            with naming(f"{files.place / CONFIG} is damaged"):
                check_flags(config["flags"])
            self._configs[files.place] = config
        return self._configs[files.place]

    def _read(self, files: RunFiles, config: dict[str, Any], summary: dict[str, Any]) -> Record:
        flags = config["flags"]
        settings = self._settings(files, config, seed=str(flags["seed"]), depth=ORIGIN_DEPTH)
        layers = _clean(files.read(KEPT_FILTERS)) if files.has(KEPT_FILTERS) else {}
        return Record(
            files=files,
            label=method_label(settings),
            settings=settings,
            circumstances={
                "device": _text(config.get("device")),
                "torch": _text(config.get("versions", {}).get("torch")),
                "commit": re.sub(r"^(\w{7})\w+", r"\1", _text(config.get("git_sha"))),
            },
            dataset=_dataset_name(flags),
            model=_model(flags, summary),
            seed=flags["seed"],
            command=_text(config.get("command", ""), TEXT_LENGTH),
            measures=measures_of(summary),
            curve={
                _count(line["epoch"], "an epoch"): _accuracy(line["top1"]) for line in files.metrics() if line["split"] == "test"
            },
            kept=_counts(summary.get("kept_filters", {})),
            filters=_counts({name: layer["filters"] for name, layer in layers.items()}),
            hits=_last_hits(files, summary),
            tested_on=_tested_on(summary.get("test_images")),
        )

    def _settings(self, files: RunFiles, config: dict[str, Any], *, seed: str, depth: int) -> dict[str, Any]:
        """Flat: `n_epochs` is this run's, `t_path n_epochs` that of the run that trained the teacher."""
        settings = {"script": _text(config["script"]), "processes": config.get("processes", 1)}
        settings["dataset"] = _dataset_name(config["flags"])
        for name, value in config["flags"].items():
            if name in ORIGIN_FLAGS and value is not None:
                settings |= self._origin(files, name, str(value), seed=seed, depth=depth)
            elif name not in PLACE_FLAGS | STATE_FLAGS | settings.keys():
                settings[name] = value
        return settings

    def _origin(self, files: RunFiles, flag: str, value: str, *, seed: str, depth: int) -> dict[str, Any]:
        for origin in files.origins(Path(value).parent):
            if depth:
                with contextlib.suppress(UserError):  # of a damaged config.json only the name of its folder counts
                    found = self._settings(origin, self._config(origin), seed=seed, depth=depth - 1)
                    return {f"{flag} {name}": setting for name, setting in found.items()}
        return {flag: re.sub(rf"(?<!\d){re.escape(seed)}(?!\d)", "*", value)}


def _clean(value: Any) -> Any:
    """What a JSON file holds, with texts that can be written anywhere: others may have put anything into it."""
    if isinstance(value, dict):
        return {printable(name, NAME_LENGTH): _clean(inner) for name, inner in value.items()}
    if isinstance(value, list):
        return [_clean(inner) for inner in value]
    return printable(value, TEXT_LENGTH) if isinstance(value, str) else value


def _text(value: Any, length: int = NAME_LENGTH) -> str:
    return printable(str(value), length)


def _model(flags: Mapping[str, Any], summary: Mapping[str, Any]) -> str:
    return _text(summary.get("model") or flags.get("s_model") or flags.get("t_model") or flags.get("model") or "?")


def _dataset_name(flags: Mapping[str, Any]) -> str:
    """Of `--dataset folder` the name of its folder."""
    name = _text(flags["dataset"])
    return _text(Path(flags["data_dir"]).name or name) if name == "folder" else name


def _last_hits(files: RunFiles, summary: Mapping[str, Any]) -> TestHits | None:
    """Those of the last epoch; None for a run of an older version, or where they are of an epoch before the last."""
    document = files.read(HITS) if files.has(HITS) else None
    if not isinstance(document, dict) or document.get("epoch") != summary["last"].get("epoch"):
        return None
    return read_hits(document)


def _accuracy(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 100:
        raise UserError(f"{METRICS} is damaged: top1 {shown(value)}")
    return float(value)


def _counts(counts: Mapping[str, Any]) -> dict[str, int]:
    if len(counts) > MAX_LAYERS:
        raise UserError(f"damaged, it lists {len(counts)} layers, more than {MAX_LAYERS}")
    return {name: _count(count, "filters of a layer") for name, count in counts.items()}


def _count(value: Any, what: str) -> int:
    if type(value) is not int or not 0 <= value < MAX_COUNT:
        raise UserError(f"damaged, {what}: {shown(value)} is no whole number below {MAX_COUNT:,}")
    return value


def _progress(files: RunFiles, flags: Mapping[str, Any]) -> str:
    epochs = {_count(line["epoch"], "an epoch") for line in files.metrics() if isinstance(line, dict) and "epoch" in line}
    return f"{len(epochs)} of {_text(flags.get('n_epochs', '?'))} epochs are done"


def _tested_on(shown: Any) -> str:
    if shown is None:
        return ""
    return f"{_count(shown['shown'], 'a number of images')} of {_count(shown['all'], 'a number of images')} test images"


def _group(records: Sequence[Record]) -> tuple[list[Group], list[Skipped]]:
    """Groups in the order of a table; of runs with the same settings and seed the last one counts."""
    by_settings: dict[str, dict[int, Record]] = {}
    repeated = []
    for record in records:
        seeds = by_settings.setdefault(_json(record.settings), {})
        if record.seed in seeds:
            repeated.append(Skipped(seeds[record.seed].folder, f"the same settings and seed as {record.folder}, which counts"))
        seeds[record.seed] = record
    groups = [Group(seeds[min(seeds)].label, tuple(seeds[seed] for seed in sorted(seeds))) for seeds in by_settings.values()]
    return sorted(_told_apart(groups), key=_order), repeated


def _json(value: Any) -> str:
    return json.dumps(value, sort_keys=True)


def _order(group: Group) -> tuple[Any, ...]:
    script = group.first.script
    words = re.split(r"([0-9]+(?:\.[0-9]+)?)", group.name)  # every second one is a number
    words_and_numbers = [float(word) if index % 2 else word for index, word in enumerate(words)]
    return *group.subject, SCRIPT_ORDER.index(script) if script in SCRIPT_ORDER else len(SCRIPT_ORDER), words_and_numbers


def _told_apart(groups: Sequence[Group]) -> Iterator[Group]:
    """The groups with what they differ in where their labels are the same, and with the circumstances that differ within."""
    namesakes: dict[tuple[str, ...], list[Group]] = {}
    for group in groups:
        namesakes.setdefault((*group.subject, group.label), []).append(group)
    for alike in namesakes.values():
        usual = _usual_settings([record.settings for group in alike for record in group.records])
        for group in alike:
            unusual = [(name, value) for name, value in group.first.settings.items() if (name, _json(value)) not in usual]
            missing = [(name, None) for name in dict(usual) if name not in group.first.settings]
            shown = tuple(flag_label(name, value) for name, value in unusual + missing)
            yield replace(group, differs_in=shown, mixed=_mixed(group))


def _usual_settings(settings: Sequence[Mapping[str, Any]]) -> set[tuple[str, str]]:
    """The commonest value of each setting, as JSON; of equally common ones the one that switches nothing on."""
    counts = Counter((name, _json(value)) for each in settings for name, value in each.items())
    usual: dict[str, str] = {}
    for name, value in sorted(counts, key=lambda item: (-counts[item], item[1] not in SWITCHED_OFF, item)):
        usual.setdefault(name, value)
    return set(usual.items())


def _mixed(group: Group) -> dict[str, tuple[str, ...]]:
    values = {name: sorted({record.circumstances[name] for record in group.records}) for name in group.first.circumstances}
    return {name: tuple(found) for name, found in values.items() if len(found) > 1}


def _with_dense_sizes(groups: Sequence[Group]) -> list[Group]:
    """Gives unpruned networks the sizes that the pruning of the same network on the same dataset measured for them."""
    sizes: dict[tuple[str, str], dict[str, float]] = {}
    for group in groups:
        measures = group.first.measures
        if {"dense_macs", "dense_bytes"} <= measures.keys():
            sizes[group.subject] = {"macs": measures["dense_macs"], "dense_bytes": measures["dense_bytes"]}
    return [
        replace(group, inherited=sizes.get(group.subject, {})) if group.first.script == UNPRUNED_SCRIPT else group
        for group in groups
    ]
