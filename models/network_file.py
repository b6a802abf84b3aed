"""Checkpoint files to networks and back: dense, pruned or compact, ours or a bare state_dict that people already have.

A checkpoint is a dict of tensors and plain values: `format`, `model`, `num_classes`, `state_dict`, `epoch`, `metrics`,
`config`; `class_names`, `image_size`, `mean` and `std` of the images that it is for; `kept` (live output channels by layer)
where filters are pruned, `compact: True` where they are physically gone, and `int8` (lowest and highest value of activations)
where it was trained for eight bits. Nothing in it can run code, and the network is
built from its name and channel lists alone.
"""

import os
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from models import NAMES, build_model, build_on_meta, check_model, trusted_model
from models.foreign import Probes, count_classes, find_tensors, take
from models.graph import ChannelGraph, output_channels
from models.narrow import NarrowNetwork, Selection
from models.narrow.proof import check_equal_training, pruned_rows
from utils.checkpoints import FORMAT, load_checkpoint
from utils.errors import UserError, naming, printable, shown
from utils.images.spec import CHANNELS, ImageSpec, read_image_spec
from utils.seed import preserved_random_state

SHOWN_DIFFERENCES, SHOWN_NAME = 3, 60
# A file whose network would be larger than both is refused: at full width so many times what it holds, and so many bytes
MAX_GROWTH, MODEST_BYTES = 100, 256 << 20


@dataclass(frozen=True)
class NetworkFile:
    """A network that was read from `path`; `kept` is empty for an unpruned one.

    `images` is what it must be given and what its answers mean; None where the file does not say. `int8` has the bounds of
    activations of a network that was trained in simulated eight bits (`models.int8`). `remark` says which tensors of somebody
    else's file were taken, where that had to be found; `transferred`: for other classes than the file's, its classifier is new.
    """

    network: nn.Module
    model: str
    num_classes: int
    kept: dict[str, list[int]] = field(default_factory=dict)
    compact: bool = False
    metrics: dict[str, Any] = field(default_factory=dict)
    images: ImageSpec | None = None
    int8: dict[str, Any] = field(default_factory=dict)
    remark: str | None = None
    transferred: bool = False


