"""Which filters stay: the layers that can be pruned, the proportion that each retains, and the choice by a criterion.

A filter is an output of a convolution or, where they are asked for, a hidden unit of an MLP.
"""

import fnmatch
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from models.graph.roles import BATCH_NORMS, classifying_layers, depthwise_producers, hidden_layers, norm_pairs
from prune.criteria import CRITERIA, Criterion
from utils.errors import UserError, naming


@dataclass(frozen=True, eq=False)
class PrunableLayer:
    """A convolution or linear layer, and the batch or group norm that reads it: a pruned filter is cleared in both.

    A depthwise convolution `follows` the one whose channels it reads, if that is a single one: it keeps the same filters.
    """

    name: str
    module: nn.Conv2d | nn.Linear
    norm_name: str | None = None
    norm: nn.Module | None = None
    follows: str | None = None

    @property
    def filters(self) -> int:
        return self.module.out_features if self.is_linear else self.module.out_channels

    @property
    def is_linear(self) -> bool:
        return isinstance(self.module, nn.Linear)

    @property
    def groups(self) -> int:
        """The groups of a grouped convolution, which lose equally many filters."""
        return 1 if self.is_linear else self.module.groups

    @property
    def block(self) -> int:
        """How many neighbouring filters go together: those that a group norm normalises by one mean and deviation."""
        return self.norm.num_channels // self.norm.num_groups if isinstance(self.norm, nn.GroupNorm) else 1

    @property
    def bn_weight(self) -> Tensor | None:
        """The weight (F,) of the batch norm, where there is one."""
        return None if isinstance(self.norm, nn.GroupNorm) else getattr(self.norm, "weight", None)

    def own_parameters(self) -> dict[str, Tensor]:
        """Weight and, where there is one, bias, by their keys in the network's state dict."""
        return _existing(self.name, self.module, "weight", "bias")

    def zeroed(self) -> dict[str, Tensor]:
        """All that is 0 for a filter that gives only zeros, by its key: rows of the convolution and of its batch norm."""
        return self.own_parameters() | _zeros_of_norm(self.norm_name, self.norm)


@dataclass(frozen=True, eq=False)
class SharedNorm:
    """A batch or group norm that reads the filters of several convolutions, or of one among other readers.

    It has no scores of its own: an entry goes with the filters that it reads (`prune.groups`).
    """

    name: str
    norm: nn.Module
    norm_name: None = None

    @property
    def filters(self) -> int:
        return self.norm.num_channels if isinstance(self.norm, nn.GroupNorm) else self.norm.num_features

    def own_parameters(self) -> dict[str, Tensor]:
        return {}

    def zeroed(self) -> dict[str, Tensor]:
        """All that is 0 for an entry that gives only zeros of a map of zeros, by its key."""
        return _zeros_of_norm(self.name, self.norm)


def shared_norms(model: nn.Module, layers: Sequence[PrunableLayer]) -> list[SharedNorm]:
    """The batch and group norms of `model` that belong to none of `layers`."""
    owned = {layer.norm_name for layer in layers}
    norms = [(name, module) for name, module in model.named_modules() if isinstance(module, (*BATCH_NORMS, nn.GroupNorm))]
    return [SharedNorm(name, norm) for name, norm in norms if name not in owned]


def _zeros_of_norm(name: str | None, norm: nn.Module | None) -> dict[str, Tensor]:
    # Without weight and bias it gives `-mean / std` for a map of zeros in evaluation: its mean is 0 as well.
    return _existing(name, norm, "weight", "bias") or _existing(name, norm, "running_mean")


def _existing(name: str | None, layer: nn.Module | None, *tensors: str) -> dict[str, Tensor]:
    found = {f"{name}.{key}": getattr(layer, key, None) for key in tensors}
    return {key: tensor for key, tensor in found.items() if tensor is not None}


