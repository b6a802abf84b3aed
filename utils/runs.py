"""One training run on disk: `saves/<run>/` with its checkpoints, metrics and logs, and the text log that runs share.

Only the main process of a distributed run writes; the others hold a `Run` that stays silent.
"""

import contextlib
import errno
import fcntl
import json
import os
import platform
import shlex
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import torch
import torchvision

from utils.distributed import World, same_everywhere
from utils.errors import UserError
from utils.files import (
    TEMPORARY_PREFIX,
    append_line,
    current_umask,
    load_checkpoint,
    read_json,
    remove_partial_files,
    save_checkpoint,
    write_atomic,
    write_json,
)
from utils.tensorboard import ScalarWriter

BEST, LAST, PREVIOUS, COMPACT = "model_best.pt", "model_last.pt", "model_previous.pt", "model_compact.pt"
CONFIG, METRICS, SUMMARY, LOCK, TENSORBOARD = "config.json", "metrics.jsonl", "summary.json", "lock", "log"
BEFORE_TRAINING = "before_training.json"
# where a run is computed, not what is computed: may differ when it is resumed
PLACEMENT_FLAGS = frozenset(("resume", "dry_run", "data_dir", "device", "dev_idx", "workers"))
STATE_KEYS = frozenset(("epoch", "batch", "best", "last", "sums", "objective", "optimizer", "hooks", "random"))
UNNAMED_PREFIX, DEAD_AFTER_SECONDS = f"{TEMPORARY_PREFIX}run-", 3600
NAME_BYTES = 200  # of the 255 that file systems allow; temporary names are longer
REPOSITORY = Path(__file__).resolve().parent.parent


class Run:
    """The folder of one run, locked while this process lives.

    `Run.create` makes a new folder, `Run.reopen` goes on with an old one after its metrics were cut back to the epochs
    that its state knows.
    """

    def __init__(self, folder: Path, *, log_path: Path, world: World):
        self.folder, self.log_path, self.world = folder, log_path, world
        self._lock: TextIO | None = None
        self._writer: ScalarWriter | None = None
        self._last_is_whole = False

    @classmethod
    def create(
        cls, save_dir: str | os.PathLike, *, name: str | None, log_name: str, config: Mapping[str, Any], world: World
    ) -> "Run":
        """Makes `save_dir/name`, or a folder named by the Unix time, with config.json in it from its first moment.

        Raises UserError if the name is taken or the folder cannot be written.
        """
        folder = _new_folder(Path(save_dir), name, {**config, **_environment()}) if world.is_main else None
        run = cls(Path(same_everywhere([folder])[0]), log_path=Path(save_dir) / log_name, world=world)
        run._open(epochs=0)
        return run

    @classmethod
    def reopen(cls, folder: str | os.PathLike, *, log_name: str, world: World, epochs: int) -> "Run":
        """Goes on with a run of which `epochs` epochs are done. Raises UserError if another process still runs it."""
        run = cls(Path(folder), log_path=Path(folder).parent / log_name, world=world)
        run._open(epochs=epochs)
        return run

    def _open(self, *, epochs: int) -> None:
        if self.world.is_main:
            self._acquire_lock()
            remove_partial_files(self.folder)
            self._rewind(epochs)

    def _acquire_lock(self) -> None:
        """The lock is this process's alone: it ends with it, even where its DataLoader workers live on for a while."""
        try:
            self._lock = open(self.folder / LOCK, "w")  # noqa: SIM115, held open as long as the run
            fcntl.lockf(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN) and self._lock is not None:
                raise UserError(f"--resume {self.folder}: this run is still alive in another process") from error
            raise UserError(f"cannot lock {self.folder / LOCK}: {error.strerror}") from error

    def _rewind(self, epochs: int) -> None:
        """Drops what was recorded after the saved state, then writes TensorBoard's files anew from what is left."""
        lines = [line for line in read_metrics(self.folder) if line["epoch"] < epochs]
        write_atomic(self.folder / METRICS, "".join(json.dumps(line) + "\n" for line in lines).encode())
        shutil.rmtree(self.folder / TENSORBOARD, ignore_errors=True)
        self._writer = ScalarWriter(self.folder / TENSORBOARD)
        for line in lines:
            self._plot(line)

    def log(self, message: str) -> None:
        """Prints a message and adds it, with the time and the run's name, to the shared text log."""
        if self.world.is_main:
            print(message, flush=True)
            stamp = time.strftime("%Y-%m-%d %H:%M:%S")
            for line in message.splitlines():
                append_line(self.log_path, f"{stamp} {self.folder.name} {line}")

    def warn(self, message: str) -> None:
        self.log(f"WARNING: {message}")

    def record(self, line: Mapping[str, Any]) -> None:
        """Adds one line to metrics.jsonl and its numbers to TensorBoard; `line` has `epoch` and `split`."""
        if self.world.is_main:
            append_line(self.folder / METRICS, json.dumps(line), durable=True)
            self._plot(line)

    def _plot(self, line: Mapping[str, Any]) -> None:
        values = {f"{line['split']}/{name}": value for name, value in line.items() if name not in ("epoch", "split")}
        self._writer.add(values, step=line["epoch"])

    def save(self, name: str, checkpoint: Mapping[str, Any]) -> None:
        """Writes a checkpoint into the run's folder; the last one is kept beside its successor."""
        if self.world.is_main:
            if name == LAST:
                self._keep_previous()
            save_checkpoint(self.folder / name, checkpoint)
            self._last_is_whole |= name == LAST

    def _keep_previous(self) -> None:
        """A second name for the last state; unlike a rename this leaves no moment without a model_last.pt.

        A damaged last state, from which this run fell back, must not take the place of the good one before it.
        """
        last, previous = self.folder / LAST, self.folder / PREVIOUS
        if not last.exists() or not (self._last_is_whole or _is_state(last)):
            return
        spare = self.folder / f"{TEMPORARY_PREFIX}{PREVIOUS}"
        spare.unlink(missing_ok=True)
        try:
            os.link(last, spare)
            os.replace(spare, previous)
            spare.unlink(missing_ok=True)  # renaming does nothing where both are already names of one file
        except OSError:  # a file system without hard links; if it is full or read-only, this says so
            write_atomic(previous, last.read_bytes())

    def save_json(self, name: str, value: Any) -> None:
        if self.world.is_main:
            write_json(self.folder / name, value)

    def resume_command(self) -> str:
        """What goes on with this run, for a shell."""
        launcher = ["python3"] if self.world.size == 1 else ["torchrun", f"--nproc_per_node={self.world.size}"]
        return shlex.join([*launcher, sys.argv[0], "--resume", str(self.folder)])

    def seconds(self) -> float:
        """Wall time of all epochs so far, over every process that worked on this run in turn."""
        return sum(line["seconds"] for line in read_metrics(self.folder))

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()
        if self._lock is not None:
            self._lock.close()


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """The whole lines of a run's metrics.jsonl; a last line that was cut off by a crash is passed over."""
    path = folder / METRICS
    lines = path.read_bytes().split(b"\n") if path.exists() else []
    records = []
    for line in lines:
        with contextlib.suppress(ValueError):
            records.append(json.loads(line))
    return records


