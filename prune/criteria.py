"""Filter criteria: a conv weight in, one score a filter out; the filters with the lowest scores are pruned.

A new criterion is one function under `@criterion("filter-...", title="...")`; nothing else changes. It is known by that name
and by a shorter `alias`, which is what follows `filter-` unless another is given. It takes the weight and, by name, what it
needs of `grad`, `importance`, `removal_order`, `bn_weight`, `feature_maps`, `group_squares`, `gamma`, `generator` and
`gm_distance`, and returns (F,) scores. It is called without autograd and in float64: its scores are rounded to float32
afterwards, so that the same weights rank alike on every device. `feature_maps` is a mean over images: the decorator says of
what, as it does of `importance`.

What is registered is known without torch, which a function that needs more than the methods of tensors imports itself.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from utils.citations import source_of
from utils.errors import ParameterError, UserError
from utils.python_file import function_of, load_function, names_function, naming_lines

if TYPE_CHECKING:
    import torch
    from torch import Tensor

GM_DISTANCES = ("euclidean", "sqeuclidean")
VARIABLES = ("gates", "weights")


@dataclass(frozen=True)
class Criterion:
    """A registered score function, called with the same arguments whichever it is.

    `importance_of` says whose `importance` (`prune.gradients`) it asks for, that of "gates" or "weights". `of_maps` turns the
    maps (B, F, H, W) of a layer into the (B, F) whose mean over all images is `feature_maps`.
    """

    name: str
    title: str
    score: Callable[..., Tensor]
    inputs: frozenset[str]
    importance_of: str | None = None
    of_maps: Callable[[Tensor], Tensor] | None = None
    alias: str = ""

    @property
    def paper(self) -> str:
        """Authors, venue and year, or whatever else its docstring begins with."""
        return source_of(self.score.__doc__ or "")

    @property
    def needs(self) -> str:
        """What it looks at, in words."""
        if self.inputs & {"grad", "importance"}:
            return "labelled images"
        if self.needs_maps or self.needs_order:
            return "images"
        return "batch norm" if "bn_weight" in self.inputs else "the weights" if "generator" not in self.inputs else "nothing"

    @property
    def needs_gradient(self) -> bool:
        return "grad" in self.inputs

    @property
    def looks_at_images(self) -> bool:
        """Whether its scores take a pass over training images."""
        return bool(self.inputs & {"grad", "importance", "feature_maps", "removal_order"})

    @property
    def needs_group(self) -> bool:
        """Whether it asks for what goes with a filter elsewhere in the network."""
        return "group_squares" in self.inputs

    @property
    def needs_maps(self) -> bool:
        return "feature_maps" in self.inputs

    @property
    def needs_order(self) -> bool:
        """Whether it ranks by `prune.removal`."""
        return "removal_order" in self.inputs

    def __call__(
        self,
        weight: Tensor,
        grad: Tensor | None = None,
        *,
        gamma: float = 0.5,
        generator: torch.Generator | None = None,
        gm_distance: str = "euclidean",
        bn_weight: Tensor | None = None,
        feature_maps: Tensor | None = None,
        importance: Tensor | None = None,
        group_squares: Tensor | None = None,
        removal_order: Tensor | None = None,
    ) -> Tensor:
        """Scores (F,) of the filters of `weight` (F, C, kH, kW), on its device, in its dtype but at least float32.

        `grad` has the shape of `weight`; `bn_weight`, that of the batch norm which reads the filters, `feature_maps`,
        `importance`, `group_squares` and `removal_order` are (F,).

        Raises UserError where one is needed and not given, and unless the scores are F finite numbers: what else a new
        criterion may return would prune something all the same.
        """
        if self.needs_gradient and (grad is None or grad.shape != weight.shape):
            given = "none" if grad is None else f"one of shape {tuple(grad.shape)}"
            raise UserError(f"{self.name} needs a gradient of the weight's shape {tuple(weight.shape)}, and got {given}")
        if "bn_weight" in self.inputs and bn_weight is None:
            raise UserError(f"{self.name} needs a batch norm that alone reads the filters, and its weight: there is none")
        if self.needs_maps and (feature_maps is None or feature_maps.shape != (len(weight),)):
            raise UserError(f"{self.name} needs a number of the feature maps of each filter, ({len(weight)},)")
        if self.importance_of is not None and (importance is None or importance.shape != (len(weight),)):
            raise UserError(f"{self.name} needs the importance of each filter, ({len(weight)},)")
        if "group_squares" in self.inputs and (group_squares is None or group_squares.shape != (len(weight),)):
            raise UserError(f"{self.name} needs the squares of the group of each filter, ({len(weight)},)")
        if self.needs_order and (removal_order is None or removal_order.shape != (len(weight),)):
            raise UserError(f"{self.name} needs the place of each filter in the order of removal, ({len(weight)},)")
        available = {
            "grad": None if grad is None else grad.double(),
            "bn_weight": None if bn_weight is None else bn_weight.double(),
            "feature_maps": None if feature_maps is None else feature_maps.double(),
            "importance": None if importance is None else importance.double(),
            "group_squares": None if group_squares is None else group_squares.double(),
            "removal_order": None if removal_order is None else removal_order.double(),
            "gamma": gamma,
            "generator": generator,
            "gm_distance": gm_distance,
        }
        import torch

        with torch.no_grad():
            scores = self.score(weight.double(), **{name: available[name] for name in self.inputs})
        self._check_form(scores, filters=len(weight))
        scores = scores.to(weight.device, torch.promote_types(weight.dtype, torch.float32))
        if not scores.isfinite().all():
            raise UserError(f"{self.name} gives scores that are not finite: are the weights NaN or infinite?")
        return scores

    def _check_form(self, scores: Any, *, filters: int) -> None:
        import torch

        expected = f"expected one finite number a filter, ({filters},)"
        if not isinstance(scores, torch.Tensor):
            raise UserError(f"{self.name} gives a {type(scores).__name__} as scores, {expected}")
        if scores.shape != (filters,):
            raise UserError(f"{self.name} gives scores of shape {tuple(scores.shape)}, {expected}")
        if scores.is_complex() or scores.dtype == torch.bool:
            raise UserError(f"{self.name} gives scores of type {scores.dtype}, {expected}")


CRITERIA: dict[str, Criterion] = {}
PREFIX = "filter-"
_INPUTS = frozenset(
    ("grad", "importance", "bn_weight", "feature_maps", "group_squares", "removal_order", "gamma", "generator", "gm_distance")
)


def criteria_with(*inputs: str) -> list[str]:
    """The criteria that ask for one of these inputs."""
    return [name for name, entry in CRITERIA.items() if entry.inputs & set(inputs)]


def aliases() -> dict[str, str]:
    """The short names of the criteria, and what each stands for: `{"fpgm": "filter-gm", ...}`."""
    return {entry.alias: name for name, entry in CRITERIA.items() if not names_function(name)}


def criterion(
    name: str,
    *,
    title: str,
    alias: str | None = None,
    importance_of: str | None = None,
    of_maps: Callable[[Tensor], Tensor] | None = None,
) -> Callable[[Callable[..., Tensor]], Callable[..., Tensor]]:
    """Registers the decorated score function as `--prune-mode name`. Its parameters say what it needs beside the weight.

    `title` is what papers and tables call it.
    """
    if importance_of not in (None, *VARIABLES):
        raise ValueError(f"criterion {name!r}: importance_of {importance_of!r} is none of {', '.join(VARIABLES)}")

    def register(score: Callable[..., Tensor]) -> Callable[..., Tensor]:
        inputs = frozenset(list(inspect.signature(score).parameters)[1:])
        if name in CRITERIA or not inputs <= _INPUTS:
            raise ValueError(f"criterion {name!r} is registered already, or asks for more than {', '.join(sorted(_INPUTS))}")
        if ("feature_maps" in inputs) != (of_maps is not None):
            raise ValueError(f"criterion {name!r}: feature_maps and of_maps, which says what of them is meant, come together")
        if ("importance" in inputs) != (importance_of is not None):
            raise ValueError(f"criterion {name!r}: importance and importance_of, which says whose, come together")
        CRITERIA[name] = Criterion(name, title, score, inputs, importance_of, of_maps, alias or name.removeprefix(PREFIX))
        return score

    return register


def add_own_criterion(name: str) -> None:
    """Registers the function of `FILE.py:FUNCTION`, whose file runs, under that name; it counts for `Criterion` as any other.

    One that asks for `importance` may say whose in an attribute `importance_of` ("gates" without), one that asks for
    `feature_maps` has to say what of them is averaged in an attribute `of_maps`. Raises UserError for one that asks for more.
    """
    score = load_function(name)
    inputs = frozenset(list(inspect.signature(score).parameters)[1:])
    if not inputs <= _INPUTS:
        raise UserError(
            f"{name}: asks for {min(inputs - _INPUTS)}; beside the weight it may ask for {', '.join(sorted(_INPUTS))}"
        )
    of_maps = getattr(score, "of_maps", None)
    if "feature_maps" in inputs and not callable(of_maps):
        raise UserError(
            f"{name}: asks for feature_maps, so {function_of(name)}.of_maps must be a function of maps (B, F, H, W) to (B, F)"
        )
    importance_of = getattr(score, "importance_of", VARIABLES[0]) if "importance" in inputs else None
    if importance_of not in (None, *VARIABLES):
        raise UserError(f"{name}: its importance_of is {importance_of!r}, choose from {', '.join(VARIABLES)}")

    def named(weight: Tensor, **read: Any) -> Tensor:
        with naming_lines(name):
            return score(weight, **read)

    maps = of_maps if "feature_maps" in inputs else None
    entry = Criterion(name, function_of(name), named, inputs, importance_of, maps, name)
    _try(entry)
    CRITERIA[name] = entry


def _try(entry: Criterion) -> None:
    """Raises UserError for a criterion whose scores of a small convolution cannot be scores."""
    import torch

    generator = torch.Generator().manual_seed(0)
    weight, grad = torch.randn(2, 4, 3, 3, 3, generator=generator)
    each = torch.rand(4, generator=generator)
    read = dict.fromkeys(("bn_weight", "feature_maps", "importance", "group_squares", "removal_order"), each)
    entry(weight, grad, generator=generator, **read)


@criterion("filter-r", title="Random", alias="random")
def random_scores(weight: Tensor, *, generator: torch.Generator | None) -> Tensor:
    """The random baseline: uniform in [0, 1). Without a generator, from torch's default one of the CPU."""
    import torch

    # Drawn where the generator lives: one seed then means the same choice on the CPU, on a GPU and in every process.
    device = "cpu" if generator is None else generator.device
    return torch.rand(len(weight), generator=generator, device=device, dtype=weight.dtype)


