"""Modules of a network's own that pass everything on in evaluation, and images or none of them in training: a DropPath.

In evaluation that is read off the module's own graph. What it does in training, its random numbers decide, so it is tried:
channels that are zero must stay zero, and the others must be what they are without those.
"""

import copy
from collections.abc import MutableMapping
from weakref import WeakKeyDictionary

import torch
from torch import fx, nn

from utils.seed import preserved_random_state, seed_everything

TRIALS = 8
IMAGES, CHANNELS, PIXELS = 16, 6, 3  # of the tensors that are tried

_KNOWN: MutableMapping[nn.Module, dict[tuple[int, int], bool]] = WeakKeyDictionary()


def passes_channels(module: nn.Module, *, axis: int, rank: int | None) -> bool:
    """Whether tensors of `rank` axes, with their channels along `axis`, may go through the module without those that are zero.

    Only a module without weights is looked at, which does nothing in evaluation.
    """
    if rank is None or module.state_dict():
        return False
    known = _KNOWN.setdefault(module, {})
    if (axis, rank) not in known:
        known[axis, rank] = does_nothing_in_evaluation(module) and _passes_in_training(module, axis % rank, rank)
    return known[axis, rank]


def does_nothing_in_evaluation(module: nn.Module) -> bool:
    """Whether the forward pass gives back what it is given, without any operation."""
    try:
        nodes = list(fx.Tracer().trace(copy.deepcopy(module).eval()).nodes)
    except Exception:  # tracing runs the module's own Python, which may raise anything on a proxy
        return False
    return [node.op for node in nodes] == ["placeholder", "output"] and nodes[1].args[0] is nodes[0]


@torch.no_grad()
def _passes_in_training(module: nn.Module, axis: int, rank: int) -> bool:
    module = copy.deepcopy(module).train()
    sizes = [IMAGES, *[PIXELS] * (rank - 1)]
    sizes[axis] = CHANNELS
    with preserved_random_state(cuda=False):
        for seed in range(TRIALS):
            seed_everything(seed)
            stored, gone = (part.sort().values for part in torch.randperm(CHANNELS).chunk(2))
            x = torch.randn(sizes).index_fill_(axis, gone, 0)
            results = []
            for given in (x, x.index_select(axis, stored)):
                seed_everything(seed)
                try:
                    results.append(module(given.clone()))
                except Exception:  # it may take tensors of another shape only
                    return False
            whole, narrow = results
            if whole.shape != x.shape or whole.index_select(axis, gone).any():
                return False
            if not torch.equal(whole.index_select(axis, stored), narrow):
                return False
    return True