def describe_network(
    state_dict: Mapping[str, Tensor],
    *,
    model: str,
    num_classes: int,
    config: Mapping[str, Any],
    images: ImageSpec | None = None,
    kept: Mapping[str, Sequence[int]] | None = None,
    compact: bool = False,
    int8: Mapping[str, Sequence[float]] | None = None,
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
    if int8:
        description["int8"] = {name: [float(bound) for bound in bounds] for name, bounds in int8.items()}
    return description


def load_network(path: str | os.PathLike, *, flag: str, model: str | None = None, model_flag: str = "--model") -> NetworkFile:
    """Reads `path`, named by `flag`, and builds its network on the CPU, in eval mode.

    A file that does not say which network it holds, such as a bare state_dict, needs `model`, from `model_flag`. So does one
    that names a Python file: code runs because somebody typed its name, never because a checkpoint says so. Raises UserError
    for a file that cannot be read, has a newer format, or whose network, names or shapes are not those of `model` or of its
    own name.
    """
    checkpoint = load_checkpoint(path, flag=flag)
    origin = f"{flag} {path}"
    if "format" not in checkpoint:
        return _load_bare(checkpoint, origin, model, model_flag)
    name, num_classes, state, kept = _checked_fields(checkpoint, origin)
    with naming(origin):
        name = trusted_model(name, model, model_flag=model_flag)
        images = read_image_spec(checkpoint, num_classes=num_classes)
    compact = checkpoint.get("compact", False)
    network = _build(name, num_classes, state, origin)
    _check_layers(network, kept, origin, name)
    if compact:
        with naming(origin):
            network = Selection.from_json(ChannelGraph(network, example_images(network, images)), kept).shrink()
    _load_state(network, state, origin, name)
    metrics, int8 = checkpoint.get("metrics") or {}, checkpoint.get("int8") or {}
    return NetworkFile(network.eval(), name, num_classes, kept, compact, metrics, images, int8)


def example_images(network: nn.Module, images: ImageSpec | None) -> Tensor | None:
    """Two images (2, 3, H, W) without values, on the network's device, of the size that it is for; None where nobody says it."""
    if images is None:
        return None
    device = next(network.parameters(), torch.empty(0)).device
    return torch.empty(2, CHANNELS, *images.image_size, device=device)


def as_dense(file: NetworkFile) -> NetworkFile:
    """The same network at its full width, with zeros where filters are gone; in eval mode."""
    if not file.compact:
        return file
    network = build_model(file.model, num_classes=file.num_classes)
    network.load_state_dict(file.network.dense_state_dict())
    return replace(file, network=network.eval(), compact=False)


def transferred(file: NetworkFile, *, num_classes: int) -> NetworkFile:
    """The network of a file for other classes, at full width: what depends on their number is new, all else the file's.

    Its weights are drawn from torch's global generator. Raises UserError where nothing of it depends on that number.
    """
    dense = as_dense(file).network
    network, state = build_model(file.model, num_classes=num_classes), dense.state_dict()
    new = [name for name, value in network.state_dict().items() if value.shape != state[name].shape]
    if not new:
        raise UserError(f"has {file.num_classes} classes, and {file.model} with {num_classes} has the same shapes")
    kept = {name: value for name, value in state.items() if name not in new}
    network.load_state_dict({**network.state_dict(), **kept})
    said = f"everything was taken but {', '.join(new)}: it has {file.num_classes} classes, not {num_classes}"
    remark = f"{file.remark}; {said}" if file.remark else said
    changes = {"network": network.eval(), "num_classes": num_classes, "compact": False, "images": None}
    return replace(file, **changes, remark=remark, transferred=True)


def check_training(file: NetworkFile, small: nn.Module, images: Tensor) -> None:
    """Raises UserError unless `small` trains as the network of `file` would at full width, its pruned filters held at 0.

    `images` (N, C, H, W) are an example, on the networks' device. A network at full width has nothing to be compared with.
    """
    if isinstance(small, NarrowNetwork):
        with preserved_random_state():  # weights are drawn before those of the file take their place
            dense = as_dense(file).network.to(images.device)
        check_equal_training(dense, small, images, pruned=pruned_rows(dense, small.kept))


def _checked_fields(checkpoint: Mapping[str, Any], origin: str) -> tuple[str, int, dict[str, Tensor], dict[str, list[int]]]:
    version = checkpoint["format"]
    if type(version) is not int or version != FORMAT:
        raise UserError(f"{origin}: checkpoint format {shown(version)} is none that this version reads ({FORMAT})")
    name, num_classes = checkpoint.get("model"), checkpoint.get("num_classes")
    if not isinstance(name, str):
        raise UserError(f"{origin}: holds a network {shown(name)}, expected {NAMES}")
    state = _checked_state(checkpoint.get("state_dict"), origin)
    # a wrong number must not become an allocation without bounds
    if type(num_classes) is not int or not 1 <= num_classes <= _most_rows(state):
        raise UserError(f"{origin}: num_classes is {shown(num_classes)}, expected the number of rows of its linear layer")
    kept = {} if checkpoint.get("kept") is None else checkpoint["kept"]
    if not isinstance(kept, dict) or not all(isinstance(name, str) and _is_channels(kept[name]) for name in kept):
        raise UserError(f"{origin}: kept is no mapping from layers to lists of channels")
    for field_name, (kinds, description) in _OTHER_FIELDS.items():
        if not isinstance(checkpoint.get(field_name), kinds):
            raise UserError(f"{origin}: its {field_name} is {shown(checkpoint[field_name])}, expected {description}")
    return name, num_classes, state, kept


_OTHER_FIELDS = {
    "compact": (bool | None, "True or False"),
    "epoch": (int | None, "a whole number"),
    "metrics": (dict | None, "a mapping from names to numbers"),
    "config": (dict | None, "a mapping from flags to values"),
    "int8": (dict | None, "a mapping from names to bounds"),
}


def _is_channels(value: Any) -> bool:
    return isinstance(value, list) and all(type(channel) is int for channel in value)


def _checked_state(state: Any, origin: str) -> dict[str, Tensor]:
    if (
        not isinstance(state, dict)
        or not state
        or not all(isinstance(name, str) and isinstance(value, Tensor) for name, value in state.items())
    ):
        raise UserError(f"{origin}: holds no state_dict, a mapping from parameter names to tensors")
    return with_versions(state, like=state)


def with_versions(state: Mapping[str, Tensor], *, like: Any, without: str = "") -> dict[str, Tensor]:
    """`state` with the versions of the modules that the state dict `like` carries, by their paths `without` a prefix.

    `load_state_dict` hands them to the modules, some of which read older versions in another way.
    """
    versions = getattr(like, "_metadata", None)
    state = OrderedDict(state)
    if isinstance(versions, Mapping) and all(_is_version(path, entry) for path, entry in versions.items()):
        state._metadata = OrderedDict((path.removeprefix(without), dict(entry)) for path, entry in versions.items())
    return state


def _is_version(path: Any, entry: Any) -> bool:
    return isinstance(path, str) and isinstance(entry, Mapping) and isinstance(entry.get("version"), int | None)


def _most_rows(state: Mapping[str, Tensor]) -> int:
    return max((len(value) for value in state.values() if value.ndim and value.numel()), default=0)


def _build(name: str, num_classes: int, state: Mapping[str, Tensor], origin: str) -> nn.Module:
    """The network at full width, once it is known that it is in proportion to what the file holds."""
    claimed = sum(value.nbytes for value in build_on_meta(name, num_classes=num_classes).state_dict().values())
    held = sum(value.nbytes for value in state.values())
    if claimed > max(MODEST_BYTES, MAX_GROWTH * held):
        raise UserError(
            f"{origin}: its {name} with {num_classes} classes would take {claimed:,} bytes, more than {MAX_GROWTH} times "
            f"the {held:,} that the file holds of it"
        )
    return build_model(name, num_classes=num_classes)


def _check_layers(network: nn.Module, kept: Mapping[str, Sequence[int]], origin: str, model: str) -> None:
    layers = dict(network.named_modules())
    unknown = kept.keys() - layers.keys()
    if unknown:
        raise UserError(f"{origin}: keeps channels of {printable(min(unknown), SHOWN_NAME)}, which {model} has not")
    for name, channels in kept.items():
        width = output_channels(layers[name]) or 0
        if len(channels) > width:
            raise UserError(f"{origin}: keeps {len(channels):,} channels of {name}, which has {width}")


def _load_bare(checkpoint: Mapping[str, Any], origin: str, model: str | None, model_flag: str) -> NetworkFile:
    """A state_dict of other people's, under whichever key, with or without what their trainers put around and beside it."""
    found, path, others = find_tensors(checkpoint)
    state = _checked_state(found, origin)
    if model is None:
        raise UserError(f"{origin}: does not say which network it holds; name it with {model_flag}")
    with naming(model_flag):
        check_model(model)
    probes = Probes.of(model)
    taken, prefix, remark = take(state, path=path, others=others, probes=probes)
    state = with_versions(taken, like=state, without=prefix)
    num_classes = count_classes(state, probes=probes)
    if num_classes is None:
        num_classes = _rows_of_last_matrix(state, origin, model)
    if num_classes < 1:
        raise UserError(f"{origin}: its classifier has no rows, so it has no classes")
    network = _build(model, num_classes, state, origin)
    _load_state(network, state, origin, model)
    return NetworkFile(network.eval(), model, num_classes, remark=remark)


def _rows_of_last_matrix(state: Mapping[str, Tensor], origin: str, model: str) -> int:
    """The number of classes of a network whose shapes do not tell it."""
    weights = [value for value in state.values() if value.ndim >= 2]
    classifiers = [value for value in weights if value.ndim == 2] or weights[-1:]  # or a convolution
    if not classifiers:
        raise UserError(f"{origin}: holds no linear layer, so it is no {model}")
    return len(classifiers[-1])


def _load_state(network: nn.Module, state: Mapping[str, Tensor], origin: str, model: str) -> None:
    expected = network.state_dict()
    # counters that files written by old versions of torch have not got, and that nothing reads
    counters = {name: value for name, value in expected.items() if name.endswith("num_batches_tracked")}
    state = with_versions({**counters, **state}, like=state)
    differences = [f"{name} is missing" for name in expected if name not in state]
    differences += [f"{printable(name, SHOWN_NAME)} is unknown" for name in state if name not in expected]
    differences += [
        f"{name} is {printable(str(tuple(state[name].shape)), SHOWN_NAME)}, not {tuple(value.shape)}"
        for name, value in expected.items()
        if name in state and state[name].shape != value.shape
    ]
    if differences:
        listed = "; ".join(differences[:SHOWN_DIFFERENCES])
        more = f" and {len(differences) - SHOWN_DIFFERENCES} more" if len(differences) > SHOWN_DIFFERENCES else ""
        raise UserError(f"{origin}: does not fit {model}: {listed}{more}")
    for name, value in expected.items():
        if value.is_floating_point() and not state[name].is_floating_point():
            raise UserError(f"{origin}: {name} holds numbers of {state[name].dtype}, expected {value.dtype}")
    network.load_state_dict(state)
    for name, value in network.state_dict().items():
        if not value.isfinite().all():
            raise UserError(f"{origin}: {name} holds NaN or infinite numbers, expected those of a trained network")
        if name.endswith("running_var") and (value < 0).any():
            raise UserError(f"{origin}: {name} holds a negative variance, {float(value.min()):.3g}")
