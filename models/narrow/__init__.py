"""A network with only some of its channels: which stay, the smaller network, and what lays channels out in it."""

from models.narrow.network import NarrowNetwork, narrow

__all__ = ["NarrowNetwork", "narrow"]
