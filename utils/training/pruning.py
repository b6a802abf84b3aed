"""What the trainer asks of whatever keeps its network pruned; `prune.schedule` has what answers."""

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, nn


class Pruning:
    """What keeps a network pruned while it is trained; this one prunes nothing."""

    def after_step(self) -> None:
        """Called after every optimizer step."""
        self.clear_pruned()

    def clear_pruned(self) -> None:
        """Brings the weights that the network has now to what the method holds them at; a second call changes nothing."""

    def next_network(self, epoch: int) -> nn.Module | None:
        """Called after the last step of `epoch`, counted from 0, before anything is evaluated or saved.

        May give another network to train from now on.
        """
        return None

    def carried_over(self, key: str, value: Tensor, *, before: nn.Module) -> Tensor:
        """`value`, which belongs to the parameter `key` of the network `before`, in the shape of the one that took its place."""
        return value

    def is_finished(self, epoch: int) -> bool:
        """Whether the network that `epoch` ends with has the form in which the training ends."""
        return True

    @contextlib.contextmanager
    def shipped(self) -> Iterator[Mapping[str, Tensor]]:
        """Within it the network is as it is evaluated and saved; gives the channels that live, by layer."""
        yield {}

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from what `state_dict` gave."""