def prunable_layers(model: nn.Module, *, linear: bool = False, example: Tensor | None = None) -> list[PrunableLayer]:
    """Every `nn.Conv2d` of `model` but one that classifies, in `named_modules()` order: the order of `--prune-rates`.

    With `linear` also every linear layer whose outputs are hidden units of an MLP. A batch or group norm belongs to a layer if
    it reads its output directly, and neither of them is used twice. Pass the bare network, not one wrapped by `torch.compile`
    or DistributedDataParallel, whose names differ. Raises UserError where torch.fx cannot trace it or it has nothing to prune.
    `example` is for networks whose Python asks for sizes.
    """
    norm_names = norm_pairs(model, example=example)
    classifiers = classifying_layers(model, example=example)
    producers = depthwise_producers(model, example=example)
    hidden = hidden_layers(model, example=example) if linear else ()
    layers = []
    for name, module in model.named_modules():
        if name in hidden or (isinstance(module, nn.Conv2d) and name not in classifiers):
            norm_name = norm_names.get(name)
            norm = model.get_submodule(norm_name) if norm_name else None
            layers.append(PrunableLayer(name, module, norm_name, norm, follows=producers.get(name)))
    if not layers:
        raise UserError(f"{type(model).__name__} has no layer to prune")
    return layers


def keep_ratios(layers: Sequence[PrunableLayer], rates: Sequence[float], *, exclude: Sequence[str] = ()) -> dict[str, float]:
    """The proportion of filters that each layer retains, by name: `--prune-rates` and `--exclude-layers`.

    `rates` is one value for all layers or one a layer; excluded layers are counted there too, and retain everything. In
    `exclude` stand names, or patterns of the shell such as `layer4.*`.
    Raises UserError for a value outside (0, 1], a wrong number of values, a name that is not among the layers, or a layer
    whose weight is computed from other parameters (weight norm, a parametrization): there is no filter to set to 0.
    """
    names = [layer.name for layer in layers]
    for rate in rates:
        _check_keep_ratio(rate)
    if len(rates) not in (1, len(names)):
        raise UserError(f"--prune-rates: {len(rates)} values for {len(names)} layers: give 1 or {len(names)}")
    unknown = [pattern for pattern in exclude if not fnmatch.filter(names, pattern)]
    if unknown:
        raise UserError(f"--exclude-layers {' '.join(unknown)}: no such layer: choose from {', '.join(names)}")
    excluded = {name for pattern in exclude for name in fnmatch.filter(names, pattern)}
    each = rates if len(rates) == len(names) else [rates[0]] * len(names)
    ratios = {name: 1.0 if name in excluded else ratio for name, ratio in zip(names, each, strict=True)}
    for layer in layers:
        if ratios[layer.name] < 1 and "weight" not in dict(layer.module.named_parameters(recurse=False)):
            raise UserError(f"{layer.name}: its weight is computed from other parameters; add it to --exclude-layers")
    return ratios


def _check_keep_ratio(keep_ratio: float) -> None:
    if not 0 < keep_ratio <= 1:
        raise UserError(f"--prune-rates {keep_ratio}: the proportion retained must be above 0 and at most 1")


def keep_count(filters: int, keep_ratio: float, *, multiple: int = 1) -> int:
    """How many of `filters` stay: the multiple of `multiple` nearest to `filters * keep_ratio`, at least one multiple.

    Halves go to the even side, as Python rounds (2.5 to 2, 3.5 to 4). Never more than `filters`, and all of them at a ratio
    of 1, whether that is a multiple or not. Raises UserError for a ratio outside (0, 1] or a multiple below 1.
    """
    _check_keep_ratio(keep_ratio)
    if multiple < 1:
        raise UserError(f"--channel-multiple {multiple}: must be 1 or more")
    if keep_ratio == 1:
        return filters
    return min(filters, multiple * max(1, round(filters * keep_ratio / multiple)))


def losing_layers(layers: Sequence[PrunableLayer], ratios: Mapping[str, float], *, multiple: int = 1) -> list[PrunableLayer]:
    """Those of `layers` that have to give up filters: not where all are retained, nor a depthwise convolution."""
    return [
        layer for layer in layers if _kept_a_group(layer, ratios[layer.name], multiple=multiple) < layer.filters // layer.groups
    ]


