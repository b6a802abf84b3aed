"""What compaction leaves of networks that it knows nothing about: docs/tables/compaction_zoo.csv, beside torch_pruning's.

    python -m benchmarks.compaction_zoo             # the networks that the output has not got yet
    python -m benchmarks.compaction_zoo --table     # write that file from the output

Every classification network of torchvision and small ones of every family of timm, with random weights. Each convolution and
each hidden linear layer keeps 0.6 of its filters by L1 norm, as `pruning.py --prune-mode filter-a --prune-rates 0.6
--prune-linear` chooses; then it is compacted and compared with the masked network in evaluation. torch_pruning's
MagnitudePruner takes 0.4 of all channels, coupled ones and linear layers included, and has no masked network to be compared
with: that it works means that it runs and has its outputs.

Networks come one after the other, each in a process of its own with a time limit, and each adds a line to the output, so
that a run which was cut off goes on where it was.
"""

import argparse
import csv
import io
import json
import multiprocessing
import re
import time
import warnings
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torchvision import models

from benchmarks.common import RESULTS
from models.graph import ChannelGraph
from models.narrow import Selection
from prune.compact import compact, relative_difference
from prune.masks import choose_filters
from prune.schedule import HardPruning
from utils import cli
from utils.errors import UserError
from utils.files import write_atomic
from utils.profile import profile_network
from utils.runs.environment import git_sha

KEEP_RATIO = 0.6
NUM_CLASSES = 10
TOLERANCE = 1e-4  # of the largest logit
SIDES_PIXELS = (64, 96, 128, 160, 192, 224, 240, 256, 288, 384, 448)  # the first that goes through the network
MOST_PARAMETERS = 150e6  # for torch_pruning, which needs gradients besides
TIMM_NETWORKS = Path(__file__).with_name("compaction_zoo_timm.txt")
OUTPUT = RESULTS / "compaction_zoo.jsonl"
TABLE = Path(__file__).resolve().parent.parent / "docs" / "tables" / "compaction_zoo.csv"


def get_args_parser() -> cli.Parser:
    parser = cli.Parser(prog="compaction_zoo.py", description="Compaction of networks of torchvision and timm.")
    parser.add_argument("--networks", nargs="+", metavar="NAME", help="torchvision/NAME and timm/NAME (default: all)")
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS, help="which of them")
    parser.add_argument("--limit", type=cli.positive_int, metavar="N", help="measure at most N networks, then stop")
    parser.add_argument("--time-limit", type=cli.positive_int, default=60, metavar="SECONDS", help="for one network and method")
    parser.add_argument("--output", type=Path, default=OUTPUT, help="where the JSON lines go")
    parser.add_argument("--table", action="store_true", help="write the table of what the output has, and measure nothing")
    return parser


def main(args: argparse.Namespace) -> None:
    done = read_rows(args.output)
    if args.table:
        return write_table(list(done.values()))
    names = args.networks or all_networks()
    missing = [(name, method) for method in args.methods for name in names if method not in done.get(name, {})]
    args.output.parent.mkdir(parents=True, exist_ok=True)
    for name, method in missing[: args.limit]:
        result = _within(args.time_limit, METHODS[method], name)
        row = {"network": name, "method": method, **result, "commit": git_sha()}
        with args.output.open("a") as file:
            file.write(json.dumps(row) + "\n")
        print(row, flush=True)


def read_rows(path: Path) -> dict[str, dict[str, Any]]:
    """What the output has of each network: its name, and a result by method, the last one of each."""
    rows: dict[str, dict[str, Any]] = {}
    for line in path.read_text().splitlines() if path.exists() else []:
        result = json.loads(line)
        rows.setdefault(result["network"], {"network": result["network"]})[result["method"]] = result
    return rows


def all_networks() -> list[str]:
    of_torchvision = [f"torchvision/{name}" for name in models.list_models(module=models)]
    return of_torchvision + [f"timm/{name}" for name in TIMM_NETWORKS.read_text().split()]


def _within(seconds: int, function: Callable[[str], dict[str, Any]], name: str) -> dict[str, Any]:
    """What `function(name)` gives in a process of its own; one that takes longer is ended."""
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_send, args=(sender, function, name))
    began = time.monotonic()
    process.start()
    sender.close()
    try:
        result = receiver.recv() if receiver.poll(seconds) else {"works": False, "reason": f"takes more than {seconds} s"}
    except EOFError:
        result = {"works": False, "reason": "the process ended: out of memory?"}
    process.kill()
    process.join()
    return {**result, "seconds": round(time.monotonic() - began, 1)}


def _send(connection: Connection, function: Callable[[str], dict[str, Any]], name: str) -> None:
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    try:
        connection.send(function(name))
    except UserError as error:
        connection.send({"works": False, "reason": str(error)})
    except Exception as error:  # of whatever code the network brings
        text = str(error).strip().splitlines()
        connection.send({"works": False, "reason": f"{type(error).__name__}: {text[0] if text else ''}"})


# ---- ours --------------------------------------------------------------------------------------------------------------


def measure_ours(name: str) -> dict[str, Any]:
    """How much is left of one network and how far off it is."""
    network, images = build(name)
    graph = ChannelGraph(network, images)
    layers = graph.prunable_layers(linear=True)
    kept = choose_filters(layers, {layer.name: KEEP_RATIO for layer in layers}, criterion="filter-a")
    HardPruning(graph, Selection(graph, kept))
    small = compact(network, images, tolerance=float("inf"))
    difference = relative_difference(network, small, [images])
    agrees = difference <= TOLERANCE
    reason = "" if agrees else f"differs by {difference:.1e}"
    return {"works": agrees, "wrong": not agrees, "difference": difference, **_left(network, small, images), "reason": reason}