def read_state(folder: str | os.PathLike) -> tuple[dict[str, Any] | None, str | None]:
    """The newest resumable checkpoint of a run, and a sentence to log if it is not model_last.pt.

    None for a run that ended before it saved any state. Raises UserError if no saved state is whole.
    """
    folder = Path(folder)
    states = [path for path in (folder / LAST, folder / PREVIOUS) if path.exists()]
    problems: list[str] = []
    for path in states:
        try:
            state = load_checkpoint(path, flag="--resume")
        except UserError as error:
            problems.append(str(error))
            continue
        if _is_training_state(state):
            fallback = f"{problems[0]}; going on from the state before it, {path.name}" if problems else None
            return state, fallback
        problems.append(f"--resume {path}: holds a network, but no state of a training")
    if problems:
        raise UserError("; ".join(problems))
    return None, None


def _is_state(path: Path) -> bool:
    try:
        return _is_training_state(load_checkpoint(path))
    except UserError:
        return False


def _is_training_state(checkpoint: Mapping[str, Any]) -> bool:
    state = checkpoint.get("resume")
    return isinstance(state, dict) and state.keys() >= STATE_KEYS


def check_state(
    checkpoint: Mapping[str, Any], flags: Mapping[str, Any], *, defaults: Mapping[str, Any], folder: str | os.PathLike
) -> None:
    """Raises UserError if the state saved in a run's folder is that of a run with other flags.

    A flag that the state does not know, since an older version wrote it, had the value that `defaults` gives.
    """
    config = checkpoint.get("config") or {}
    for name in flags.keys() - PLACEMENT_FLAGS - {"n_epochs"}:
        saved = config.get(name)
        if saved is None or saved is False:
            saved = defaults.get(name)
        if saved != flags[name]:
            raise UserError(f"--resume {folder}: its saved state is of a run with {name} {saved}, {CONFIG} says {flags[name]}")


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


def _new_folder(save_dir: Path, name: str | None, config: Mapping[str, Any]) -> Path:
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


def _environment() -> dict[str, Any]:
    return {
        "command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "git_sha": git_sha(),
        "host": socket.gethostname(),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "torchvision": torchvision.__version__,
            "numpy": np.__version__,
        },
    }


def git_sha() -> str | None:
    """The commit of this repository, with `+` behind it if tracked files were changed; None outside a checkout."""
    commands = (["rev-parse", "HEAD"], ["status", "--porcelain", "--untracked-files=no"])
    try:
        head, changes = (
            subprocess.run(["git", "-C", str(REPOSITORY), *command], capture_output=True, text=True, check=True).stdout.strip()
            for command in commands
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return head + ("+" if changes else "")
