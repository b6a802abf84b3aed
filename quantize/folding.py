"""Batch norms folded into the weights before them and one shift a channel, where evaluation computes the same.

A network keeps its structure: a folded norm has running statistics of 0 and 1, weight 1, and the shift as its bias, so that
it loads, trains and exports as before.
"""

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from models.graph import ChannelGraph
from models.graph.roles import norm_pairs


@torch.no_grad()
def fold_norms(network: nn.Module, *, example: Tensor | None = None) -> dict[str, str]:
    """Folds in place; returns the names of convolutions and linear layers, each with that of the norm folded into it.

    A norm that is not folded, because others read what is before it, is brought into the same form with its own weight. Norms
    without running statistics or without weight and bias stay as they are.
    """
    pairs = {
        name: norm for name, norm in norm_pairs(ChannelGraph(network, example)).items() if _is_plain(network.get_submodule(norm))
    }
    for name, norm in pairs.items():
        _fold(network.get_submodule(name), network.get_submodule(norm))
    for norm in network.modules():
        if _is_plain(norm):
            _reduce(norm)
    return pairs


def _is_plain(norm: nn.Module) -> bool:
    return isinstance(norm, _BatchNorm) and norm.track_running_stats and norm.affine


def _fold(layer: nn.Module, norm: _BatchNorm) -> None:
    _reduce(norm)
    layer.weight.mul_(norm.weight.view(-1, *[1] * (layer.weight.dim() - 1)))
    if layer.bias is not None:
        norm.bias.addcmul_(layer.bias, norm.weight)
        layer.bias.zero_()
    norm.weight.fill_(1)


def _reduce(norm: _BatchNorm) -> None:
    """What the norm does in evaluation, by its weight and bias alone."""
    scale = norm.weight.double() * torch.rsqrt(norm.running_var.double() + norm.eps)
    norm.bias.copy_(norm.bias.double() - norm.running_mean.double() * scale)
    norm.weight.copy_(scale)
    norm.running_mean.zero_()
    norm.running_var.fill_(1 - norm.eps)
    norm.num_batches_tracked.zero_()
