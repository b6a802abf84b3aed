"""What the losses share: how one registers, what it is given, and the attention map that most of them compare."""

import inspect
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from models.outputs import Outputs
from utils.effects import typed
from utils.errors import UserError

STEP_FACTS = ("labels", "indices", "epochs")
RUN_FACTS = {"train_labels": "the classes of all training images"}


class Distiller(nn.Module, ABC):
    """One distillation loss. A subclass defines `loss(student, teacher)` and registers with `@register_distiller`.

    `__init__(student, teacher, *, option=default)` gets sample Outputs of both networks, of any batch size, for their
    shapes, and raises UserError where they don't fit together. Keyword-only arguments with a default are the loss's options.
    One that compares logits alone clears `reads_maps`: networks without feature maps can be distilled by it, and each runs its
    own forward pass.

    A loss that needs more than outputs names it as a keyword-only argument without a default. Of `loss`, for each step:

    - `labels` (b,) int64, the true classes of the images
    - `indices` (b,) int64, their rows in the training set
    - `epochs`, 0-dim float32: how many epochs of the training are done, the current one in part

    and of `__init__`: `train_labels` (n,) int64, the classes of all training images.
    """

    reads_maps = True
    step_facts: tuple[str, ...] = ()  # which of STEP_FACTS `loss` names; set by `register_distiller`

    def setting(self) -> str:
        """The options as the formula of a training shows them, such as `T 4`; empty for a loss without any."""
        return ""

    def forward(self, student: Outputs, teacher: Outputs, **facts: Tensor | None) -> Tensor:
        """The loss of one batch, 0-dim, not yet times beta; float32 whatever precision the networks ran in.

        `facts` are those of STEP_FACTS that the loss asks for; it is free to be given more. Where nobody knows the true
        classes, the teacher's word counts.
        """
        if "labels" in self.step_facts and facts.get("labels") is None:
            facts["labels"] = teacher.logits.argmax(1)
        # bfloat16 has 8 significant bits: too few for differences between normalised maps.
        with torch.autocast(student.logits.device.type, enabled=False):
            return self.loss(student, teacher, **{fact: facts[fact] for fact in self.step_facts})

    @abstractmethod
    def loss(self, student: Outputs, teacher: Outputs) -> Tensor:
        """What `forward` returns, with autocast off; feature maps may still come in a reduced precision."""


@dataclass(frozen=True)
class Option:
    """An option of a loss: a keyword of `build_distiller`, and with dashes for underscores a flag (a switch, if a bool).

    `is_weight`: it weighs a part of the loss, which 0 leaves out.
    """

    default: bool | int | float
    help: str
    is_weight: bool = False


@dataclass(frozen=True)
class DistillerEntry:
    """A registered loss: what builds it, its paper's usual beta (None: weighted by alpha alone), its options by keyword.

    `replaces_kd`: the loss takes KD's place, whose alpha is 0 then unless it is given. `rise` is the share of the epochs
    over which the weight rises linearly to beta. `reads_maps`: it compares feature maps, not logits alone. `needs` names what it
    asks for beside outputs, of STEP_FACTS and RUN_FACTS.
    """

    build: Callable[..., Distiller]
    beta: float | None
    options: Mapping[str, Option] = field(default_factory=dict)
    replaces_kd: bool = False
    rise: float = 0.0
    reads_maps: bool = True
    needs: frozenset[str] = frozenset()

    @property
    def weights(self) -> list[str]:
        """The options that weigh the parts of the loss."""
        return [key for key, option in self.options.items() if option.is_weight]


DISTILLERS: dict[str, DistillerEntry] = {}


def register_distiller(
    name: str,
    *,
    beta: float | None,
    replaces_kd: bool = False,
    rise: float = 0.0,
    weights: Sequence[str] = (),
    **option_help: str,
) -> Callable[[type[Distiller]], type[Distiller]]:
    """Class decorator that enters a loss into `DISTILLERS`, with what `DistillerEntry` says of it.

    `option_help` describes each keyword-only argument of the class, by its name; `weights` names those that weigh its parts.
    Losses may share an option: it then has one default and one description.
    """

    def register(cls: type[Distiller]) -> type[Distiller]:
        arguments, cls.step_facts = _keywords(cls.__init__), tuple(_keywords(cls.loss))
        defaults = {key: default for key, default in arguments.items() if default is not inspect.Parameter.empty}
        run_facts = arguments.keys() - defaults.keys()
        unknown = {*run_facts - set(RUN_FACTS), *set(cls.step_facts) - set(STEP_FACTS)}
        if unknown:
            raise TypeError(f"{cls.__name__} asks for {min(unknown)}: nobody knows it beside {(*STEP_FACTS, *RUN_FACTS)}")
        if defaults.keys() != option_help.keys():
            raise TypeError(f"{cls.__name__} has options {sorted(defaults)}, described are {sorted(option_help)}")
        if name in DISTILLERS:
            raise ValueError(f"distiller {name!r} is registered already")
        options = {key: Option(default, option_help[key], key in weights) for key, default in defaults.items()}
        others = {key: option for entry in DISTILLERS.values() for key, option in entry.options.items()}
        unlike = [key for key, option in options.items() if others.get(key, option) != option]
        if unlike:
            raise ValueError(f"option {unlike[0]!r} of distiller {name!r} is another loss's too, with another default or help")
        needs = frozenset((*run_facts, *cls.step_facts))
        DISTILLERS[name] = DistillerEntry(cls, beta, options, replaces_kd, rise, cls.reads_maps, needs)
        return cls

    return register


def _keywords(function: Callable[..., object]) -> dict[str, object]:
    """The keyword-only arguments of a function with their defaults, `inspect.Parameter.empty` where there is none."""
    parameters = inspect.signature(function).parameters.values()
    return {parameter.name: parameter.default for parameter in parameters if parameter.kind is inspect.Parameter.KEYWORD_ONLY}


def check_facts(name: str, given: Collection[str]) -> None:
    """Raises UserError where what a loss has to know of the run is not among the names `given`."""
    missing = DISTILLERS[name].needs.intersection(RUN_FACTS).difference(given)
    if missing:
        raise UserError(f"--distill {name}: needs {min(missing)} ({RUN_FACTS[min(missing)]}), which it was not given")


def check_weights(weights: Mapping[str, float]) -> None:
    """Raises UserError unless the `weights` of a loss's parts, by the names of their options, are 0 or more and one above."""
    values = weights.values()
    if not all(math.isfinite(value) and value >= 0 for value in values) or not any(values):
        given = " ".join(typed(name, value) for name, value in weights.items())
        raise UserError(f"{given}: the weights of a loss's parts must be 0 or more, and one of them above 0")


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
