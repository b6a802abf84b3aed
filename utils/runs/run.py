"""One training run on disk: `saves/<run>/` with its checkpoints, metrics and logs, and the text log that runs share.

Only the main process of a distributed run writes; the others hold a `Run` that stays silent.
"""

import itertools
import json
import os
import shlex
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from utils.checkpoints import save_checkpoint
from utils.distributed import same_everywhere
from utils.files import TEMPORARY_PREFIX, append_line, remove_partial_files, write_atomic, write_json
from utils.python_file import code_in
from utils.runs.environment import describe_environment
from utils.runs.folder import LAST, METRICS, PREVIOUS, STAMP, SUMMARY, TENSORBOARD, check_entries, log_path, new_folder
from utils.runs.lease import Lease
from utils.runs.metrics_file import known_metrics, read_metrics
from utils.runs.state import is_state
from utils.runs.tensorboard import ScalarWriter
from utils.streams import print_error, take_losses
from utils.world import World


class Run:
    """The folder of one run, which no other process works on while this one lives (`utils.runs.lease`).

    `Run.create` makes a new folder, `Run.reopen` goes on with an old one after its metrics were cut back to the epochs
    that its state knows.
    """

    def __init__(self, folder: Path, *, log_path: Path, world: World):
        self.folder, self.log_path, self.world = folder, log_path, world
        self._lease: Lease | None = None
        self._writer: ScalarWriter | None = None
        self._last_is_whole = False

    @classmethod
    def create(
        cls, save_dir: str | os.PathLike, *, name: str | None, log_name: str, config: Mapping[str, Any], world: World
    ) -> "Run":
        """Makes `save_dir/name`, or a folder named by the Unix time, with config.json in it from its first moment.

        Raises UserError if the name is taken or the folder cannot be written.
        """
        folder = new_folder(Path(save_dir), name, {**config, **describe_environment()}) if world.is_main else None
        run = cls(Path(same_everywhere([folder])[0]), log_path=Path(save_dir) / log_name, world=world)
        run._open(Lease.take(run.folder) if world.is_main else None, epochs=0)
        return run

    @classmethod
    def reopen(cls, folder: str | os.PathLike, *, log_name: str, world: World, epochs: int, lease: Lease | None = None) -> "Run":
        """Goes on with a run of which `epochs` epochs are done.

        What says so was read under the `lease` of the main process; without one it is taken here. Raises UserError if another
        process still runs it.
        """
        run = cls(Path(folder), log_path=log_path(Path(folder), log_name), world=world)
        if world.is_main:
            check_entries(run.folder)
            known_metrics(run.folder, epochs=epochs)  # before anything is written
            lease = lease or Lease.take(run.folder)
        run._open(lease, epochs=epochs)
        return run

    def _open(self, lease: Lease | None, *, epochs: int) -> None:
        self._lease = lease
        if lease is not None:
            remove_partial_files(self.folder)
            self._rewind(epochs)

    def _rewind(self, epochs: int) -> None:
        """Drops what was recorded after the saved state, then writes TensorBoard's files anew from what is left.

        A summary goes first: it would say that the run is complete, which one whose epochs were raised is not any more.
        """
        (self.folder / SUMMARY).unlink(missing_ok=True)
        lines = known_metrics(self.folder, epochs=epochs)
        write_atomic(self.folder / METRICS, "".join(json.dumps(line) + "\n" for line in lines).encode())
        shutil.rmtree(self.folder / TENSORBOARD, ignore_errors=True)
        self._writer = ScalarWriter(self.folder / TENSORBOARD)
        for line in lines:
            self._plot(line)

    def log(self, message: str) -> None:
        """Prints a message and adds it to the shared text log."""
        if self.world.is_main:
            print(message, flush=True)
            self.note(message)
            for stream, loss in take_losses().items():
                lost = f"WARNING: {stream} cannot be written ({loss.strerror}); the run goes on, {self.log_path} has its messages"
                self.note(lost)
                print_error(lost)

    def note(self, message: str) -> None:
        """Adds a message, with the time and the run's name, to the shared text log alone."""
        if self.world.is_main:
            stamp = time.strftime(STAMP)
            for line in message.splitlines():
                append_line(self.log_path, f"{stamp} {self.folder.name} {line}")

    def warn(self, message: str) -> None:
        self.log(f"WARNING: {message}")

    def record(self, line: Mapping[str, Any]) -> None:
        """Adds one line to metrics.jsonl and its numbers to TensorBoard; `line` has `epoch` and `split`."""
        if self._lease is not None:
            self._lease.check()
            append_line(self.folder / METRICS, json.dumps(line), durable=True)
            self._plot(line)

    def _plot(self, line: Mapping[str, Any]) -> None:
        values = {f"{line['split']}/{name}": value for name, value in line.items() if name not in ("epoch", "split")}
        self._writer.add(values, step=line["epoch"])

    def save(self, name: str, checkpoint: Mapping[str, Any]) -> None:
        """Writes a checkpoint into the run's folder; the last one is kept beside its successor."""
        if self._lease is not None:
            self._lease.check()
            if name == LAST:
                self._keep_previous()
            save_checkpoint(self.folder / name, checkpoint)
            self._last_is_whole |= name == LAST

    def _keep_previous(self) -> None:
        """A second name for the last state; unlike a rename this leaves no moment without a model_last.pt.

        A damaged last state, from which this run fell back, must not take the place of the good one before it.
        """
        last, previous = self.folder / LAST, self.folder / PREVIOUS
        if not last.exists() or not (self._last_is_whole or is_state(last)):
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
        if self._lease is not None:
            self._lease.check()
            write_json(self.folder / name, value)

    def save_text(self, name: str, text: str) -> None:
        if self._lease is not None:
            self._lease.check()
            write_atomic(self.folder / name, text.encode())

    def resume_command(self) -> str:
        """What goes on with this run, for a shell."""
        launcher = [interpreter()] if self.world.size == 1 else ["torchrun", *self.world.launch_flags()]
        return shlex.join([*launcher, sys.argv[0], "--resume", str(self.folder), *_code_flags(sys.argv)])

    def seconds(self) -> float:
        """Wall time of all epochs so far, over every process that worked on this run in turn."""
        return sum(line["seconds"] for line in read_metrics(self.folder))

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()
        if self._lease is not None:
            self._lease.release()


def _code_flags(words: Sequence[str]) -> list[str]:
    """The flags of a command that name a Python file: a run does not take them from its config.json."""
    split = [part for word in words for part in (word.split("=", 1) if word.startswith("--") else [word])]
    starts = [place for place, word in enumerate(split) if word.startswith("--")]
    flags = [split[start:end] for start, end in itertools.pairwise([*starts, len(split)])]
    return [word for flag in flags if code_in(flag[1:]) for word in flag]


def interpreter() -> str:
    """The Python that runs this, as one would type it here: by its bare name, from this folder, or by its whole path."""
    path = Path(sys.executable)
    if shutil.which(path.name) == sys.executable:
        return path.name
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else sys.executable
