"""What the losses share: what one is given, and the attention map that most of them compare."""

import inspect
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from itertools import groupby

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from models.outputs import Outputs
from utils.errors import ParameterError


class Distiller(nn.Module, ABC):
    """One distillation loss. A subclass defines `loss(student, teacher)` and has its entry in `distill.registry`.

    `__init__(student, teacher, *, option)` gets sample Outputs of both networks, of any batch size, for their
    shapes, and raises UserError where they don't fit together. Keyword-only arguments are the options that its entry has.
    One that compares logits alone clears `reads_maps`: networks without feature maps can be distilled by it, and each runs its
    own forward pass.

    A loss that needs more than outputs names it as a keyword-only argument too, and in its entry. Of `loss`, for each step:

    - `labels` (b,) int64, the true classes of the images
    - `indices` (b,) int64, their rows in the training set
    - `epochs`, 0-dim float32: how many epochs of the training are done, the current one in part

    and of `__init__`: `train_labels` (n,) int64, the classes of all training images.
    """

    reads_maps = True
    step_facts: tuple[str, ...] = ()  # which of STEP_FACTS `loss` names

    def __init_subclass__(cls, **options: object) -> None:
        super().__init_subclass__(**options)
        cls.step_facts = keywords(cls.loss)

    def setting(self) -> str:
        """The options as the formula of a training shows them, such as `T 4`; empty for a loss without any."""
        return ""

    def forward(self, student: Outputs, teacher: Outputs, **facts: Tensor | None) -> Tensor:
        """The loss of one batch, 0-dim, not yet times beta; float32 whatever precision the networks ran in.

        `facts` are those of `distill.registry.STEP_FACTS` that the loss asks for; it may be given more. Where nobody knows the
        true classes, the teacher's word counts.
        """
        if "labels" in self.step_facts and facts.get("labels") is None:
            facts["labels"] = teacher.logits.argmax(1)
        # bfloat16 has 8 significant bits: too few for differences between normalised maps.
        with torch.autocast(student.logits.device.type, enabled=False):
            return self.loss(student, teacher, **{fact: facts[fact] for fact in self.step_facts})

    @abstractmethod
    def loss(self, student: Outputs, teacher: Outputs) -> Tensor:
        """What `forward` returns, with autocast off; feature maps may still come in a reduced precision."""


def keywords(function: Callable[..., object]) -> tuple[str, ...]:
    """The keyword-only arguments of a function."""
    parameters = inspect.signature(function).parameters.values()
    return tuple(parameter.name for parameter in parameters if parameter.kind is inspect.Parameter.KEYWORD_ONLY)


def check_weights(weights: Mapping[str, float]) -> None:
    """Raises ParameterError unless the `weights` of a loss's parts, by their options' names, are 0 or more and one above."""
    for name, value in weights.items():
        if not (math.isfinite(value) and value >= 0):
            raise ParameterError(name, value, "the weights of a loss's parts must be 0 or more")
    if not any(weights.values()):
        first, *others = weights
        beside = ", ".join(f"{name} {weights[name]:g}" for name in others)
        raise ParameterError(first, weights[first], f"with {beside} leaves the loss without any part, one must be above 0")


def full_precision_type(x: Tensor) -> torch.dtype:
    """float32, or the type of `x` where that is wider."""
    return torch.promote_types(x.dtype, torch.float32)


def full_precision(x: Tensor) -> Tensor:
    """`x` in float32, or as it is in a wider type."""
    return x.to(full_precision_type(x))


class _ChannelEnergy(torch.autograd.Function):
    """Autograd's own graph of this makes three passes over the map where one is needed, of each block in each step."""

    @staticmethod
    def forward(ctx, feature_map: Tensor) -> Tensor:
        ctx.save_for_backward(feature_map)
        # unlike the sum of a product, a norm needs no map in between
        norm = torch.linalg.vector_norm(feature_map, dim=1, dtype=full_precision_type(feature_map))
        return norm.square_().div_(feature_map.shape[1])

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor) -> Tensor:
        (feature_map,) = ctx.saved_tensors
        scale = gradient * (2 / feature_map.shape[1])  # (b, h, w)
        return (feature_map * scale.unsqueeze(1)).to(feature_map.dtype)


def channel_energy(feature_map: Tensor) -> Tensor:
    """Mean over channels of the squares: (b, c, h, w) -> (b, h, w), in full precision."""
    return _ChannelEnergy.apply(feature_map)


def stacked_energies(feature_maps: Sequence[Tensor]) -> list[Tensor]:
    """Channel energies in order of depth, neighbours of one size stacked: n maps (b, c_i, h, w) -> (n, b, h, w) a size.

    A network has many blocks and few sizes, so that what follows is a handful of batched operations.
    """
    groups = groupby(feature_maps, key=lambda feature_map: tuple(feature_map.shape[2:]))
    return [torch.stack([channel_energy(feature_map) for feature_map in group]) for _, group in groups]


def attention_map(energy: Tensor, size: Sequence[int] | None = None) -> Tensor:
    """The attention map of AT and AFD, `normalize(vec(mean_c f^2))`: (..., b, h, w) -> (..., b, h * w).

    `energy` is the mean over channels, average-pooled to `size` (height, width) first if given. An image whose map is
    all zero stays zero, with finite gradients.
    """
    if size is not None and tuple(size) != tuple(energy.shape[-2:]):
        energy = F.adaptive_avg_pool2d(energy, tuple(size))
    return F.normalize(energy.flatten(-2), dim=-1)


def row_similarity(rows: Tensor) -> Tensor:
    """Similarity of the images of a batch, each row normalised: `rownorm(rows rows^T)`, (..., b, d) -> (..., b, b)."""
    return F.normalize(rows @ rows.mT, dim=-1)


class BatchNorm(nn.Module):
    """Batch statistics alone; of a single value, which nn.BatchNorm2d refuses, the bias is left."""

    def __init__(self, channels: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        if x.numel() > x.shape[1]:
            return F.batch_norm(x, None, None, self.weight, self.bias, training=True)
        return torch.addcmul(self.bias.view(1, -1, 1, 1), x - x, self.weight.view(1, -1, 1, 1))
