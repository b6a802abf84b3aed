"""An exponential moving average of a network's weights over the steps of its training (Polyak & Juditsky, 1992).

The averaged network is often better than the trained one while the learning rate is high, and takes no part in the training.
"""

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn


class WeightAverage:
    """`decay * average + (1 - decay) * weights` after every step, from the first weights on.

    Batch norm's statistics are averaged alike; whole numbers are those of the network. What is exactly 0 in every step, as
    filters that are pruned before training are, is exactly 0 in the average; what becomes 0 later has to be cleared in it.
    """

    def __init__(self, network: nn.Module, decay: float):
        tensors = [*network.named_parameters(), *network.named_buffers()]
        self._tensors = {name: tensor.detach() for name, tensor in tensors if tensor.is_floating_point()}
        self._averages = {name: tensor.clone() for name, tensor in self._tensors.items()}
        self._average = get_ema_multi_avg_fn(decay)

    @torch.no_grad()
    def update(self) -> None:
        """Takes in the weights of a step."""
        self._average(list(self._averages.values()), list(self._tensors.values()), None)

    def buffers(self, network: nn.Module) -> list[Tensor]:
        """The averages of the network's buffers, which differ between processes."""
        return [self._averages[name] for name, _ in network.named_buffers() if name in self._averages]

    @contextlib.contextmanager
    def swapped(self) -> Iterator[None]:
        """Within it the network is the averaged one; afterwards every bit is as before."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        for name, tensor in self._tensors.items():
            kept = tensor.clone()
            tensor.copy_(self._averages[name])
            self._averages[name].copy_(kept)

    def state_dict(self) -> dict[str, Tensor]:
        return {name: average.clone() for name, average in self._averages.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Raises KeyError or RuntimeError for the averages of another network."""
        for name, average in self._averages.items():
            if state[name].shape != average.shape:
                raise RuntimeError(f"the average of {name} has shape {tuple(state[name].shape)}, not {tuple(average.shape)}")
            average.copy_(state[name])
