"""What each operation does with the channels of its inputs, one file a family of operations."""

from models.graph.rules import layers, pieces, pointwise, shapes, sizes, space, sums, timm_layers

__all__ = ["layers", "pieces", "pointwise", "shapes", "sizes", "space", "sums", "timm_layers"]
