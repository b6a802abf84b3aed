"""The networks, by name. A new one is an entry in `MODELS`: a function of `num_classes` whose module has `outputs(x)`."""

from collections.abc import Callable
from functools import partial

from torch import nn

from models.alexnet import AlexNet
from models.cifar_resnet import CifarResNet
from models.imagenet_resnet import build_imagenet_resnet
from utils.errors import UserError

MODELS: dict[str, Callable[..., nn.Module]] = {
    "alexnet": AlexNet,
    **{f"resnet{depth}": partial(CifarResNet, depth=depth) for depth in (20, 32, 44, 56, 110)},
    **{name: partial(build_imagenet_resnet, name) for name in ("resnet18", "resnet34", "resnet50", "resnet101", "resnet152")},
}
PRETRAINED_MODELS = frozenset(name for name, build in MODELS.items() if getattr(build, "func", None) is build_imagenet_resnet)


def build_model(name: str, *, num_classes: int, pretrained: bool = False) -> nn.Module:
    """A new network with `forward(x) -> logits` and `outputs(x) -> Outputs`, initialised from torch's global generator.

    `pretrained` loads torchvision's ImageNet weights. Raises UserError for an unknown name or a network without them.
    """
    if name not in MODELS:
        raise UserError(f"unknown model {name!r}: choose from {', '.join(MODELS)}")
    if not pretrained:
        return MODELS[name](num_classes=num_classes)
    if name not in PRETRAINED_MODELS:
        raise UserError(f"--pretrained: no published weights for {name!r}: choose from {', '.join(sorted(PRETRAINED_MODELS))}")
    return MODELS[name](num_classes=num_classes, pretrained=True)
