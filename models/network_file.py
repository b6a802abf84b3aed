"""Checkpoint files to networks and back: dense, pruned or compact, ours or a bare state_dict that people already have.

A checkpoint is a dict of tensors and plain values: `format`, `model`, `num_classes`, `state_dict`, `epoch`, `metrics`,
`config`; `class_names`, `image_size`, `mean` and `std` of the images that it is for; `kept` (live output channels by layer)
where filters are pruned, and `compact: True` where they are physically gone. Nothing in it can run code, and the network is
built from its name and channel lists alone.
"""

import os
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from models import MODELS, build_model
from models.narrow import narrow
from utils.errors import UserError, naming
from utils.files import FORMAT, load_checkpoint
from utils.image_spec import ImageSpec, read_image_spec

SHOWN_DIFFERENCES = 3


@dataclass(frozen=True)
class NetworkFile:
    """A network that was read from `path`; `kept` is empty for an unpruned one.

    `images` is what it must be given and what its answers mean; None where the file does not say.
    """

    network: nn.Module
    model: str
    num_classes: int
    kept: dict[str, list[int]] = field(default_factory=dict)
    compact: bool = False
    metrics: dict[str, Any] = field(default_factory=dict)
    images: ImageSpec | None = None


def describe_network(
    state_dict: Mapping[str, Tensor],
    *,
    model: str,
    num_classes: int,
    config: Mapping[str, Any],
    images: ImageSpec | None = None,
    kept: Mapping[str, Sequence[int]] | None = None,
    compact: bool = False,
) -> dict[str, Any]:
    """What a checkpoint says of a network, without epoch and metrics; tensors are copied, on the CPU, in plain layout."""
    description = {
        "format": FORMAT,
        "model": model,
        "num_classes": num_classes,
        "state_dict": with_versions(
            {name: value.detach().cpu().clone(memory_format=torch.contiguous_format) for name, value in state_dict.items()},
            like=state_dict,
        ),
        "config": dict(config),
    }
    if images is not None:
        description |= images.as_fields()
    if kept:
        description["kept"] = {name: [int(channel) for channel in channels] for name, channels in kept.items()}
    if compact:
        description["compact"] = True
    return description


def load_network(path: str | os.PathLike, *, flag: str, model: str | None = None, model_flag: str = "--model") -> NetworkFile:
    """Reads `path`, named by `flag`, and builds its network on the CPU, in eval mode.

    A file that does not say which network it holds, such as a bare state_dict, needs `model`. Raises UserError for a file
    that cannot be read, has a newer format, or whose network, names or shapes are not those of `model` or of its own name.
    """
    checkpoint = load_checkpoint(path, flag=flag)
    origin = f"{flag} {path}"
    if "format" not in checkpoint:
        return _load_bare(checkpoint, origin, model, model_flag)
    name, num_classes, state, kept = _checked_fields(checkpoint, origin)
    if model is not None and model != name:
        raise UserError(f"{origin}: holds a {name}, not the {model} of {model_flag}")
    with naming(origin):
        images = read_image_spec(checkpoint, num_classes=num_classes)
    compact = bool(checkpoint.get("compact"))
    network = build_model(name, num_classes=num_classes)
    if compact:
        with naming(origin):
            network = narrow(network, kept)
    _load_state(network, state, origin, name)
    metrics = checkpoint.get("metrics") or {}
    return NetworkFile(network.eval(), name, num_classes, kept, compact, metrics, images)


def as_dense(file: NetworkFile) -> NetworkFile:
    """The same network at its full width, with zeros where filters are gone; in eval mode."""
    if not file.compact:
        return file
    network = build_model(file.model, num_classes=file.num_classes)
    network.load_state_dict(file.network.dense_state_dict())
    return replace(file, network=network.eval(), compact=False)