@criterion("filter-a", title="PFEC", alias="l1")
def l1_norm(weight: Tensor) -> Tensor:
    """Li et al., "Pruning Filters for Efficient ConvNets", ICLR 2017: `sum |w_i|`."""
    return weight.abs().flatten(1).sum(1)


@criterion("filter-l2", title="L2")
def l2_norm(weight: Tensor) -> Tensor:
    """The norm of the code of He et al., "Soft Filter Pruning", IJCAI 2018: `sqrt(sum w_i^2)`."""
    return weight.square().flatten(1).sum(1).sqrt()


@criterion("filter-gm", title="FPGM", alias="fpgm")
def geometric_median(weight: Tensor, *, gm_distance: str) -> Tensor:
    """He et al., "Filter Pruning via Geometric Median", CVPR 2019: `sum_j |w_i - w_j|`, distances not squared.

    Squared distances ("sqeuclidean") rank filters by their distance to the mean, which is another method: it is there to
    reproduce results of an implementation that used it.
    """
    if gm_distance not in GM_DISTANCES:
        raise ParameterError("gm_distance", gm_distance, f"choose from {', '.join(GM_DISTANCES)}")
    import torch

    filters = weight.flatten(1)  # (F, C * kH * kW)
    # By differences: the faster form |a|^2 + |b|^2 - 2ab leaves equal filters at a distance that is not quite 0.
    distances = torch.cdist(filters, filters, compute_mode="donot_use_mm_for_euclid_dist")  # (F, F)
    return (distances if gm_distance == "euclidean" else distances.square()).sum(1)


