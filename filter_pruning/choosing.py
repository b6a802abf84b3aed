"""Which channels of a network stay, and the network that is left."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from torch import Tensor, nn

from models.graph import ChannelGraph
from models.graph.walk import Inputs
from models.narrow import NarrowNetwork, Selection
from prune.choice import FilterChoice, small_network
from prune.criteria import CRITERIA as SCORES
from prune.criteria import aliases
from prune.masks import keep_ratios
from prune.settings import parse_budget
from utils.errors import UserError, shown
from utils.modes import preserved_modes

CRITERIA = aliases()


def prune(network: nn.Module, example: Inputs, **how: Any) -> NarrowNetwork:
    """What is left of `network`, which stays as it is: `select` with the same arguments, cut out and proved the same function.

    The result trains in any loop, gives results of the structure that `network` gives, and keeps the names of its layers. It
    computes what `network` does with the outputs of all other channels at zero; on `example` that is checked.
    """
    return small_network(select(network, example, **how))


def select(
    network: nn.Module,
    example: Inputs,
    *,
    budget: str | None = None,
    keep: float | Sequence[float] | None = None,
    criterion: str = "l1",
    batches: Iterable[tuple[Any, Any]] | None = None,
    loss: Callable[[Any, Any], Tensor] | None = None,
    exclude: Sequence[str] = (),
    coupled: bool = True,
    multiple: int = 8,
    allocation: str = "uniform",
    linear: bool = False,
    seed: int = 0,
    **options: Any,
) -> Selection:
    """Which channels of `network` stay: `selection.shrink(network)` is the small network, `selection.mask(network)` has zeros.

    `budget` says what the small network may cost of the dense one's, "macs=0.5" or "params=0.3"; `keep` the proportion of
    filters that stays instead, of all layers or one number a layer. `criterion` is one of `CRITERIA`. Those that look at data
    take `batches` of (inputs, targets) on the network's device, any iterable, and for gradients `loss(results, targets)`, a
    mean over the batch: the cross-entropy of the logits where none is given. Layers in `exclude` (names, or patterns such as
    "stem.*") keep all.

    `coupled` channels, which meet in sums, products and depthwise convolutions, stay or go together, so that residual streams
    become narrower; widths are multiples of `multiple`. `allocation` spends a budget in one proportion ("uniform") or where
    scores are low for their price ("global"). With `linear` hidden units of MLPs go as well. `options` are the criterion's
    own, such as `gamma`. Raises PruningError where this cannot be done.
    """
    if (budget is None) == (keep is None):
        raise UserError("budget, keep: give one of the two, such as budget='macs=0.5' or keep=0.6")
    choice = _choice(
        ChannelGraph(network, example),
        _named(criterion),
        rates=None if keep is None else [keep] if isinstance(keep, int | float) else list(keep),
        exclude=exclude,
        linear=linear,
        budget=parse_budget(budget) if budget is not None else None,
        batches=_Batches(batches),
        loss=loss,
        coupled=coupled,
        multiple=multiple,
        allocation=allocation,
        seed=seed,
        options=options,
    )
    if SCORES[choice.criterion].looks_at_images and batches is None:
        raise UserError(f"criterion {criterion!r}: looks at data, give batches of (inputs, targets)")
    with preserved_modes(network):
        choice.check()
        return choice()


def _choice(
    graph: ChannelGraph,
    criterion: str,
    *,
    rates: Sequence[float] | None,
    exclude: Sequence[str],
    linear: bool,
    batches: "_Batches",
    **setting: Any,
) -> FilterChoice:
    layers = graph.prunable_layers(linear=linear)
    ratios = keep_ratios(layers, rates, exclude=exclude)
    return FilterChoice(graph, layers, ratios, criterion=criterion, data=batches, **setting)


def _named(criterion: str) -> str:
    name = CRITERIA.get(criterion, criterion)
    if name not in SCORES:
        raise UserError(f"criterion {shown(criterion)}: choose from {', '.join(CRITERIA)}")
    return name


class _Pair(NamedTuple):
    images: Any
    labels: Any


class _Batches:
    """Pairs of inputs and targets as a choice of filters asks for them."""

    def __init__(self, pairs: Iterable[tuple[Any, Any]] | None):
        self._pairs = pairs

    def train_batches(self, epoch: str) -> Iterator[_Pair]:
        for pair in self._pairs or ():
            if not isinstance(pair, tuple | list) or len(pair) != 2:
                raise UserError(f"batches: pairs of inputs and targets expected, not {type(pair).__name__}")
            yield _Pair(*pair)
