"""The networks, by name. A new one is an entry in `MODELS`: a function of `num_classes` whose module has `outputs(x)`.

Networks of others have names that say where they come from: `models.sources`. What builds a network is imported when one is
built: the names alone are known at once.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from difflib import get_close_matches
from functools import partial
from typing import TYPE_CHECKING, Any

from models.repdistiller import NETWORKS as REPDISTILLER_NETWORKS
from models.repdistiller import build_repdistiller
from models.sources import SOURCES, build_from_file, build_from_source, has_weights, split_name
from utils.errors import ParameterError, UserError, printable, shown
from utils.python_file import check_function, function_of, names_function

if TYPE_CHECKING:
    from torch import nn


def _alexnet(**options: Any) -> nn.Module:
    from models.alexnet import AlexNet

    return AlexNet(**options)


def _cifar_resnet(**options: Any) -> nn.Module:
    from models.cifar_resnet import CifarResNet

    return CifarResNet(**options)


def _imagenet_resnet(name: str, **options: Any) -> nn.Module:
    from models.imagenet_resnet import build_imagenet_resnet

    return build_imagenet_resnet(name, **options)


PRETRAINED_MODELS = frozenset(("resnet18", "resnet34", "resnet50", "resnet101", "resnet152"))
MODELS: dict[str, Callable[..., nn.Module]] = {
    "alexnet": _alexnet,
    **{f"resnet{depth}": partial(_cifar_resnet, depth=depth) for depth in (8, 20, 32, 44, 56, 110)},
    **{name: partial(_imagenet_resnet, name) for name in sorted(PRETRAINED_MODELS, key=lambda name: int(name[6:]))},
    **{f"repdistiller/{name}": partial(build_repdistiller, name) for name in REPDISTILLER_NETWORKS},
}
SHOWN_NAMES, LONGEST_NAME = 6, 80
NAMES = "one of this repository's networks, repdistiller/NAME, timm/NAME, torchvision/NAME or FILE.py:FUNCTION"


def build_model(name: str, *, num_classes: int, pretrained: bool = False) -> nn.Module:
    """A new network with `forward(x) -> logits` and `outputs(x) -> Outputs`, initialised from torch's global generator.

    `name` is one of `MODELS`, `timm/NAME`, `torchvision/NAME`, or `FILE.py:FUNCTION`, a function that is called with
    `num_classes=` and returns an nn.Module: its file runs, so pass no such name on that a file brought. The keys of
    `state_dict()` are the network's own. `pretrained` loads the weights that the source publishes; the classifier stays new
    where they are for other classes. Raises UserError for an unknown name, a network without such weights, or weights that
    are neither on the disk nor can be downloaded.
    """
    check_model(name)
    if pretrained:
        _check_pretrained(name)
    if name in MODELS:
        return MODELS[name](num_classes=num_classes, **({"pretrained": True} if pretrained else {}))
    from models.graph.features import with_outputs

    if names_function(name):
        return with_outputs(build_from_file(name, num_classes=num_classes))
    return with_outputs(build_from_source(name, num_classes=num_classes, pretrained=pretrained))


def published_normalisation(name: str) -> tuple[tuple[float, ...], tuple[float, ...]] | None:
    """Mean and deviation of the images that the published weights of a network were trained on; None where nobody says them."""
    from models.sources import normalisation_of_timm, normalisation_of_torchvision

    prefix, slash, rest = name.partition("/")
    if name in PRETRAINED_MODELS:
        return normalisation_of_torchvision(name)
    if slash and prefix in ("torchvision", "timm") and has_weights(name):
        return (normalisation_of_timm if prefix == "timm" else normalisation_of_torchvision)(rest)
    return None


def build_on_meta(name: str, *, num_classes: int) -> nn.Module:
    """`build_model` without memory for the values, so that it costs nothing however large a network a file claims to hold.

    A few networks look at values while they are built; these are built whole.
    """
    import torch

    try:
        with torch.device("meta"):
            return build_model(name, num_classes=num_classes)
    except (UserError, RuntimeError):
        return build_model(name, num_classes=num_classes)


def check_model(name: str) -> None:
    """Raises UserError for a name that `build_model` does not know. Runs no code of a file that it names."""
    if names_function(name):
        return check_function(name)
    if name in MODELS:
        return
    source, rest = split_name(name)
    if source is None or not source.knows(rest):
        raise UserError(f"unknown network {shown(name)}: {_nearest(name[:LONGEST_NAME])}")


def trusted_model(named: str, given: str | None, *, model_flag: str = "--model") -> str:
    """The name to build a network by, of which a file says that it is `named` and the user, with `model_flag`, `given`.

    Only `given` may name a Python file: one that the file `named` is somebody else's word. The two may lie in different
    places, but must name the same function. Raises UserError where they disagree, or the network is unknown.
    """
    if names_function(named):
        if given is None:
            wanted = f"{model_flag} FILE.py:{printable(function_of(named))}"
            raise UserError(
                f"holds a {printable(named)}, code that never runs because a file names it; say where yours is, {wanted}"
            )
        if names_function(given) and function_of(given) == function_of(named):
            return given
    if given not in (None, named):
        raise UserError(f"holds a {printable(named)}, not the {given} of {model_flag}")
    check_model(named)
    return named


def _check_pretrained(name: str) -> None:
    if name not in PRETRAINED_MODELS and (names_function(name) or not has_weights(name)):
        choices = f"{', '.join(sorted(PRETRAINED_MODELS))}, or a network of timm or torchvision that has some"
        raise ParameterError("pretrained", None, f"no published weights for {name!r}: choose {choices}")


def _nearest(name: str) -> str:
    """The names that may have been meant: of the source that was named, or else of all."""
    source, rest = split_name(name)
    prefixes = [prefix for prefix in SOURCES if prefix != "timm" or importlib.util.find_spec("timm") is not None]
    names = {} if source is not None else {own: own for own in MODELS}
    for prefix in prefixes:
        if source in (None, SOURCES[prefix]):
            names |= {f"{prefix}/{own}": own for own in SOURCES[prefix].names()}
    close = get_close_matches(rest.partition(".")[0], dict.fromkeys(names.values()), n=SHOWN_NAMES)
    found = sorted((full for own in close for full in names if names[full] == own), key=lambda full: full not in MODELS)
    found = found[:SHOWN_NAMES]
    own = [name for name in MODELS if "/" not in name]
    return f"the nearest are {', '.join(found)}" if found else f"choose {NAMES}; this repository has {', '.join(own)}"
