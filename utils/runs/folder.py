"""The folder of a run, `saves/<run>/`: what lies in it, and how it comes to be, whole and under a name of its own."""

import contextlib
import os
import shutil
import stat
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from utils.errors import UserError, printable, shown
from utils.files import TEMPORARY_PREFIX, current_umask, read_json, write_json

BEST, LAST, PREVIOUS, COMPACT = "model_best.pt", "model_last.pt", "model_previous.pt", "model_compact.pt"
AVERAGE, TRAINED = "model_average.pt", "model_trained.pt"  # with --ema, the one that is not shipped
CONFIG, GIVEN, METRICS, SUMMARY, LOCK, TENSORBOARD = "config.json", "config.toml", "metrics.jsonl", "summary.json", "lock", "log"
LEASE_PREFIX = "lease-"
KEPT_FILTERS, BEFORE_TRAINING, ARCHIVE = "kept_filters.json", "before_training.json", "model.huff"
LATENCY_TABLE, SENSITIVITY, HITS = "latency_table.json", "sensitivity.json", "hits.json"
RECONSTRUCTION = "reconstruction.json"
FILES = (BEST, LAST, PREVIOUS, COMPACT, AVERAGE, TRAINED, ARCHIVE, CONFIG, METRICS, SUMMARY, KEPT_FILTERS, BEFORE_TRAINING, LOCK)
FILES += (GIVEN, LATENCY_TABLE, SENSITIVITY, HITS, RECONSTRUCTION)
UNNAMED_PREFIX, DEAD_AFTER_SECONDS = f"{TEMPORARY_PREFIX}run-", 3600
NAME_BYTES = 200  # of the 255 that file systems allow; temporary names are longer
STAMP = "%Y-%m-%d %H:%M:%S"  # what every line of a text log begins with


def read_config(folder: str | os.PathLike, *, script: str) -> dict[str, Any]:
    """A run's config.json. Raises UserError unless `folder` holds a run of this entry script, in plain files."""
    folder = Path(folder)
    check_entries(folder)
    if not (folder / CONFIG).is_file():
        raise UserError(f"--resume {folder}: no {CONFIG} there, expected the folder of a run such as saves/1625594011")
    config = read_json(folder / CONFIG)
    if not isinstance(config, dict) or not isinstance(config.get("flags"), dict):
        raise UserError(f"--resume {folder}: its {CONFIG} is not that of a run")
    if config.get("script") != script:
        raise UserError(
            f"--resume {folder}: a run of {printable(str(config.get('script')))}, resume it with that script, not {script}"
        )
    return config


def is_unfinished(folder: Path) -> bool:
    """Whether this is the folder of a run that has begun and has not come to its end."""
    return (folder / CONFIG).exists() and not (folder / SUMMARY).exists()


def check_entries(folder: Path) -> None:
    """Raises UserError where a link, a pipe or a device stands in the place of what runs write; opens nothing.

    Somebody else may have made the folder, and through a link any file of its user would be emptied or replaced.
    """
    for name in (*FILES, TENSORBOARD):
        kind, expected = _kind(folder / name), "a folder" if name == TENSORBOARD else "a file"
        if kind not in (None, expected):
            raise UserError(f"--resume {folder}: {name} is {kind}, expected {expected}; a run writes into its own folder only")
    for lease in folder.glob(f"{LEASE_PREFIX}*"):
        if (kind := _kind(lease)) not in (None, "a file"):
            raise UserError(f"--resume {folder}: {printable(lease.name)} is {kind}, expected a file")
    for leftover in folder.glob(f"{TEMPORARY_PREFIX}*"):
        if _kind(leftover) == "a folder":
            raise UserError(f"--resume {folder}: {printable(leftover.name)} is a folder, no run makes one of that name")


def _kind(path: Path) -> str | None:
    """What stands at `path` itself, links not followed; None if nothing does."""
    try:
        mode = path.lstat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        return None
    kinds = ((stat.S_ISREG, "a file"), (stat.S_ISDIR, "a folder"), (stat.S_ISLNK, "a link"), (stat.S_ISFIFO, "a pipe"))
    return next((name for holds, name in kinds if holds(mode)), "a device or a socket")


def log_path(folder: Path, log_name: str) -> Path:
    """The text log of the run in `folder`: beside it, whatever `folder` is called from here, be it `.`."""
    return (folder if folder.name not in ("", "..") else Path(os.path.abspath(folder))).parent / log_name


