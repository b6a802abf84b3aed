"""Batch norms as training leaves them, for networks that are new."""

from torch import nn


def fill_norms(model: nn.Module) -> None:
    """Gives every batch norm random weights and statistics."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.2)
            module.running_mean.normal_(std=0.2)
            module.running_var.uniform_(0.5, 1.5)
