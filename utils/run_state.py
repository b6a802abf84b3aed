"""Saved states of a run: which one it goes on from, and whether it is this run's."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from utils.errors import UserError, printable
from utils.files import load_checkpoint
from utils.run_folder import BEST, CONFIG, LAST, PREVIOUS

# where a run is computed, not what is computed: may differ when it is resumed
PLACEMENT_FLAGS = frozenset(("resume", "dry_run", "data_dir", "device", "dev_idx", "workers"))
STATE_KEYS = frozenset(("epoch", "batch", "best", "last", "sums", "objective", "optimizer", "hooks", "random"))


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


def is_state(path: Path) -> bool:
    try:
        return _is_training_state(load_checkpoint(path))
    except UserError:
        return False


def _is_training_state(checkpoint: Mapping[str, Any]) -> bool:
    state = checkpoint.get("resume")
    return isinstance(state, dict) and state.keys() >= STATE_KEYS


def check_state(
    checkpoint: Mapping[str, Any],
    flags: Mapping[str, Any],
    *,
    defaults: Mapping[str, Any],
    folder: str | os.PathLike,
    name: str = "saved state",
) -> None:
    """Raises UserError if a checkpoint in a run's folder, called `name`, is that of a run with other flags.

    A flag that the state does not know, since an older version wrote it, had the value that `defaults` gives.
    """
    config = checkpoint.get("config")
    config = config if isinstance(config, dict) else {}
    for flag in flags.keys() - PLACEMENT_FLAGS - {"n_epochs"}:
        saved = config.get(flag)
        if saved is None or saved is False:
            saved = defaults.get(flag)
        if saved != flags[flag]:
            other = f"its {name} is of a run with {flag} {printable(str(saved))}"
            raise UserError(f"--resume {folder}: {other}, {CONFIG} says {flags[flag]}")


def check_best(
    folder: str | os.PathLike, state: Mapping[str, Any], flags: Mapping[str, Any], *, defaults: Mapping[str, Any]
) -> None:
    """Raises UserError unless the best network that the saved `state` of a run knows of still lies in its folder.

    One of an epoch that the state does not know is this run's too, which was killed between the two files.
    """
    best = state["resume"]["best"]
    if best is None:
        return
    path = Path(folder) / BEST
    checkpoint = load_checkpoint(path, flag="--resume")
    check_state(checkpoint, flags, defaults=defaults, folder=folder, name=BEST)
    epoch = checkpoint.get("epoch")
    is_later = isinstance(epoch, int) and epoch >= state["resume"]["epoch"]
    is_same = all(checkpoint.get(name) == state.get(name) for name in ("model", "num_classes"))
    if not is_same or not (is_later or checkpoint.get("metrics") == best):
        raise UserError(f"--resume {path}: is not the network of epoch {best['epoch'] + 1}, the best so far; put that file back")