def _left(network: nn.Module, small: nn.Module, images: Tensor) -> dict[str, float]:
    before, after = (profile_network(own, images[:1]) for own in (network, small))
    return {key: after[key] / before[key] for key in ("parameters", "macs")} | {"side": images.shape[-1]}


def build(name: str, *, sides: Sequence[int] = SIDES_PIXELS) -> tuple[nn.Module, Tensor]:
    """A network with random weights in evaluation, and two images of the least size that goes through it."""
    torch.manual_seed(0)
    source, _, plain = name.partition("/")
    network = _of_torchvision(plain) if source == "torchvision" else _of_timm(plain)
    network.eval()
    randomise(network)
    own = getattr(network, "image_size", None) or (getattr(network, "pretrained_cfg", None) or {}).get("input_size", (3, 64))[-1]
    config = getattr(network, "pretrained_cfg", None) or {}
    sides = (own,) if config.get("fixed_input_size") else (*sides, own)
    for side in sides:
        images = torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(1))
        try:
            with torch.no_grad():
                network(images)
            return network, images
        except Exception as error:
            refusal = error
    raise UserError(f"no image goes through it: {refusal}")


def _of_torchvision(name: str) -> nn.Module:
    options = {"aux_logits": False, "init_weights": False} if name in ("googlenet", "inception_v3") else {}
    return models.get_model(name, weights=None, num_classes=NUM_CLASSES, **options)


def _of_timm(name: str) -> nn.Module:
    import timm

    return timm.create_model(name, num_classes=NUM_CLASSES)


@torch.no_grad()
def randomise(network: nn.Module) -> None:
    """Replaces initial values that would hide a difference: plain batch norms, tiny layer scales, an empty last layer."""
    for name, parameter in network.named_parameters():
        if re.search(r"(layer_scale\w*|gamma\w*|ls\d?\.gamma|skipinit_gain)$", name):
            nn.init.uniform_(parameter, 0.5, 1.5)
    for module in network.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.weight is not None:
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.1)
            nn.init.normal_(module.running_mean, std=0.1)
        elif isinstance(module, nn.Linear | nn.Conv2d) and not module.weight.any():
            nn.init.normal_(module.weight, std=0.1)


# ---- torch_pruning -----------------------------------------------------------------------------------------------------


def measure_torch_pruning(name: str) -> dict[str, Any]:
    import torch_pruning

    network, images = build(name)
    if sum(parameter.numel() for parameter in network.parameters()) > MOST_PARAMETERS:
        return {"works": None, "reason": f"not measured: more than {MOST_PARAMETERS / 1e6:.0f} million parameters"}
    before, outputs = profile_network(network, images[:1]), network(images)
    last = [module for module in network.modules() if getattr(module, "out_features", None) == NUM_CLASSES]
    last += [m for m in network.modules() if isinstance(m, nn.Conv2d) and m.out_channels == NUM_CLASSES]
    torch_pruning.pruner.MagnitudePruner(
        network,
        images,
        importance=torch_pruning.importance.MagnitudeImportance(p=1),
        pruning_ratio=1 - KEEP_RATIO,
        ignored_layers=last,
    ).step()
    with torch.no_grad():
        shape = network(images).shape
    if shape != outputs.shape:
        return {"works": False, "reason": f"gives {tuple(shape)} in place of {tuple(outputs.shape)}"}
    after = profile_network(network, images[:1])
    return {"works": True, **{key: after[key] / before[key] for key in ("parameters", "macs")}, "reason": ""}


METHODS = {"ours": measure_ours, "torch_pruning": measure_torch_pruning}


# ---- tables ------------------------------------------------------------------------------------------------------------


def write_table(rows: Sequence[dict[str, Any]]) -> None:
    """Writes TABLE, a line a network that both methods were tried on, and prints a summary for each source."""
    rows = sorted((row for row in rows if METHODS.keys() <= row.keys()), key=lambda row: row["network"])
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, list(_shown(rows[0])), lineterminator="\n")
    writer.writeheader()
    writer.writerows(map(_shown, rows))
    TABLE.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(TABLE, text.getvalue().encode())
    for source in ("torchvision", "timm"):
        if own := [row for row in rows if row["network"].startswith(source)]:
            print(f"{source}: {summary(own)}")


def summary(rows: Sequence[dict[str, Any]]) -> str:
    ours, other = ([row[who] for row in rows] for who in ("ours", "torch_pruning"))
    wrong = sum(bool(own.get("wrong")) for own in ours)
    asked = [own for own in other if own["works"] is not None]
    return (
        f"{sum(own['works'] for own in ours)} of {len(rows)} networks smaller and equal, {wrong} wrong; "
        f"torch_pruning: {sum(own['works'] for own in asked)} of {len(asked)} run"
    )


def _short(share: float | None) -> str:
    return "" if share is None else f"{share:.4g}"


def _shown(row: dict[str, Any]) -> dict[str, Any]:
    ours, other = row["ours"], row["torch_pruning"]
    reason = ours["reason"].replace("|", "/").replace("\n", " ").replace("which is not supported", "").rstrip(", ")
    return {
        "network": row["network"],
        "image": ours.get("side"),
        "parameters": _short(ours["parameters"]) if ours["works"] else "WRONG" if ours.get("wrong") else "-",
        "MACs": _short(ours.get("macs")),
        "torch_pruning: parameters": _short(other.get("parameters")) or ("fails" if other["works"] is False else "not measured"),
        "its MACs": _short(other.get("macs")),
        "refused because": reason,
    }


if __name__ == "__main__":
    cli.execute(lambda: main(get_args_parser().parse_args()))
