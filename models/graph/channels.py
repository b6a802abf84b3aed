"""What a plan is made of: the channels of a tensor, what is left of a layer, and the step of one node."""

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any

from torch import fx

Members = tuple[tuple[str, int] | None, ...]


@dataclass(frozen=True)
class Channels:
    """The channels of a tensor along `axis`: `full` in the dense network, of which `stored` (ascending) exist.

    `axis` counts from the front where the rank is known and is -1 otherwise. `flat` says that the pixels of a map lie on the
    same axis, channel by channel, as after `flatten(1)`. A tensor that stores nothing does not exist at all; `vanished` then
    names the layers without outputs that it came through. `members` tells of each of the `full` channels which layer gives
    it, as that one's name and output channel; None is a channel that is always zero.
    """

    full: int
    stored: tuple[int, ...]
    axis: int
    rank: int | None
    flat: bool = False
    vanished: frozenset[str] = frozenset()
    members: Members = ()

    @property
    def complete(self) -> bool:
        return len(self.stored) == self.full

    def storing(self, stored: Iterable[int]) -> "Channels":
        stored = tuple(stored)
        if stored == self.stored:
            return self
        return replace(self, stored=stored, vanished=frozenset() if stored else self.vanished)

    def whole(self) -> "Channels":
        return self.storing(all_channels(self.full))

    def fits(self, other: "Channels | None") -> bool:
        """Whether channel i of both means the same position of a sum."""
        return other is not None and self._place() == other._place()

    def _place(self) -> tuple[int, int, int | None, bool]:
        return self.full, self.axis, self.rank, self.flat


@lru_cache(maxsize=256)
def all_channels(count: int) -> tuple[int, ...]:
    return tuple(range(count))


@lru_cache(maxsize=512)
def members_of_layer(name: str, full: int) -> Members:
    return tuple((name, channel) for channel in range(full))


@dataclass(frozen=True)
class LayerCut:
    """What is left of a layer: output channels `rows`, and for each group the positions in the weight of what it still reads.

    The rows are shared out evenly among the groups. `columns` is None for a layer without input channels of its own (batch
    norm, PReLU).
    """

    rows: tuple[int, ...]
    columns: tuple[tuple[int, ...], ...] | None = None


@dataclass
class Step:
    """One node of the plan: what it wants of its inputs, what it gives, and how it is written if not as in the dense graph."""

    node: fx.Node
    out: Any = None  # Channels; a tuple of them for an operation with several results; None where nothing is known
    wants: dict[fx.Node, Channels] = field(default_factory=dict)
    cut: LayerCut | None = None
    form: str = "copy"  # how models.narrow writes it: copy, through, sum, cat, pad, piece, slice, sized, flat, count or nothing
    meets: list[tuple[Members, Members]] = field(default_factory=list)  # pairs, entry by entry, that stay or go together
    why_whole: str = ""  # what keeps a layer from being cut at all

    @property
    def exists(self) -> bool:
        return not (isinstance(self.out, Channels) and not self.out.stored)


@dataclass
class Plan:
    graph: fx.Graph
    steps: dict[fx.Node, Step]

    def cuts(self) -> dict[str, LayerCut]:
        """What is left of each layer that exists, by name."""
        return {step.node.target: step.cut for step in self.steps.values() if step.cut is not None and step.exists}
