"""The folder of a run, `saves/<run>/`: what lies in it, and how it comes to be, whole and under a name of its own."""

import contextlib
import os
import shutil
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from utils.errors import UserError
from utils.files import TEMPORARY_PREFIX, current_umask, read_json, write_json

BEST, LAST, PREVIOUS, COMPACT = "model_best.pt", "model_last.pt", "model_previous.pt", "model_compact.pt"
CONFIG, METRICS, SUMMARY, LOCK, TENSORBOARD = "config.json", "metrics.jsonl", "summary.json", "lock", "log"
KEPT_FILTERS, BEFORE_TRAINING, ARCHIVE = "kept_filters.json", "before_training.json", "model.huff"
UNNAMED_PREFIX, DEAD_AFTER_SECONDS = f"{TEMPORARY_PREFIX}run-", 3600
NAME_BYTES = 200  # of the 255 that file systems allow; temporary names are longer


def read_config(folder: str | os.PathLike, *, script: str) -> dict[str, Any]:
    """A run's config.json. Raises UserError unless `folder` holds a run of this entry script."""
    folder = Path(folder)
    if not (folder / CONFIG).is_file():
        raise UserError(f"--resume {folder}: no {CONFIG} there, expected the folder of a run such as saves/1625594011")
    config = read_json(folder / CONFIG)
    if not isinstance(config, dict) or not isinstance(config.get("flags"), dict):
        raise UserError(f"--resume {folder}: its {CONFIG} is not that of a run")
    if config.get("script") != script:
        raise UserError(f"--resume {folder}: a run of {config.get('script')}, resume it with that script, not {script}")
    return config


def check_save_dir(save_dir: str, *, name: str | None, log_name: str) -> None:
    """Raises UserError if a new run could not be written; writes nothing."""
    for flag, value in (("--run-name", name), ("--log-name", log_name)):
        if value is not None and (Path(value).name != value or value in ("", "..") or len(os.fsencode(value)) > NAME_BYTES):
            raise UserError(f"{flag} {value!r}: must be a plain name, it is created inside --save-dir")
    folder = Path(save_dir)
    if name is not None and (folder / name).exists():
        raise UserError(f"--run-name {name}: {folder / name} exists; choose another name, or go on with --resume {folder / name}")
    existing = next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        raise UserError(f"--save-dir {save_dir}: {existing} is no folder that can be written")
    if (folder / log_name).is_dir() or log_name == name:
        raise UserError(f"--log-name {log_name}: {folder / log_name} is a run's folder; choose another name")


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