def check_text_log(folder: str | os.PathLike, log_name: str) -> None:
    """Raises UserError unless the log that a resumed run's config.json names is a text log of runs beside its folder, or new."""
    origin = f"--resume {folder}: the text log that its {CONFIG} names, {shown(log_name)},"
    if not is_plain_name(log_name):
        raise UserError(f"{origin} must be a plain name: letters that can be printed, no folder, no dot at the beginning")
    path = log_path(Path(folder), log_name)
    kind = _kind(path)
    if kind is None:
        return
    if kind != "a file":
        raise UserError(f"{origin} is {kind} there, expected a file")
    if path.stat().st_nlink > 1:
        raise UserError(f"{origin} has another name too (a hard link), and what lies there would grow; put a copy in its place")
    with open(path, "rb") as file:
        first = file.read(len(time.strftime(STAMP))).decode(errors="replace")
    try:
        time.strptime(first, STAMP) if first else None
    except ValueError as error:
        raise UserError(f"{origin} is another file there: no line of it begins as those of a text log do") from error


def is_plain_name(name: str) -> bool:
    """Whether a run or a log may have this name: one that can be printed, in one folder, and is none of ours or hidden."""
    plain = Path(name).name == name and name.isprintable() and not name.startswith(".")
    return plain and 0 < len(os.fsencode(name)) <= NAME_BYTES


def check_save_dir(save_dir: str, *, name: str | None, log_name: str) -> None:
    """Raises UserError if a new run could not be written; writes nothing."""
    for flag, value in (("--run-name", name), ("--log-name", log_name)):
        if value is not None and not is_plain_name(value):
            rule = "letters that can be printed, no folder, no dot at the beginning"
            raise UserError(f"{flag} {shown(value)}: must be a plain name, it is created inside --save-dir: {rule}")
    folder = Path(save_dir)
    if name is not None and (folder / name).exists():
        raise UserError(f"--run-name {name}: {folder / name} exists; choose another name, or go on with --resume {folder / name}")
    existing = next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        raise UserError(f"--save-dir {save_dir}: {existing} is no folder that can be written")
    kind = _kind(folder / log_name)
    if kind == "a folder" or log_name == name:
        raise UserError(f"--log-name {log_name}: {folder / log_name} is a run's folder; choose another name")
    if kind not in (None, "a file"):
        raise UserError(f"--log-name {log_name}: {folder / log_name} is {kind}, expected a file; choose another name")


def new_folder(save_dir: Path, name: str | None, config: Mapping[str, Any]) -> Path:
    """A folder that appears under its name with its config.json inside: the renaming is what claims the name."""
    try:
        save_dir.mkdir(parents=True, exist_ok=True)
        _remove_dead_folders(save_dir)
        unnamed = Path(tempfile.mkdtemp(prefix=UNNAMED_PREFIX, dir=save_dir))
        try:
            unnamed.chmod(0o777 & ~current_umask())
            write_json(unnamed / CONFIG, config)
            return _claim_name(unnamed, save_dir, name)
        except BaseException:
            shutil.rmtree(unnamed, ignore_errors=True)
            raise
    except OSError as error:
        raise UserError(f"--save-dir {save_dir}: cannot be written: {error.strerror}") from error


def _remove_dead_folders(save_dir: Path) -> None:
    """Clears what runs that were killed while they made their folder left long ago; it takes milliseconds to make one."""
    for folder in save_dir.glob(f"{UNNAMED_PREFIX}*"):
        with contextlib.suppress(OSError):  # another run may have just cleared it
            if time.time() - folder.stat().st_mtime > DEAD_AFTER_SECONDS:
                shutil.rmtree(folder)


def _claim_name(unnamed: Path, save_dir: Path, name: str | None) -> Path:
    """Renames `unnamed` to `save_dir/name`, or to the first Unix time from now on that no other run has taken."""
    stamp = int(time.time())
    while True:
        folder = save_dir / (name or str(stamp))
        try:
            os.rename(unnamed, folder)
            return folder
        except OSError as error:
            if not folder.exists():
                raise
            if name is not None:
                raise UserError(f"--run-name {name}: {folder} exists; choose another, or --resume {folder}") from error
            stamp += 1
