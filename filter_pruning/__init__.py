"""Filter pruning for any network, task and training loop.

    import filter_pruning as fp

    small = fp.prune(network, example, budget="macs=0.5")          # a smaller nn.Module, which trains in any loop
    fp.reconstruct(small, network, batches)                        # least squares in place, without labels
    objective = fp.distil(small, network, "kd", example=example)   # objective(images, labels) -> loss, logits, terms
    fp.save(small, "small.pt"); small = fp.load("small.pt", network)
    fp.export(small, "small.onnx", example)

`example` is a batch of inputs, or a tuple or mapping of them; results may have any structure. What cannot be done raises
`PruningError` with one line that says why.
"""

from filter_pruning.choosing import CRITERIA, prune, select
from filter_pruning.exporting import export
from filter_pruning.files import load, save
from filter_pruning.teaching import distil
from prune.reconstruction import reconstruct
from utils.errors import UserError as PruningError

__all__ = ["CRITERIA", "PruningError", "distil", "export", "load", "prune", "reconstruct", "save", "select"]
