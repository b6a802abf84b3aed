"""Which filters stay: the layers that can be pruned, the proportion that each retains, and the choice by a criterion.

A filter is an output of a convolution or, where they are asked for, a hidden unit of an MLP.
"""

import fnmatch
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from models.graph.layers import PrunableLayer
from prune.criteria import CRITERIA, Criterion
from utils.errors import ParameterError, UserError, naming

Ratios = Mapping[str, float | None]  # the proportion that each layer retains; None is as much as a budget pays for


def keep_ratios(
    layers: Sequence[PrunableLayer], rates: Sequence[float] | None, *, exclude: Sequence[str] = ()
) -> dict[str, float | None]:
    """The proportion of filters that each layer retains, by name, with some layers excluded.

    `rates` is one value for all layers or one a layer, None for what a budget pays for; excluded layers are counted there too,
    and retain everything. In `exclude` stand names, or patterns of the shell such as `layer4.*`.
    Raises UserError for a value outside (0, 1], a wrong number of values, a name that is not among the layers, or a layer
    whose weight is computed from other parameters (weight norm, a parametrization): there is no filter to set to 0.
    """
    names = [layer.name for layer in layers]
    for rate in rates or ():
        _check_keep_ratio(rate)
    if rates is not None and len(rates) not in (1, len(names)):
        raise ParameterError("keep_ratios", None, f"{len(rates)} values for {len(names)} layers: give 1 or {len(names)}")
    unknown = [pattern for pattern in exclude if not fnmatch.filter(names, pattern)]
    if unknown:
        raise ParameterError("exclude", unknown, f"no such layer: choose from {', '.join(names)}")
    excluded = {name for pattern in exclude for name in fnmatch.filter(names, pattern)}
    each = rates if rates is not None and len(rates) == len(names) else [rates[0] if rates else None] * len(names)
    ratios = {name: 1.0 if name in excluded else ratio for name, ratio in zip(names, each, strict=True)}
    for layer in layers:
        if ratios[layer.name] != 1 and "weight" not in dict(layer.module.named_parameters(recurse=False)):
            raise UserError(f"{layer.name}: its weight is computed from other parameters; exclude it")
    return ratios


def _check_keep_ratio(keep_ratio: float) -> None:
    if not 0 < keep_ratio <= 1:
        raise ParameterError("keep_ratio", keep_ratio, "the proportion retained must be above 0 and at most 1")


def keep_count(filters: int, keep_ratio: float, *, multiple: int = 1) -> int:
    """How many of `filters` stay: the multiple of `multiple` nearest to `filters * keep_ratio`, at least one multiple.

    Halves go to the even side, as Python rounds (2.5 to 2, 3.5 to 4). Never more than `filters`, and all of them at a ratio
    of 1, whether that is a multiple or not. Raises UserError for a ratio outside (0, 1] or a multiple below 1.
    """
    _check_keep_ratio(keep_ratio)
    if multiple < 1:
        raise ParameterError("multiple", multiple, "must be 1 or more")
    if keep_ratio == 1:
        return filters
    return min(filters, multiple * max(1, round(filters * keep_ratio / multiple)))


def losing_layers(layers: Sequence[PrunableLayer], ratios: Ratios, *, multiple: int = 1) -> list[PrunableLayer]:
    """Those of `layers` that have to give up filters: not where all are retained, nor a depthwise convolution."""
    return [
        layer for layer in layers if _kept_a_group(layer, ratios[layer.name], multiple=multiple) < layer.filters // layer.groups
    ]


def check_criterion(layers: Sequence[PrunableLayer], ratios: Ratios, *, criterion: str, multiple: int = 1) -> None:
    """Raises UserError unless the layers that lose filters have what the criterion reads of the network."""
    if "bn_weight" in CRITERIA[criterion].inputs:
        without = [layer.name for layer in losing_layers(layers, ratios, multiple=multiple) if layer.bn_weight is None]
        if without:
            raise ParameterError(
                "criterion",
                criterion,
                f"no batch norm with a weight reads {', '.join(without)} alone: "
                "exclude what has none, or choose another criterion",
            )
    if CRITERIA[criterion].needs_maps:
        losing = losing_layers(layers, ratios, multiple=multiple)
        others = [layer.name for layer in losing if not layer.has_images and not layer.is_linear]
        if others:
            raise ParameterError(
                "criterion", criterion, f"scores maps of two axes, {', '.join(others)} has others: exclude it, or choose another"
            )
    if CRITERIA[criterion].needs_maps and any(layer.is_linear for layer in layers):
        raise ParameterError("linear", None, f"not with {criterion}, which scores feature maps: a hidden unit has none")


