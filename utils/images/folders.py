"""The images in a folder, found in one way for training, testing and predicting.

Links are followed, as torchvision and timm do it. What a system put there and no person sees is passed over: names that begin
with a dot (`.ipynb_checkpoints`, `._photo.jpg` of AppleDouble, `.DS_Store`) and `__MACOSX`. Whatever else is left out is
counted by its ending, so that nobody has to guess why a set is smaller than its folder.
"""

import os
from collections import Counter
from dataclasses import dataclass, field

from utils.errors import printable
from utils.images.decoding import image_endings

SHOWN_ENDINGS = 6


@dataclass
class Found:
    """Images below a folder, in order, and what else lies there: how many files of each ending, `hidden` among them."""

    paths: list[str] = field(default_factory=list)
    left_out: Counter[str] = field(default_factory=Counter)


def is_hidden(name: str) -> bool:
    return name.startswith(".") or name == "__MACOSX"


def find_images(folder: str | os.PathLike) -> Found:
    """Every image below `folder`, sorted by its path; a link that leads back to a folder above it is not followed again."""
    found = Found()
    _walk(os.fspath(folder), frozenset(), found)
    found.paths.sort()
    return found


def _walk(folder: str, above: frozenset[str], found: Found) -> None:
    own = os.path.realpath(folder)
    if own in above:
        found.left_out["links back"] += 1
        return
    with os.scandir(folder) as entries:
        for entry in entries:
            if is_hidden(entry.name):
                found.left_out["hidden"] += 1
            elif entry.is_dir():
                _walk(entry.path, above | {own}, found)
            elif os.path.splitext(entry.name)[1].lower() not in image_endings():
                found.left_out[os.path.splitext(entry.name)[1].lower() or "no ending"] += 1
            elif not entry.is_file():
                found.left_out["links to nothing, or no files"] += 1
            else:
                found.paths.append(entry.path)


def describe_left_out(left_out: Counter[str]) -> str:
    """What was left out, in words, the most frequent first; empty where that is nothing."""
    most = sorted(left_out.items(), key=lambda row: (-row[1], row[0]))[:SHOWN_ENDINGS]
    rows = [f"{count} {printable(ending, 20)}" for ending, count in most]
    return ", ".join(rows) + (", ..." if len(left_out) > SHOWN_ENDINGS else "")
