"""A folder with a folder for each class: its images with their classes, and a part of them drawn for testing."""

import hashlib
import os
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from utils.errors import UserError, printable
from utils.images.folders import find_images, is_hidden

SPLIT_SEED = 0
SPLITS = ("test", "val", "valid")


@dataclass(frozen=True)
class Listed:
    """One split: image files, the number of each one's class among `classes`, and what was left out below its folder."""

    classes: tuple[str, ...]
    paths: tuple[str, ...]
    labels: Tensor
    left_out: Counter[str]

    def taken(self, rows: Tensor) -> "Listed":
        """Some of the images, in this order."""
        return Listed(self.classes, tuple(self.paths[row] for row in rows.tolist()), self.labels[rows], self.left_out)


def class_name(folder_name: str) -> str:
    """The text of a folder's name, which may be in no encoding, as any file can hold it."""
    return os.fsencode(folder_name).decode(errors="backslashreplace")


def list_classes(folder: Path) -> Listed:
    """The images of a split, whose classes are the folders in `folder`; a class may have none.

    Raises UserError for a folder without class folders.
    """
    names = sorted(entry.name for entry in folder.iterdir() if entry.is_dir() and not is_hidden(entry.name))
    if not names:
        raise UserError(f"{folder} has no class folders")
    paths, labels, left_out = [], [], Counter(_beside(folder))
    for label, name in enumerate(names):
        found = find_images(folder / name)
        paths += found.paths
        labels += [label] * len(found.paths)
        left_out += found.left_out
    return Listed(tuple(map(class_name, names)), tuple(paths), torch.tensor(labels, dtype=torch.int64), left_out)


def _beside(folder: Path) -> list[str]:
    """By ending, what lies beside class folders."""
    others = [entry.name for entry in folder.iterdir() if is_hidden(entry.name) or not entry.is_dir()]
    return ["hidden" if is_hidden(name) else os.path.splitext(name)[1].lower() or "no ending" for name in others]


def test_folder(data_dir: Path) -> Path | None:
    """The folder of the test split, if there is one."""
    return next((data_dir / name for name in SPLITS if (data_dir / name).is_dir()), None)


def split_by_share(listed: Listed, share: float, *, root: Path) -> tuple[Listed, Listed]:
    """A training and a test split: of each class the nearest number to this share of its images, drawn by a fixed seed.

    Which those are follows from the files' names below `root` alone, so that a set may be moved. Raises UserError for a class
    with fewer than two images.
    """
    test_rows: list[int] = []
    for label, name in enumerate(listed.classes):
        rows = (listed.labels == label).nonzero().flatten().tolist()
        if len(rows) < 2:
            raise UserError(f"the class {printable(name)} has {len(rows)} images, a split needs 2")
        count = min(max(1, round(share * len(rows))), len(rows) - 1)
        test_rows += sorted(rows, key=lambda row: _draw(listed.paths[row], root))[:count]
    is_test = torch.zeros(len(listed.paths), dtype=torch.bool)
    is_test[test_rows] = True
    return listed.taken((~is_test).nonzero().flatten()), listed.taken(is_test.nonzero().flatten())


def _draw(path: str, root: Path) -> bytes:
    """A number drawn for an image, the same wherever its set lies."""
    name = Path(os.path.relpath(path, root)).as_posix()
    return hashlib.sha256(os.fsencode(f"{SPLIT_SEED} {name}")).digest()