def _checked_fields(checkpoint: Mapping[str, Any], origin: str) -> tuple[str, int, dict[str, Tensor], dict[str, list[int]]]:
    version = checkpoint["format"]
    if version != FORMAT:
        raise UserError(f"{origin}: checkpoint format {version!r} is none that this version reads ({FORMAT})")
    name, num_classes = checkpoint.get("model"), checkpoint.get("num_classes")
    if not isinstance(name, str) or name not in MODELS:
        raise UserError(f"{origin}: holds a network {name!r}, known are {', '.join(MODELS)}")
    state = _checked_state(checkpoint.get("state_dict"), origin)
    # a wrong number must not become an allocation without bounds
    if not isinstance(num_classes, int) or not 1 <= num_classes <= _most_rows(state):
        raise UserError(f"{origin}: num_classes is {num_classes!r}, expected the number of rows of its linear layer")
    kept = checkpoint.get("kept") or {}
    if not isinstance(kept, dict) or not all(isinstance(channels, list) for channels in kept.values()):
        raise UserError(f"{origin}: kept is no mapping from layers to lists of channels")
    return name, num_classes, state, kept


def _checked_state(state: Any, origin: str) -> dict[str, Tensor]:
    if not isinstance(state, Mapping) or not state or not all(isinstance(value, Tensor) for value in state.values()):
        raise UserError(f"{origin}: holds no state_dict, a mapping from parameter names to tensors")
    return with_versions(state, like=state)


def with_versions(state: Mapping[str, Tensor], *, like: Any, without: str = "") -> dict[str, Tensor]:
    """`state` with the versions of the modules that the state dict `like` carries, by their paths `without` a prefix.

    `load_state_dict` hands them to the modules, some of which read older versions in another way.
    """
    versions = getattr(like, "_metadata", None)
    state = OrderedDict(state)
    if isinstance(versions, Mapping) and all(isinstance(entry, Mapping) for entry in versions.values()):
        state._metadata = OrderedDict((path.removeprefix(without), dict(entry)) for path, entry in versions.items())
    return state


def _most_rows(state: Mapping[str, Tensor]) -> int:
    return max((len(value) for value in state.values() if value.ndim), default=0)


def _load_bare(checkpoint: Mapping[str, Any], origin: str, model: str | None, model_flag: str) -> NetworkFile:
    """A state_dict of other people's: as it is or under `state_dict`, with or without DataParallel's `module.`."""
    state = _checked_state(checkpoint.get("state_dict", checkpoint), origin)
    if model is None:
        raise UserError(f"{origin}: does not say which network it holds; name it with {model_flag}")
    if model not in MODELS:
        raise UserError(f"{model_flag} {model}: unknown, choose from {', '.join(MODELS)}")
    state = with_versions({name.removeprefix("module."): value for name, value in state.items()}, like=state, without="module.")
    classifiers = [value for value in state.values() if value.ndim == 2]
    if not classifiers:
        raise UserError(f"{origin}: holds no linear layer, so it is no {model}")
    num_classes = len(classifiers[-1])
    network = build_model(model, num_classes=num_classes)
    _load_state(network, state, origin, model)
    return NetworkFile(network.eval(), model, num_classes)


def _load_state(network: nn.Module, state: Mapping[str, Tensor], origin: str, model: str) -> None:
    expected = network.state_dict()
    # counters that files written by old versions of torch have not got, and that nothing reads
    counters = {name: value for name, value in expected.items() if name.endswith("num_batches_tracked")}
    state = with_versions({**counters, **state}, like=state)
    differences = [f"{name} is missing" for name in expected if name not in state]
    differences += [f"{name} is unknown" for name in state if name not in expected]
    differences += [
        f"{name} is {tuple(state[name].shape)}, not {tuple(value.shape)}"
        for name, value in expected.items()
        if name in state and state[name].shape != value.shape
    ]
    if differences:
        shown = "; ".join(differences[:SHOWN_DIFFERENCES])
        more = f" and {len(differences) - SHOWN_DIFFERENCES} more" if len(differences) > SHOWN_DIFFERENCES else ""
        raise UserError(f"{origin}: does not fit {model}: {shown}{more}")
    spoilt = [name for name, value in state.items() if not value.isfinite().all()]
    if spoilt:
        raise UserError(f"{origin}: {spoilt[0]} holds NaN or infinite numbers, expected those of a trained network")
    network.load_state_dict(state)
