"""Runs in one table for a terminal, the newest first: name, network, method, accuracy, state."""

import os
import shutil
import time
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from reporting.gather import listed
from reporting.run_files import FolderFiles
from utils.errors import UserError, printable
from utils.runs.folder import CONFIG, LEASE_PREFIX, METRICS, SUMMARY
from utils.runs.lease import LAPSE_SECONDS

HEAD = ("run", "network", "method", "top-1", "state")
NARROWEST = 12  # characters of a method, however narrow the terminal


class Listed(NamedTuple):
    """A run, as it is listed; `accuracy` is that of the last epoch, empty where there is none."""

    name: str
    network: str
    method: str
    accuracy: str
    state: str


def listing(paths: Iterable[Path], *, width: int | None = None) -> str:
    """The table of all runs in `paths`, each a run's folder or a folder of runs, within `width` characters.

    Raises UserError for a path that is not there, and where there is no run.
    """
    paths = list(paths)
    folders = {folder for path in paths for folder in _folders(path)}
    if not folders:
        raise UserError(f"{' '.join(map(str, paths))}: no run in there")
    rows = [_row(folder) for folder in sorted(folders, key=_last_change, reverse=True)]
    return _table(rows, width=shutil.get_terminal_size().columns if width is None else width)


def _folders(path: Path) -> list[Path]:
    if not path.is_dir():
        raise UserError(f"{path}: no such folder; expected a run such as saves/1625594011, or a folder of runs")
    if (path / CONFIG).is_file():
        return [path]
    return [child for child in path.iterdir() if (child / CONFIG).is_file()]


def _last_change(folder: Path) -> float:
    return max((folder / name).stat().st_mtime for name in (CONFIG, METRICS, SUMMARY) if (folder / name).exists())


def _row(folder: Path) -> Listed:
    name = printable(folder.name)
    try:
        run = listed(FolderFiles(folder))
    except UserError as error:
        return Listed(name, "", "", "", f"unreadable: {error}")
    accuracy = "" if run.top1 is None else f"{run.top1:.2f}"
    return Listed(name, run.network, run.method, accuracy, _state(folder, run.epochs, run.n_epochs))


def _state(folder: Path, epochs: int, n_epochs: str) -> str:
    if (folder / SUMMARY).exists():
        return "complete"
    leases = list(folder.glob(f"{LEASE_PREFIX}*"))
    is_held = any(time.time() - os.lstat(lease).st_mtime < LAPSE_SECONDS for lease in leases)
    return f"{'running' if is_held else 'stopped'}, {epochs} of {n_epochs} epochs"


def _table(rows: list[Listed], *, width: int) -> str:
    """Columns side by side; the methods give way where they do not fit."""
    widths = [max(len(row[place]) for row in (HEAD, *rows)) for place in range(len(HEAD))]
    method = HEAD.index("method")
    spare = width - sum(widths) - 2 * (len(HEAD) - 1)
    widths[method] = max(widths[method] + min(spare, 0), NARROWEST)
    lines = []
    for row in (HEAD, *rows):
        cells = [
            printable(cell, size) if place == method else cell for place, (cell, size) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(f"{cell:{size}}" for cell, size in zip(cells, widths, strict=True)).rstrip())
    return "\n".join(lines)
