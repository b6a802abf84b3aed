"""What the files on a command line say of the flags that are not there: the images that a network was trained on."""

import os
from collections.abc import Mapping
from typing import Any

from utils.cli.effects import typed
from utils.cli.parser import Parser
from utils.errors import UserError, naming, shown
from utils.images.settings import FOLDER_DATASETS

SOURCES = ("s_path", "load_path", "t_path")  # in the order in which they are asked


def data_words(parser: Parser, given: Mapping[str, Any]) -> tuple[list[str], bool]:
    """The flags of the images that the checkpoint of a `given` flag was trained on, as typed; and whether a folder is among them.

    None where the images are named, where a run is resumed, and where no file says. Raises UserError for images that are not
    there any more.
    """
    if "dataset" not in parser.names() or {"dataset", "resume", "decode", "inspect"} & given.keys():
        return [], False
    for name in SOURCES:
        recorded = _recorded(given[name]) if given.get(name) is not None else None
        if recorded is not None and recorded["dataset"] != parser.get_default("dataset"):
            with naming(f"{typed(name, given[name])}, of a network trained on {shown(recorded['dataset'])}"):
                words = _words(recorded, given, default=parser.get_default("data_dir"))
                parser.parse_args(words)
            return words, any(word.startswith("--data-dir=") for word in words)
        if recorded is not None:
            break
    return [], False


def _recorded(path: str) -> dict[str, Any] | None:
    """The flags of the run that wrote a checkpoint; None for a file that says none, whatever it is."""
    from utils.checkpoints import load_checkpoint  # torch, which is needed from here on

    try:
        config = load_checkpoint(path).get("config")
    except UserError:  # whoever reads the network says so
        return None
    return config if isinstance(config, dict) and isinstance(config.get("dataset"), str) else None


def _words(recorded: Mapping[str, Any], given: Mapping[str, Any], *, default: str) -> list[str]:
    dataset, folder = recorded["dataset"], recorded.get("data_dir")
    words = [f"--dataset={dataset}"]
    if "data_dir" not in given and isinstance(folder, str) and folder != default:
        if os.path.isdir(folder):
            words.append(f"--data-dir={folder}")
        elif dataset in FOLDER_DATASETS:
            raise UserError(
                f"{shown(folder)} is not there; say with --data-dir where these images are, or name others with --dataset"
            )
    if dataset in FOLDER_DATASETS:
        share = recorded.get("test_share")
        words += [f"--test-share={share}"] if share is not None and "test_share" not in given else []
        words += ["--skip-broken"] if recorded.get("skip_broken") is True and "skip_broken" not in given else []
    return words
