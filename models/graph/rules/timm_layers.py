"""Layers of timm that are more than the class of torch they inherit from. Named by path: timm may be missing."""

from dataclasses import replace

import torch
from torch import nn

from models.graph.call import Call, opaque, rule, through, unshared
from models.graph.channels import Channels, LayerCut, Step
from models.graph.rules.layers import batch_norm, conv, group_norm, linear
from models.graph.rules.pointwise import pointwise
from models.graph.rules.space import spatial

_ACTIVATIONS = ["Swish", "Mish", "HardSwish", "HardMish", "Sigmoid", "Tanh", "HardSigmoid", "GELU", "GELUTanh", "QuickGELU"]

rule("timm.layers.conv2d_same.Conv2dSame")(conv)
rule("timm.layers.linear.Linear")(linear)
rule("timm.layers.norm.GroupNorm")(group_norm)
rule("timm.layers.pool2d_same.AvgPool2dSame", "timm.layers.pool2d_same.MaxPool2dSame")(spatial)
rule("timm.layers.drop.DropPath", "timm.layers.drop.DropBlock2d")(through)
rule(*(f"timm.layers.activations.{name}" for name in _ACTIVATIONS))(pointwise)


@rule(*(f"timm.layers.std_conv.{name}" for name in ("StdConv2d", "StdConv2dSame", "ScaledStdConv2d", "ScaledStdConv2dSame")))
@unshared
def standardised_conv(call: Call) -> Step:
    """Weight standardisation (Qiao et al., 2019): a filter's weights minus their mean, over their deviation.

    Filters go as in any convolution. Their inputs stay: mean and deviation are taken over all of them, zeros included.
    """
    layer, given = call.module, call.channels(call.source)
    if given is not None and (given.flat or (given.axis, given.full) != (1, layer.in_channels)):
        return opaque(call)
    rows = call.outputs_of_layer(None, layer.out_channels)
    out = Channels(layer.out_channels, rows, 1, 4)
    if not rows:
        return call.step(replace(out, vanished=call.vanishing(given)))
    if layer.groups > 1 and len(rows) < layer.out_channels:
        return replace(opaque(call), why_whole="it standardises its weights in groups")
    wants = {call.source: given.whole()} if given is not None else {}
    reads = tuple(range(layer.in_channels // layer.groups))
    cut = LayerCut(rows, (reads,)) if layer.groups == 1 else None
    return call.step(out, wants=wants, cut=cut)


@rule("timm.layers.norm_act.BatchNormAct2d")
def batch_norm_with_activation(call: Call) -> Step:
    """A batch norm, then an activation: channels can go where it leaves zero as it is."""
    return batch_norm(call) if _keeps_zero(call.module.act) else opaque(call)


@rule("timm.layers.norm_act.GroupNormAct")
def group_norm_with_activation(call: Call) -> Step:
    return group_norm(call) if _keeps_zero(call.module.act) else opaque(call)


def _keeps_zero(activation: nn.Module) -> bool:
    like = next(activation.parameters(), torch.empty(0))
    zeros = torch.zeros(1, 1, 1, 1, dtype=like.dtype, device=like.device)
    with torch.no_grad():
        return bool((activation(zeros.clone()) == zeros).all())
