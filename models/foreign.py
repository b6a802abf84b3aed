"""Checkpoints as other trainers write them: which of their tensors are the network's, and how many classes it has.

Both are found by fitting what the file holds to the network that was named: the tensors lie in some mapping of the file, their
names may begin with what wrapped the network (DataParallel, `torch.compile`, Lightning, an average), and beside them lie
counters of other tools.
"""

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from models import build_on_meta
from utils.errors import printable
from utils.seed import preserved_random_state

# Where trainers put the tensors, the trained ones before their averages
KEYS = (
    *(
        "state_dict",
        "model_state_dict",
        "model_state",
        "model",
        "net",
        "net_state_dict",
        "network",
        "params",
        "weights",
        "student",
    ),
    *("state_dict_ema", "model_ema", "ema_state_dict", "params_ema", "ema"),
)
WRAPPERS = ("module", "model", "net", "_orig_mod", "student", "network")  # what a network becomes an attribute of
INSIDE = ("_orig_mod", "module")  # wrappers of parts of a network
COUNTERS = ("n_averaged", "total_ops", "total_params")  # of AveragedModel and thop
PROBES = (11, 13)  # numbers of classes that few widths are equal to, of which two tell how each tensor grows
MAX_NESTING, MAX_WRAPPERS, SHOWN_NAME = 3, 5, 60


Shapes = Mapping[str, tuple[int, ...]]


class Probes(NamedTuple):
    """The shapes of a network's tensors by name, for two numbers of classes, PROBES."""

    few: Shapes
    many: Shapes

    @classmethod
    def of(cls, model: str) -> "Probes":
        return cls(*(_shapes(model, classes) for classes in PROBES))


class Taken(NamedTuple):
    """The tensors of a network by its own names, and what was done to find them: None where they lay there as they are.

    `prefix` is what the names began with in the file.
    """

    state: dict[str, Tensor]
    prefix: str
    remark: str | None


def find_tensors(checkpoint: Mapping[str, Any]) -> tuple[Any, list[str], list[str]]:
    """The mapping of tensors in a file, the keys that lead to it, and other keys of KEYS whose mapping was not taken."""
    path, others = [], []
    for _ in range(MAX_NESTING):
        found = [key for key in KEYS if isinstance(checkpoint.get(key), dict) and checkpoint[key]]
        if not found:
            break
        path.append(found[0])
        others += found[1:]
        checkpoint = checkpoint[found[0]]
    return checkpoint, path, others


def take(state: Mapping[str, Tensor], *, path: list[str], others: list[str], probes: Probes) -> Taken:
    """The tensors of the network of `probes` among those of `state`, which lay under the keys `path` of a file."""
    # where a shape depends on the number of classes, any will do
    expected = {name: shape if probes.many.get(name) == shape else None for name, shape in probes.few.items()}
    kept = {name: value for name, value in state.items() if name in expected or name.rpartition(".")[2] not in COUNTERS}
    prefix, inner = max(_readings(kept), key=lambda reading: _fitting(_renamed(kept, *reading), expected))
    taken = _renamed(kept, prefix, inner)
    places = [" of ".join(reversed(path))] if path and path != ["state_dict"] else []
    names = [f"names without {prefix}"] if prefix else []
    names += (
        [f"without {' and '.join(f'{part}.' for part in inner)} inside"] if inner and taken != _renamed(kept, prefix, ()) else []
    )
    left = [name for name in state if name not in kept or not name.startswith(prefix)]
    beside = [f"not {printable(', '.join([*others, *left]), SHOWN_NAME)}"] if others or left else []
    said = [*places, *names, *beside]
    return Taken(taken, prefix, f"took {len(taken)} tensors: {', '.join(said)}" if said else None)


def count_classes(state: Mapping[str, Tensor], *, probes: Probes) -> int | None:
    """The number of classes with which the network of `probes` has the shapes of `state`; None where none depends on it."""
    few, many = probes
    for name in few.keys() & many.keys() & state.keys():
        for axis, (low, high) in enumerate(zip(few[name], many[name], strict=False)):
            if low != high and axis < state[name].ndim:
                each = (high - low) / (PROBES[1] - PROBES[0])
                return round((state[name].shape[axis] - low) / each) + PROBES[0]
    return None


def _shapes(model: str, num_classes: int) -> dict[str, tuple[int, ...]]:
    with preserved_random_state():
        state = build_on_meta(model, num_classes=num_classes).state_dict()
    return {name: tuple(value.shape) for name, value in state.items() if not torch.nn.parameter.is_lazy(value)}


def _readings(state: Mapping[str, Tensor]) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Pairs of what names may begin with and which parts they may have inside, the simplest first."""
    prefixes = dict.fromkeys(["", *_wrappers(state), *_shared(state)])
    for inner in ((), INSIDE):
        yield from ((prefix, inner) for prefix in prefixes)


def _wrappers(state: Mapping[str, Tensor]) -> list[str]:
    """Beginnings of names that are made of WRAPPERS: `module.`, `module.student.`."""
    found = set()
    for name in state:
        prefix = ""
        for part in name.split(".")[:MAX_WRAPPERS]:
            if part not in WRAPPERS:
                break
            prefix += f"{part}."
            found.add(prefix)
    return sorted(found, key=lambda prefix: (prefix.count("."), prefix))


def _shared(state: Mapping[str, Tensor]) -> list[str]:
    """Beginnings that all names share."""
    names = [name.split(".") for name in state]
    shared = []
    for parts in zip(*names, strict=False):
        if len(set(parts)) > 1 or len(shared) == MAX_WRAPPERS or any(len(name) == len(shared) + 1 for name in names):
            break
        shared.append(parts[0])
    return [".".join(shared[: end + 1]) + "." for end in range(len(shared))]


def _renamed(state: Mapping[str, Tensor], prefix: str, inner: tuple[str, ...]) -> dict[str, Tensor]:
    renamed = ((name.removeprefix(prefix).split("."), value) for name, value in state.items() if name.startswith(prefix))
    return {".".join(part for part in parts if part not in inner): value for parts, value in renamed}


def _fitting(state: Mapping[str, Tensor], expected: Mapping[str, tuple[int, ...] | None]) -> tuple[int, int]:
    """How many of the names are the network's, shapes included; and, where that is equal, how few others there are."""
    fits = sum(name in state and shape in (None, tuple(state[name].shape)) for name, shape in expected.items())
    return fits, fits - len(state)
