"""Runs by the names of their folders: the network that a folder stands for, and `latest`, the newest run beside others."""

from collections.abc import Sequence
from pathlib import Path

from utils.errors import UserError
from utils.runs.folder import ARCHIVE, BEST, COMPACT, CONFIG, SUMMARY, is_unfinished

LATEST, SAVES = "latest", "saves"
TRAINED, SHIPPED = (BEST,), (COMPACT, BEST, ARCHIVE)  # which file of a run is meant, in this order


def network_in(text: str, *, files: Sequence[str]) -> str:
    """The file that `text` stands for: itself, or of a run's folder the first of `files` that is there.

    `latest` is the run in `saves` that ended last, `DIR/latest` that in DIR, unless something is called so. Raises UserError for
    a run that has not come to its end, whose network may yet be replaced.
    """
    folder = _folder(text, ended=True)
    if folder is None:
        return text
    if is_unfinished(folder):
        raise UserError(f"{folder}: this run has not come to its end; name its {BEST} to take the best so far")
    found = next((folder / name for name in files if (folder / name).is_file()), None)
    if found is None:
        raise UserError(f"{folder}: the run in this folder has left no {' or '.join(files)}")
    return str(found)


def run_in(text: str) -> str:
    """The folder that `text` stands for: itself, or with `latest` in the last place the run that was worked on last."""
    folder = _folder(text, ended=False)
    return text if folder is None else str(folder)


def _folder(text: str, *, ended: bool) -> Path | None:
    """The folder of the run that is meant; None where `text` names something else."""
    path = Path(text)
    try:
        is_latest, is_run = path.name == LATEST and not path.exists(), (path / CONFIG).is_file()
    except (OSError, ValueError):  # no path that a file system takes, which is said where the file is opened
        return None
    if is_latest:
        return _newest(path.parent if path.parent != Path() else Path(SAVES), ended=ended)
    return path if is_run else None


def _newest(saves: Path, *, ended: bool) -> Path:
    marks = sorted(saves.glob(f"*/{SUMMARY if ended else CONFIG}"), key=lambda path: path.stat().st_mtime)
    if not marks:
        raise UserError(f"{saves / LATEST}: there is no {'complete ' if ended else ''}run in {saves}")
    return marks[-1].parent