def choose_filters(
    layers: Sequence[PrunableLayer],
    ratios: Ratios,
    *,
    criterion: str,
    multiple: int = 1,
    gamma: float = 0.5,
    gm_distance: str = "euclidean",
    generator: torch.Generator | None = None,
    **sampled: Mapping[str, Tensor] | None,
) -> dict[str, Tensor]:
    """The filters that stay, by layer: sorted indices, int64, on the CPU.

    The lowest scores go; of equal scores the lower index goes first. A grouped convolution loses the same number in every
    group, or it would be no grouped convolution any more; so a depthwise one, with one filter a group, keeps all that
    the convolution before it keeps. Filters that a group norm takes together go together, by the sum of their scores. `sampled`
    is what the criterion reads beyond the layers, by the names of `score_filters`. Raises UserError for an unknown criterion, one
    that lacks what it reads or a batch norm, or weights that are not finite.
    """
    if criterion not in CRITERIA:
        raise ParameterError("criterion", criterion, f"choose from {', '.join(CRITERIA)}")
    losing = losing_layers(layers, ratios, multiple=multiple)
    # Random scores are drawn for every layer, so that what one retains does not change the choice in the next.
    scored = layers if "generator" in CRITERIA[criterion].inputs else losing
    options = {"gamma": gamma, "gm_distance": gm_distance, "generator": generator}
    scores = score_filters(scored, criterion=criterion, **sampled, **options)
    kept = {
        layer.name: _highest(layer, scores[layer.name], ratios[layer.name], multiple=multiple)
        if layer in scored
        else torch.arange(layer.filters)
        for layer in layers
    }
    return followed(kept, layers, ratios)


def followed(kept: Mapping[str, Tensor], layers: Sequence[PrunableLayer], ratios: Ratios) -> dict[str, Tensor]:
    """`kept` with the filters that depthwise convolutions keep because of those that they read, but where all stay."""
    by_name = {layer.name: layer for layer in layers}

    def keeps(name: str) -> Tensor:
        follows = by_name[name].follows
        return keeps(follows) if follows in by_name and ratios[name] != 1 else kept[name]

    return {name: keeps(name) for name in kept}


def score_filters(
    layers: Sequence[PrunableLayer],
    *,
    criterion: str,
    gradients: Mapping[str, Tensor] | None = None,
    importance: Mapping[str, Tensor] | None = None,
    feature_maps: Mapping[str, Tensor] | None = None,
    removal_order: Mapping[str, Tensor] | None = None,
    group_squares: Mapping[str, Tensor] | None = None,
    left: Mapping[str, Sequence[int]] | None = None,
    **options: Any,
) -> dict[str, Tensor]:
    """The scores (F,) of each layer's filters, by its name, on the CPU; `options` are what the criterion may ask for.

    Where `left` has the layer, those of its filters alone are scored, as if there were no others, whose scores are NaN.
    Raises UserError, with the layer's name, where the criterion lacks its gradient or a batch norm.
    """
    scores = {}
    for layer in layers:
        read = {"weight": layer.weight, "bn_weight": layer.bn_weight}
        sampled = {"grad": gradients, "importance": importance, "feature_maps": feature_maps, "group_squares": group_squares}
        sampled["removal_order"] = removal_order
        read |= {name: (of or {}).get(layer.name) for name, of in sampled.items()}
        rows = torch.tensor(sorted((left or {}).get(layer.name, range(layer.filters))), dtype=torch.int64)
        with naming(layer.name):
            scores[layer.name] = _of_rows(CRITERIA[criterion], rows, read, **options)
    return scores


def _of_rows(criterion: Criterion, rows: Tensor, read: Mapping[str, Tensor | None], **options: Any) -> Tensor:
    """The scores of the filters `rows` of what is `read` of a layer, NaN for others; random ones are drawn for all."""
    filters = len(read["weight"])
    if len(rows) == filters or "generator" in criterion.inputs:
        return criterion(**read, **options).cpu()
    scores = torch.full((filters,), torch.nan)
    if len(rows):
        scores[rows] = criterion(
            **{name: of if of is None else of[rows.to(of.device)] for name, of in read.items()}, **options
        ).cpu()
    return scores


def _highest(layer: PrunableLayer, scores: Tensor, keep_ratio: float, *, multiple: int) -> Tensor:
    """Indices of the highest of `scores` (F,), equally many in each of the layer's groups, in whole blocks, sorted."""
    filters = torch.arange(layer.filters).view(layer.groups, -1, layer.block)
    scores = scores.view_as(filters).sum(2)  # (groups, blocks)
    blocks = _kept_a_group(layer, keep_ratio, multiple=multiple) // layer.block
    highest = scores.argsort(dim=1, stable=True)[:, scores.shape[1] - blocks :]  # (groups, blocks that stay)
    return filters.gather(1, highest.unsqueeze(2).expand(-1, -1, layer.block)).flatten().sort().values


def _kept_a_group(layer: PrunableLayer, keep_ratio: float | None, *, multiple: int) -> int:
    # The smallest step a group that makes the whole layer a multiple.
    step = math.lcm(multiple // math.gcd(multiple, layer.groups), layer.block)
    filters = layer.filters // layer.groups
    return min(filters, step) if keep_ratio is None else keep_count(filters, keep_ratio, multiple=step)