@criterion("filter-nggm", title="NGGM")
def norm_of_gradient_and_geometric_median(weight: Tensor, *, grad: Tensor, gamma: float, gm_distance: str) -> Tensor:
    """The criterion that this repository proposes: `gamma * minmax(GM_i) + (1 - gamma) * minmax(sum |g_i|)`.

    g is the gradient of the mean cross-entropy. Both terms are brought to [0, 1] within their layer, so `gamma` in [0, 1]
    weighs them whatever their units are.
    """
    if not 0 <= gamma <= 1:
        raise ParameterError("gamma", gamma, "must be from 0 (gradient alone) to 1 (geometric median alone)")
    median = geometric_median(weight, gm_distance=gm_distance)
    return gamma * _minmax(median) + (1 - gamma) * _minmax(l1_norm(grad))


@criterion("filter-taylor", title="Taylor", importance_of="gates")
def taylor(weight: Tensor, *, importance: Tensor) -> Tensor:
    """Molchanov et al., "Importance Estimation for Neural Network Pruning", CVPR 2019, the gate behind batch norm (method 22).

    Of a gate that multiplies the filter's map and is 1, the sum over batches of the square of the loss's gradient: what the loss
    changes to first order without the filter, squared batch by batch.
    """
    return importance


@criterion("filter-taylor-weight", title="Taylor (weights)", importance_of="weights")
def taylor_of_weights(weight: Tensor, *, importance: Tensor) -> Tensor:
    """The same on weights (method 0 of its code): `sum_w (w g)^2`, over the batches."""
    return importance


