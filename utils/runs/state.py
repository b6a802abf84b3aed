"""Saved states of a run: which one it goes on from, and whether it is this run's."""

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from utils.checkpoints import load_checkpoint
from utils.errors import UserError, printable, shown
from utils.runs.folder import BEST, CONFIG, LAST, PREVIOUS
from utils.runs.settings import MOVABLE_FLAGS, PLACEMENT_FLAGS


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
        problem = _problem(state)
        if problem is None:
            fallback = f"{problems[0]}; going on from the state before it, {path.name}" if problems else None
            return state, fallback
        problems.append(f"--resume {path}: {problem}")
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
    return isinstance(state, dict) and state.keys() >= _CHECKS.keys()


def _is_count(value: Any) -> bool:
    return type(value) is int and value >= 0


def _is_score(value: Any) -> bool:
    return value is None or (isinstance(value, dict) and _is_count(value.get("epoch")) and type(value.get("top1")) is float)


def _are_sums(value: Any) -> bool:
    return isinstance(value, list) and all(
        isinstance(sums, dict) and all(isinstance(each, Tensor) and each.dim() == 0 for each in sums.values()) for sums in value
    )


_CHECKS: dict[str, Callable[[Any], bool]] = {
    "epoch": _is_count,
    "batch": _is_count,
    "best": _is_score,
    "last": _is_score,
    "sums": _are_sums,
    "objective": lambda value: isinstance(value, dict),
    "optimizer": lambda value: isinstance(value, dict),
    "hooks": lambda value: isinstance(value, dict),
    "random": lambda value: isinstance(value, list),
}


def _problem(checkpoint: Mapping[str, Any]) -> str | None:
    """Why no training goes on from a checkpoint: it has no state, or one that no training writes in this form."""
    if not _is_training_state(checkpoint):
        return "holds a network, but no state of a training"
    state = checkpoint["resume"]
    wrong = [name for name, is_right in _CHECKS.items() if not is_right(state[name])]
    if not wrong and state["batch"] > 0 and not all("images" in sums for sums in state["sums"]):
        wrong = ["sums"]
    return f"its saved state has {wrong[0]} {shown(state[wrong[0]], 100)}" if wrong else None


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
        is_moved = flag in MOVABLE_FLAGS and saved is not None and flags[flag] is not None
        if saved != flags[flag] and not is_moved:
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
