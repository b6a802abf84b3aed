"""Copies of networks that train as the network does."""

import copy
from typing import Any

import torch
from torch import nn

from utils.errors import UserError


def copied(network: nn.Module, memo: dict[int, Any] | None = None) -> nn.Module:
    """A copy that shares no tensor with `network`; with a `memo`, as of `copy.deepcopy`, none that is not in there.

    The parameters of a `ScriptModule` learn in it as well: `copy.deepcopy` alone leaves them as results of the old ones. Raises
    UserError for a network that cannot be copied.
    """
    try:
        with torch.no_grad():
            other = copy.deepcopy(network, memo)
    except (RuntimeError, TypeError) as error:  # it holds a tensor that was computed, as weight norm of old, or a handle
        raise UserError(f"{type(network).__name__} cannot be copied: {str(error).splitlines()[0]}") from error
    for own, parameter in zip(network.parameters(), other.parameters(), strict=True):
        parameter.requires_grad_(own.requires_grad)
    return other