def check_criterion(layers: Sequence[PrunableLayer], ratios: Mapping[str, float], *, criterion: str, multiple: int = 1) -> None:
    """Raises UserError unless the layers that lose filters have what the criterion reads of the network."""
    if "bn_weight" in CRITERIA[criterion].inputs:
        without = [layer.name for layer in losing_layers(layers, ratios, multiple=multiple) if layer.bn_weight is None]
        if without:
            raise UserError(
                f"--prune-mode {criterion}: no batch norm with a weight reads {', '.join(without)} alone: "
                "name what has none in --exclude-layers, or choose another criterion"
            )
    if CRITERIA[criterion].needs_maps and any(layer.is_linear for layer in layers):
        raise UserError(f"--prune-linear: not with --prune-mode {criterion}, which scores feature maps: a hidden unit has none")


def choose_filters(
    layers: Sequence[PrunableLayer],
    ratios: Mapping[str, float],
    *,
    criterion: str,
    gradients: Mapping[str, Tensor] | None = None,
    importance: Mapping[str, Tensor] | None = None,
    feature_maps: Mapping[str, Tensor] | None = None,
    multiple: int = 1,
    gamma: float = 0.5,
    gm_distance: str = "euclidean",
    generator: torch.Generator | None = None,
) -> dict[str, Tensor]:
    """The filters that stay, by layer: sorted indices, int64, on the CPU.

    The lowest scores go; of equal scores the lower index goes first. A grouped convolution loses the same number in every
    group, or it would be no grouped convolution any more; so a depthwise one, with one filter a group, keeps all that
    the convolution before it keeps. Filters that a group norm takes together go together, by the sum of their scores. Raises
    UserError for an unknown criterion, one that lacks its `gradients`, `importance`, `feature_maps` or a batch norm, or weights
    that are not finite.
    """
    if criterion not in CRITERIA:
        raise UserError(f"--prune-mode {criterion}: choose from {', '.join(CRITERIA)}")
    losing = losing_layers(layers, ratios, multiple=multiple)
    # Random scores are drawn for every layer, so that what one retains does not change the choice in the next.
    scored = layers if "generator" in CRITERIA[criterion].inputs else losing
    options = {"gamma": gamma, "gm_distance": gm_distance, "generator": generator}
    sampled = {"gradients": gradients, "importance": importance, "feature_maps": feature_maps}
    scores = score_filters(scored, criterion=criterion, **sampled, **options)
    kept = {
        layer.name: _highest(layer, scores[layer.name], ratios[layer.name], multiple=multiple)
        if layer in scored
        else torch.arange(layer.filters)
        for layer in layers
    }
    return followed(kept, layers, ratios)


def followed(kept: Mapping[str, Tensor], layers: Sequence[PrunableLayer], ratios: Mapping[str, float]) -> dict[str, Tensor]:
    """`kept` with the filters that depthwise convolutions keep because of those that they read, but where all stay."""
    by_name = {layer.name: layer for layer in layers}

    def keeps(name: str) -> Tensor:
        follows = by_name[name].follows
        return keeps(follows) if follows in by_name and ratios[name] < 1 else kept[name]

    return {name: keeps(name) for name in kept}


def score_filters(
    layers: Sequence[PrunableLayer],
    *,
    criterion: str,
    gradients: Mapping[str, Tensor] | None = None,
    importance: Mapping[str, Tensor] | None = None,
    feature_maps: Mapping[str, Tensor] | None = None,
    left: Mapping[str, Sequence[int]] | None = None,
    **options: Any,
) -> dict[str, Tensor]:
    """The scores (F,) of each layer's filters, by its name, on the CPU; `options` are what the criterion may ask for.

    Where `left` has the layer, those of its filters alone are scored, as if there were no others, whose scores are NaN.
    Raises UserError, with the layer's name, where the criterion lacks its gradient or a batch norm.
    """
    scores = {}
    for layer in layers:
        read = {"weight": layer.module.weight, "bn_weight": layer.bn_weight}
        sampled = {"grad": gradients, "importance": importance, "feature_maps": feature_maps}
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


def _kept_a_group(layer: PrunableLayer, keep_ratio: float, *, multiple: int) -> int:
    # The smallest step a group that makes the whole layer a multiple.
    step = math.lcm(multiple // math.gcd(multiple, layer.groups), layer.block)
    return keep_count(layer.filters // layer.groups, keep_ratio, multiple=step)
