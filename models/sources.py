"""Networks of others, by name: `timm/NAME`, `torchvision/NAME`, or a function in a file of one's own, `FILE.py:FUNCTION`.

A source says which names it knows, which of them have published weights, and builds a network. A new one is an entry in
`SOURCES`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

from utils.errors import UserError
from utils.python_file import load_function, naming_lines

if TYPE_CHECKING:
    from torch import nn

OFFLINE = "without network, put the file there beforehand"


@dataclass(frozen=True)
class Provider:
    """Where networks come from. `build(name, num_classes, pretrained)` gets a name that `knows` holds for, without prefix."""

    names: Callable[[], Collection[str]]
    knows: Callable[[str], bool]
    has_weights: Callable[[str], bool]
    build: Callable[[str, int, bool], nn.Module]


def split_name(name: str) -> tuple[Provider | None, str]:
    """The source that a name's prefix says, and the rest of it; None and the whole name where it has no such prefix."""
    prefix, slash, rest = name.partition("/")
    return (SOURCES[prefix], rest) if slash and prefix in SOURCES else (None, name)


def has_weights(name: str) -> bool:
    """Whether `--pretrained` can be given with this name, one of `SOURCES`."""
    source, rest = split_name(name)
    return source is not None and source.has_weights(rest)


def build_from_source(name: str, *, num_classes: int, pretrained: bool) -> nn.Module:
    """The network of a name with a prefix of `SOURCES`, in training mode; raises UserError where the source has none such."""
    source, rest = split_name(name)
    network = source.build(rest, num_classes, pretrained)
    return network.train()


def build_from_file(name: str, *, num_classes: int) -> nn.Module:
    """What `FUNCTION(num_classes=num_classes)` of `FILE.py:FUNCTION` returns. Raises UserError if that is no network."""
    from torch import nn

    function = load_function(name)
    with naming_lines(name):
        network = function(num_classes=num_classes)
    if not isinstance(network, nn.Module):
        raise UserError(f"{name}: must return an nn.Module, not {type(network).__name__}")
    return network


# ---- torchvision -------------------------------------------------------------------------------------------------------

# Only logits are asked for, and the published weights of these expect images in another range, which they change themselves.
_GOOGLE_NETWORKS = ("googlenet", "inception_v3")


def _torchvision() -> Any:
    from torchvision import models

    return models


@cache
def _torchvision_names() -> tuple[str, ...]:
    return tuple(_torchvision().list_models(module=_torchvision()))


def _build_torchvision(name: str, num_classes: int, pretrained: bool) -> nn.Module:
    options: dict[str, Any] = {}
    if name in _GOOGLE_NETWORKS:
        options = {"aux_logits": False, "init_weights": True, "transform_input": pretrained}
    network = _torchvision().get_model(name, weights=None, num_classes=num_classes, **options)
    if pretrained:
        _load_published(network, name)
    return network


def _load_published(network: nn.Module, name: str) -> None:
    """Loads the ImageNet weights; a classifier for other classes stays new."""
    weights = _torchvision().get_model_weights(name).DEFAULT
    state = torchvision_weights(f"torchvision/{name}", weights)
    own = network.state_dict()
    network.load_state_dict({key: state[key] if _fits(state, key, value) else value for key, value in own.items()})


def _fits(state: dict[str, Any], key: str, value: Any) -> bool:
    return key in state and state[key].shape == value.shape


def torchvision_weights(name: str, weights: Any) -> dict[str, Any]:
    """A state dict that torchvision publishes, from torch hub's folder (in TORCH_HOME) or else downloaded into it."""
    try:
        return weights.get_state_dict(progress=False, check_hash=True)
    except (OSError, RuntimeError) as error:
        raise UserError(
            f"--pretrained: the weights of {name} could not be downloaded from {weights.url} to hub/checkpoints in TORCH_HOME "
            f"({error}); {OFFLINE}"
        ) from error


def normalisation_of_torchvision(name: str) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and deviation, as torchvision's weights of this name say."""
    preset = _torchvision().get_model_weights(name).DEFAULT.transforms()
    return tuple(map(float, preset.mean)), tuple(map(float, preset.std))


def _torchvision_has_weights(name: str) -> bool:
    return bool(len(_torchvision().get_model_weights(name)))


# ---- timm --------------------------------------------------------------------------------------------------------------


def _timm() -> Any:
    try:
        import timm
    except ImportError as error:
        raise UserError("timm/NAME: timm is not installed, pip install timm") from error
    return timm


@cache
def _timm_names() -> tuple[str, ...]:
    return tuple(_timm().list_models())


def _knows_timm(name: str) -> bool:
    """Whether there is such an architecture, and where a name has a tag (`resnet50.a1_in1k`) such weights."""
    timm = _timm()
    if "/" in name or ":" in name or not timm.is_model(name):
        return False
    architecture, dot, _ = name.partition(".")
    return not dot or name in timm.list_pretrained(architecture)


def _timm_has_weights(name: str) -> bool:
    return _timm().models.is_model_pretrained(name)


def normalisation_of_timm(name: str) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and deviation, as timm's weights of this name say."""
    published = _timm().models.get_pretrained_cfg(name)
    return tuple(map(float, published.mean)), tuple(map(float, published.std))


def _build_timm(name: str, num_classes: int, pretrained: bool) -> nn.Module:
    timm = _timm()
    try:
        return timm.create_model(name, pretrained=pretrained, num_classes=num_classes)
    except Exception as error:  # the hub's client has many ways to say that it has no network
        if not pretrained:
            raise
        reason = " ".join(str(error).split())
        raise UserError(
            f"--pretrained: the weights of timm/{name} are not in HF_HOME and could not be downloaded ({reason}); {OFFLINE}"
        ) from error


SOURCES = {
    "timm": Provider(_timm_names, _knows_timm, _timm_has_weights, _build_timm),
    "torchvision": Provider(
        _torchvision_names, lambda name: name in _torchvision_names(), _torchvision_has_weights, _build_torchvision
    ),
}
