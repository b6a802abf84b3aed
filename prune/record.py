"""What a pruning run writes down: the accuracy before and after the choice, its checkpoints, and the proof at its end."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from models.difference import ResultDifference
from models.graph import ChannelGraph, output_channels
from models.graph.layers import PrunableLayer
from models.narrow import NarrowNetwork, Selection
from models.network_file import NetworkFile, describe_network, load_network
from prune.compact import compact_selection
from prune.papers_flops import papers_flops_drop
from prune.schedule import PruningSchedule
from utils.device import to_device
from utils.errors import UserError
from utils.files import read_json
from utils.images.batches import ImageData
from utils.modes import evaluating
from utils.profile import compare_networks, comparison_table
from utils.python_file import names_function
from utils.runs.folder import BEFORE_TRAINING, BEST, COMPACT, KEPT_FILTERS, LATENCY_TABLE, SUMMARY
from utils.runs.run import Run
from utils.training.evaluation import check_score, evaluate
from utils.training.metrics import Sums, is_at_chance
from utils.training.recalibration import recalibrated_batch_norm
from utils.training.reporting import gain_lines, log_end

WHOLE = "no filter is pruned, the network stays whole (--prune-rates below 1 prunes)"


def log_accuracy(
    run: Run, *, teacher: NetworkFile | None, student: NetworkFile, data: ImageData, is_copy: bool
) -> dict[str, Any]:
    """Scores the networks before pruning, once where the student is a copy; warns where one is no better than guessing."""
    classes, scores = len(data.dataset.classes), {}
    for role, file in (("teacher", teacher), ("student", student)):
        if file is None:
            continue
        known = scores.get("teacher") if is_copy else None
        if file.num_classes != classes:
            run.log(f"{role} {file.model}: knows {file.num_classes} other classes, it has no accuracy on {data.dataset.name}")
            continue
        scores[role] = known or {"model": file.model, **evaluate(file.network, data)}
        check_score(scores[role], origin=f"{role} {file.model}")
        run.log(f"{role} {file.model}: top1 {scores[role]['top1']:.2f}, loss {scores[role]['loss']:.4f}")
        if role == "teacher" and is_at_chance(scores[role]["top1"], num_classes=classes):
            run.warn(f"the teacher scores at chance ({100 / classes:.1f}) on {data.dataset.name}: is --t-path the right file?")
    return scores


def log_pruning(
    run: Run,
    scores: Mapping[str, Any],
    *,
    schedule: PruningSchedule,
    layers: Sequence[PrunableLayer],
    student: NetworkFile,
    data: ImageData,
    recalibrate_bn_batches: int | None = None,
    before: Mapping[str, float] | None = None,
) -> None:
    """Logs the choice and what it did to the accuracy, and leaves both in files of the run.

    `scores` are those before it, `layers` what the choice was among. `before` is what the pruned network scored before it was
    reconstructed, None where it was not.
    """
    recalibrated = recalibrated_batch_norm(student.network, data, batches=recalibrate_bn_batches)
    with schedule.shipped() as selection, recalibrated:
        pruned = evaluate(student.network, data)
    classes = len(data.dataset.classes)
    reported = _reported(layers, selection)
    if all(layer.name not in selection.kept for layer in reported):
        run.log(WHOLE)
    else:
        run.log(kept_line(reported, selection, file=run.folder / KEPT_FILTERS))
        for layer in reported:
            if not selection.channels(layer.name):
                run.warn(f"{layer.name} has lost every filter")
    done = "pruned" if before is None else "pruned and reconstructed"
    run.log(f"{done}, before fine-tuning: top1 {pruned['top1']:.2f}, loss {pruned['loss']:.4f}")
    trained = not is_at_chance(scores["student"]["top1"], num_classes=classes)
    if trained and is_at_chance(pruned["top1"], num_classes=classes):
        run.warn(f"accuracy fell to chance ({100 / classes:.1f}) by pruning; fine-tuning starts nearly from nothing")
    save_kept(run, layers, selection)
    reached = {"pruned": pruned} if before is None else {"pruned": before, "reconstructed": pruned}
    run.save_json(BEFORE_TRAINING, {**scores, **reached})


def kept_line(layers: Sequence[PrunableLayer], selection: Selection, *, file: Path) -> str:
    """What stays of the layers, in one line; `file` has it layer by layer."""
    left = {layer.name: len(selection.channels(layer.name)) for layer in layers}
    whole = sum(layer.filters for layer in layers)
    cut = sum(left[layer.name] < layer.filters for layer in layers)
    shares = [left[layer.name] / layer.filters for layer in layers]
    return (
        f"kept: {sum(left.values())} of {whole} filters, {cut} of {len(layers)} layers pruned, "
        f"a layer keeps {min(shares):.2f} to {max(shares):.2f} -> {file}"
    )


def log_step(run: Run, layers: Sequence[PrunableLayer], selection: Selection, step: int, *, steps: int) -> None:
    """Logs a later step of gradual pruning of `layers`, counted from 0, and keeps its choice."""
    reported = _reported(layers, selection)
    left, whole = sum(len(selection.channels(layer.name)) for layer in reported), sum(layer.filters for layer in reported)
    run.log(f"step {step + 1} of {steps}: {left} of {whole} filters are left")
    save_kept(run, layers, selection)


def save_kept(run: Run, layers: Sequence[PrunableLayer], selection: Selection) -> None:
    reported = _reported(layers, selection)
    kept = {layer.name: {"filters": layer.filters, "kept": list(selection.channels(layer.name))} for layer in reported}
    run.save_json(KEPT_FILTERS, kept)


def _reported(layers: Sequence[PrunableLayer], selection: Selection) -> list[PrunableLayer]:
    """The layers that the choice was among, and others that have lost filters before."""
    names = {layer.name for layer in layers}
    others = selection.graph.prunable_layers(linear=True) if not selection.is_whole else []
    return [*layers, *(layer for layer in others if layer.name in selection.kept and layer.name not in names)]


def describe_pruned(
    network: nn.Module, selection: Selection, *, schedule: PruningSchedule, file: NetworkFile, config: Mapping[str, Any]
) -> dict[str, Any]:
    """A checkpoint of the pruned network at full width, so that everything that reads the unpruned one reads it too.

    `file` is what the student was before it was pruned, `config` the flags of the run.
    """
    is_small = isinstance(network, NarrowNetwork)
    state = network.dense_state_dict(idle=schedule.model.state_dict()) if is_small else network.state_dict()
    identity = {"model": file.model, "num_classes": file.num_classes, "images": file.images}
    return describe_network(state, **identity, config=config, kept=selection.to_json())


def finish(
    run: Run,
    result: Mapping[str, Any],
    *,
    graph: ChannelGraph,
    model: str,
    data: ImageData,
    config: Mapping[str, Any],
    head: Mapping[str, Any],
    following: Callable[..., list[str]],
) -> None:
    """Removes the pruned filters of the best network, proves that nothing changed, and leaves small network and summary.

    `result` is what the training returned, `graph` that of the student, `model` the network's name, `head` what the summary
    begins with, `following(*flags)` the command that exports a file. For the main process alone.
    """
    best = load_network(run.folder / BEST, flag="--save-dir", model=model)
    dense = to_device(best.network, data.device)
    graph = graph.rebound(dense)
    selection = Selection.from_json(graph, best.kept)
    layers = graph.prunable_layers(linear=config["prune_linear"])
    kept = {layer.name: len(selection.channels(layer.name)) for layer in layers}
    summary = {**head, "model": best.model, **read_json(run.folder / BEFORE_TRAINING), **result, "kept_filters": kept}
    if (run.folder / LATENCY_TABLE).exists():
        summary["share_of_time"] = read_json(run.folder / LATENCY_TABLE)["measured"]
    try:
        small = compact_selection(dense, selection)
    except UserError as error:  # the training is worth its summary all the same
        run.warn(f"no compact network is written: {error}")
        written = BEST
    else:
        if not small.kept:
            run.log(f"{COMPACT} is the whole network: no filter is zero")
        summary["compact"] = save_compact(run, best, graph, small, result=result, data=data, config=config)
        written = COMPACT
    run.save_json(SUMMARY, summary)
    words = ["--load-path", str(run.folder / written), "--output", str(run.folder / "small.onnx")]
    words += ["--model", model] if names_function(model) else []
    log_end(run, result, written=run.folder / written, following=following(*words))


def compare_outputs(dense: nn.Module, small: nn.Module, data: ImageData) -> tuple[float, dict[str, float]]:
    """`relative_difference` over the test images, and the top-1 accuracy of either, in one pass."""
    difference, sums = ResultDifference(), {"dense": Sums(data.device), "compact": Sums(data.device)}
    with evaluating(dense, small), torch.no_grad():
        for images, labels, *_ in data.test_batches():
            logits = {"dense": dense(images), "compact": small(images)}
            difference.add(*logits.values())
            for name, outputs in logits.items():
                sums[name].add({"loss": F.cross_entropy(outputs, labels)}, outputs, labels)
    return difference.relative, {name: each.read()["top1"] for name, each in sums.items()}


def whole_layers_table(kept: Mapping[str, Sequence[int]], small: NarrowNetwork) -> str:
    """What the small network could not save, as text: pruned layers that it has whole, and channels that it puts back.

    Empty where there is nothing of the kind. `kept` are the channels that stay of each pruned layer.
    """
    layers = dict(small.named_modules())
    uncut = [name for name, channels in kept.items() if name in layers and len(channels) < (output_channels(layers[name]) or 0)]
    rows = [(name, small.uncut.get(name, "its groups are evened up to one size")) for name in uncut]
    rows += [(_few(restored.layers), f"all channels are read by {restored.operation}") for restored in small.restored]
    if not rows:
        return ""
    width = max(len(name) for name, _ in rows)
    return "\n".join(["layers that stay whole, or are made whole again:", *(f"  {name:<{width}}  {why}" for name, why in rows)])


def _few(names: Sequence[str], count: int = 3) -> str:
    return ", ".join(names[:count]) + (f" and {len(names) - count} more" if len(names) > count else "")


def save_compact(
    run: Run,
    best: NetworkFile,
    graph: ChannelGraph,
    small: NarrowNetwork,
    *,
    result: Mapping[str, Any],
    data: ImageData,
    config: Mapping[str, Any],
) -> dict[str, Any]:
    """Writes the small network of `best`, which is that of `graph` on the device; gives what the summary says of the two."""
    dense = graph.network
    difference, accuracy = compare_outputs(dense, small, data)
    identity = {"model": best.model, "num_classes": best.num_classes, "images": best.images}
    description = describe_network(small.state_dict(), **identity, config=config, kept=small.kept, compact=True)
    run.save(COMPACT, {**description, "epoch": result["best"]["epoch"], "metrics": result["best"]})
    comparison = compare_networks(dense, small, data.example[:1], files=(run.folder / BEST, run.folder / COMPACT))
    comparison["papers_flops_drop_percent"] = papers_flops_drop(graph, small)
    run.log(comparison_table(comparison))
    run.log(f"FLOPs of the convolutions, as papers count them: {comparison['papers_flops_drop_percent']:.1f} % less")
    run.log(f"steps between layers that store different channels: {small.relayout_count}")
    for line in gain_lines(comparison, relayouts=small.relayout_count):
        run.log(line)
    if table := whole_layers_table(best.kept, small):
        run.log(table)
    run.log(f"top1 of the dense network {accuracy['dense']:.2f}, of the compact {accuracy['compact']:.2f}")
    run.log(f"largest difference of their logits, relative to the largest logit: {difference:.1e}")
    return {"top1": accuracy, "relative_difference": difference, "relayouts": small.relayout_count, **comparison}