@criterion("filter-bn", title="BN scale")
def batch_norm_weight(weight: Tensor, *, bn_weight: Tensor) -> Tensor:
    """Liu et al., "Learning Efficient Convolutional Networks through Network Slimming", ICCV 2017: `|weight of batch norm|`."""
    return bn_weight.abs()


@criterion("filter-group", title="Group norm")
def group_norm(weight: Tensor, *, group_squares: Tensor) -> Tensor:
    """Fang et al., "DepGraph: Towards Any Structural Pruning", CVPR 2023, eq. 6: `sum ||w||^2` over all that goes with a filter.

    That is the filters of its group, their batch norms' scales, and the weights that read them.
    """
    return group_squares


def _map_ranks(maps: Tensor) -> Tensor:
    from prune.map_scores import map_ranks

    return map_ranks(maps)


@criterion("filter-hrank", title="HRank", of_maps=_map_ranks)
def mean_rank(weight: Tensor, *, feature_maps: Tensor) -> Tensor:
    """Lin et al., "HRank: Filter Pruning using High-Rank Feature Map", CVPR 2020: the mean rank of a filter's maps."""
    return feature_maps


def _channel_independence(maps: Tensor) -> Tensor:
    from prune.map_scores import channel_independence

    return channel_independence(maps)


@criterion("filter-chip", title="CHIP", of_maps=_channel_independence)
def mean_independence(weight: Tensor, *, feature_maps: Tensor) -> Tensor:
    """Sui et al., "CHIP: CHannel Independence-based Pruning for Compact Neural Networks", NeurIPS 2021.

    The mean over images of what the nuclear norm of all maps of the layer loses without the filter's.
    """
    return feature_maps


@criterion("filter-error", title="Least-squares error")
def least_squares_error(weight: Tensor, *, removal_order: Tensor) -> Tensor:
    """Luo et al., "ThiNet", ICCV 2017, exactly: the place in the order of least loss at readers mended each time."""
    return removal_order


def _minmax(scores: Tensor) -> Tensor:
    """`(x - min) / (max - min)`, and 0 where all are equal."""
    import torch

    shifted = scores - scores.min()
    span = shifted.max()
    # x / 1 where the span is 0, without asking the device which case it is.
    return shifted / torch.where(span == 0, 1.0, span)
