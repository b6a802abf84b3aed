"""How much accuracy each layer, or each group of coupled layers, loses alone when it is pruned, without any training.

Li et al., "Pruning Filters for Efficient ConvNets", ICLR 2017, section 3.2, choose their proportions by such curves.
"""

import copy
import itertools
import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from models.graph.layers import PrunableLayer
from prune.choice import FilterChoice
from prune.schedule import HardPruning
from utils.checkpoints import digest
from utils.errors import UserError, shown
from utils.files import read_json, write_json

READ_BY_SENSITIVITY = (  # the flags that scores and accuracies depend on
    "prune_mode",
    "gamma",
    "gm_distance",
    "samp_batches",
    "couple_channels",
    "channel_multiple",
    "exclude_layers",
    "prune_linear",
    "seed",
    "batch_size",
    "limit_batches",
    "crop_padding",
    "mean",
    "std",
    "amp",
)
PROPORTIONS = (0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1)


def measure_sensitivity(
    choose: FilterChoice, path: Path, *, setting: Mapping[str, Any], top1_of: Callable[[nn.Module], float]
) -> dict[str, Any]:
    """Writes to `path`, family by family, the accuracy at each of PROPORTIONS, and gives what it has written.

    `setting` says what is measured, for people; a file that was cut off is gone on with if it is of the same setting and
    network. `top1_of(network)` is the accuracy in percent. Prints a line for each family.
    """
    families = list(choose.one_by_one(PROPORTIONS))
    head = {**setting, "weights": digest(choose.network.state_dict()), "proportions": list(PROPORTIONS), "count": len(families)}
    document = _begun(path, head)
    if document is None:
        document = {**head, "top1": top1_of(choose.network), "families": []}
        write_json(path, document)
    pruned = copy.deepcopy(choose.network)
    graph = choose.graph.rebound(pruned)
    for layers, filters, selections in families[len(document["families"]) :]:
        top1 = []
        for selection in selections:
            pruned.load_state_dict(choose.network.state_dict())
            HardPruning(graph, selection.on(pruned))
            top1.append(top1_of(pruned))
        row = {"layers": layers, "filters": filters, "kept": [len(own.channels(layers[0])) for own in selections], "top1": top1}
        document["families"].append(row)
        write_json(path, document)
        print(
            f"{_name(layers)}: " + ", ".join(f"{share:g} {value:.2f}" for share, value in zip(PROPORTIONS, top1, strict=True)),
            flush=True,
        )
    return document


def _begun(path: Path, head: dict[str, Any]) -> dict[str, Any] | None:
    if not path.exists():
        return None
    document = read_json(path, flag="--sensitivity")
    if not isinstance(document, dict) or {name: document.get(name) for name in head} != json.loads(json.dumps(head)):
        raise UserError(f"--sensitivity {path}: exists, and is of another network or setting; choose another name")
    return document


def _name(layers: Sequence[str]) -> str:
    return layers[0] if len(layers) == 1 else f"{layers[0]} and {len(layers) - 1} more"


def read_rates(path: str | os.PathLike, layers: Sequence[PrunableLayer], *, drop: float) -> list[float]:
    """For each of `layers` the least proportion down to which it, alone, lost at most `drop` points of accuracy.

    Layers that were not measured keep everything. Coupled groups that share a layer, as the streams of option A shortcuts do,
    keep the largest proportion of them all. Raises UserError for a file that `measure_sensitivity` has not written, or not to
    its end, and for one of another network.
    """
    origin = f"--prune-rates {path}"
    document = read_json(path, flag="--prune-rates")
    rates: dict[str, float] = {}
    try:
        proportions, whole = document["proportions"], document["top1"]
        for family in document["families"]:
            scores = sorted(zip(proportions, family["top1"], strict=True), reverse=True)
            close = list(itertools.takewhile(lambda score: whole - score[1] <= drop, scores))
            least = close[-1][0] if close else 1.0
            if not 0 < least <= 1:
                raise ValueError(f"proportion {shown(least, 40)}")
            rates |= {name: max(rates.get(name, 0.0), float(least)) for name in family["layers"]}
        _agree(rates, [family["layers"] for family in document["families"]])
    except (TypeError, KeyError, ValueError, AttributeError) as error:
        raise UserError(f"{origin}: is no file that --sensitivity wrote ({shown(str(error), 60)})") from error
    unknown = rates.keys() - {layer.name for layer in layers}
    if unknown:
        raise UserError(f"{origin}: is of another network, this one has no layer {shown(min(unknown), 60)}")
    done, count = len(document["families"]), document.get("count")
    if done != count:
        raise UserError(f"{origin}: is not complete, {done} of {shown(count, 20)} are measured")
    if all(rate == 1 for rate in rates.values()):
        raise UserError(f"{origin}: no layer may lose anything within --sensitivity-drop {drop:g}; raise it")
    return [rates.get(layer.name, 1.0) for layer in layers]


def _agree(rates: dict[str, float], families: Sequence[Sequence[str]]) -> None:
    """Gives all layers that hang together the largest proportion of any of them."""
    before = None
    while rates != before:
        before = dict(rates)
        for layers in families:
            rates.update(dict.fromkeys(layers, max(rates[name] for name in layers)))
