"""What criteria such as `filter-hrank` score filters by: a mean over training images of something of their feature maps."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from models.graph import ChannelGraph, inputs_in_order
from models.graph.features import maps_of_convolutions
from models.graph.layers import PrunableLayer
from models.graph.walk import Inputs
from prune.gradients import batch_size
from utils.errors import ParameterError, UserError
from utils.modes import without_trace


@torch.no_grad()
def mean_of_maps(
    graph: ChannelGraph,
    batches: Iterable[tuple[Inputs, Any]],
    *,
    layers: Sequence[PrunableLayer],
    of_maps: Callable[[Tensor], Tensor],
    all_reduce: Callable[[Tensor], object] | None = None,
) -> dict[str, Tensor]:
    """The mean (F,) over the images of `batches` of `of_maps(maps)` (B, F), by layer name, in float64.

    `maps` (B, F, H, W) are those of the layer's filters behind the batch norm, the residual sum and the activation that follow
    it. `batches` gives (images, labels) on the network's device. One pass in evaluation, in the memory of a
    training step; it leaves no trace: modes and torch's default random streams are as before.

    Among several processes `all_reduce` adds a tensor up over them in place (`torch.distributed.all_reduce`); all of them
    then return the same. Raises UserError for no batch at all, a layer that has no maps, or maps that are not finite.
    """
    names, model = [layer.name for layer in layers], graph.network
    find_maps = maps_of_convolutions(graph, names)
    sums = [torch.zeros(layer.filters, dtype=torch.float64, device=layer.module.weight.device) for layer in layers]
    seen = torch.zeros((), dtype=torch.float64, device=sums[0].device)
    with without_trace(model):
        model.eval()
        for images, _ in batches:
            for name, total, maps in zip(names, sums, find_maps(model, *inputs_in_order(model, images)), strict=True):
                _check_finite(name, maps)
                total += of_maps(maps).double().sum(0)
            seen += batch_size(images)
    for total in (*sums, seen) if all_reduce is not None else ():
        all_reduce(total)
    if not seen:
        raise ParameterError("samp_batches", None, "not one training batch to look at feature maps of: give 1 or more")
    return {name: total / seen for name, total in zip(names, sums, strict=True)}


def _check_finite(name: str, maps: Tensor) -> None:
    if not maps.isfinite().all():
        raise UserError(f"the feature maps of {name} are NaN or infinite: check the network that is pruned")
