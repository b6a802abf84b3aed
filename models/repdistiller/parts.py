"""What the families share: how convolutions start, and how channels are shuffled."""

from torch import Tensor, nn


def init_convolutions(network: nn.Module) -> None:
    """Normal weights of variance 2 / fan-out (He et al., ICCV 2015, eq. 14), biases 0."""
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)


def init_classifier(linear: nn.Linear) -> None:
    """Normal weights of deviation 0.01, biases 0."""
    nn.init.normal_(linear.weight, std=0.01)
    nn.init.zeros_(linear.bias)


def shuffle_channels(x: Tensor, groups: int) -> Tensor:
    """(B, g * c, H, W) -> the same, the c channels of each of the g groups dealt out in turn."""
    batch, channels, height, width = x.shape
    return x.view(batch, groups, channels // groups, height, width).transpose(1, 2).reshape(batch, channels, height, width)
