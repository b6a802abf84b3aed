"""A small network in a file: its weights and which channels they are of. Reading it runs no code."""

import os
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from models.graph import ChannelGraph
from models.narrow import NarrowNetwork, Selection
from utils.checkpoints import load_checkpoint, save_checkpoint
from utils.errors import UserError, naming, shown

KIND = "small network"
DTYPES = {str(dtype): dtype for dtype in (torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.int32)}


def save(small: NarrowNetwork, path: str | os.PathLike) -> None:
    """Writes what `prune` or `Selection.shrink` gave, atomically. Raises PruningError for any other network."""
    if not isinstance(small, NarrowNetwork):
        raise UserError(f"small: a network that prune or shrink gave expected, not {type(small).__name__}")
    inputs = [[list(shape), str(dtype)] for shape, dtype in small.inputs]
    save_checkpoint(path, {"kind": KIND, "kept": small.kept, "inputs": inputs, "state_dict": small.state_dict()})


def load(path: str | os.PathLike, network: nn.Module | Callable[[], nn.Module]) -> NarrowNetwork:
    """The network of a file that `save` wrote.

    `network` is the dense one, which stays as it is and whose weights do not count, or the function that builds it. Raises
    PruningError for a file of another kind, damaged, or of another network.
    """
    network = network if isinstance(network, nn.Module) else network()
    with naming(f"path {path}"):
        saved = load_checkpoint(path)
        if saved.get("kind") != KIND:
            raise UserError(f"holds {shown(saved.get('kind'))}, not a {KIND} that filter_pruning.save wrote")
        device = next(network.parameters(), torch.empty(0)).device
        example = [torch.zeros(shape, dtype=dtype, device=device) for shape, dtype in _inputs(saved.get("inputs"))]
        small = Selection.from_json(ChannelGraph(network, example or None), saved.get("kept")).shrink()
        try:
            small.load_state_dict(saved["state_dict"])
        except (RuntimeError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"holds other tensors than what is left of {type(network).__name__}: {shown(str(error))}") from error
    return small


def _inputs(saved: Any) -> list[tuple[list[int], torch.dtype]]:
    entries = saved if isinstance(saved, list) else [None]
    for entry in entries:
        is_pair = isinstance(entry, list) and len(entry) == 2 and isinstance(entry[0], list) and entry[1] in DTYPES
        if not is_pair or not all(type(size) is int and 0 < size <= 2**16 for size in entry[0]) or len(entry[0]) > 8:
            raise UserError(f"its inputs are {shown(saved)}, expected shapes and types")
    return [(shape, DTYPES[dtype]) for shape, dtype in entries]
