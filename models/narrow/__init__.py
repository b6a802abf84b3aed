"""A network with only some of its channels: which stay, the smaller network, and what lays channels out in it."""

from models.narrow.network import NarrowNetwork
from models.narrow.selection import Selection

__all__ = ["NarrowNetwork", "Selection"]
