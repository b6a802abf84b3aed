"""Shares the weights of a network by k-means, fine-tunes them, and encodes the result into one file that decodes bit for bit."""

import argparse
import copy
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from models import check_model
from models.modes import evaluating
from models.narrow import NarrowNetwork
from models.network_file import NetworkFile, describe_network, load_network
from prune.compact import check_pruned_zeros, compact
from quantize.archive import differing_tensors, load_archive, read_archive, save_archive
from quantize.codebook import QUAN_MODES, bake_weights, layer_bits, share_weights
from quantize.table import ArchiveReport
from utils import cli, setup
from utils.data import ImageData
from utils.distributed import World, leave
from utils.engine import CrossEntropyObjective, evaluate
from utils.errors import UserError, naming
from utils.files import is_archive, read_json, save_checkpoint
from utils.plan import print_plan
from utils.profile import compare_networks
from utils.run_folder import ARCHIVE, BEFORE_TRAINING, BEST, COMPACT, SUMMARY
from utils.runs import Run
from utils.seed import seed_everything

SCRIPT = "quantize_encode.py"
SHORT_MODES = tuple(mode.removesuffix("-quan") for mode in QUAN_MODES)


def get_args_parser() -> cli.Parser:
    parser = cli.Parser(prog=SCRIPT, description="Quantize a network by shared weights and encode it into one file.")
    network = parser.add_argument_group("network")
    network.add_argument("--model", type=cli.checked(check_model), metavar="NAME",
                         help="the network (default: the one that its file names, unless that is FILE.py:FUNCTION)")  # fmt: skip
    network.add_argument(
        "--load-path", metavar="FILE", help="its checkpoint: dense, pruned or compact; for --evaluate also an archive"
    )
    quantization = parser.add_argument_group("quantization")
    quantization.add_argument(
        "--quan-mode", default="all-quan", choices=(*QUAN_MODES, *SHORT_MODES), help="which layers share weights"
    )
    quantization.add_argument("--quan-bits", nargs="+", default=["5"], metavar="BITS",
                              help="2^BITS shared weights a layer, 1 to 16; NAME=BITS for single layers")  # fmt: skip
    files = parser.add_argument_group("archives")
    files.add_argument("--decode", metavar="FILE", help="only write the network of an archive into --output")
    files.add_argument("--output", metavar="FILE", help="checkpoint that --decode writes")
    files.add_argument("--force", action="store_true", help="let --decode replace an existing --output")
    files.add_argument("--inspect", metavar="FILE", help="only print where the bytes of an archive go")
    cli.add_data_flags(parser)
    cli.add_training_flags(parser, lr=0.001, n_epochs=20, schedule=(), lr_drops=())
    cli.add_run_flags(parser, log_name="quantize_encode.txt")
    say_what_counts(parser, training=cli.names_of(quantization))
    return parser


def say_what_counts(parser: cli.Parser, *, training: Sequence[str]) -> None:
    """Which flags count beside which: the modes that only read an archive take nothing else."""
    cli.counts_in_training(parser, *training)
    others = parser.names() - {"inspect", "decode", *cli.PLACES}
    parser.counts_only(*others, where=lambda args: args.inspect is None, only="without --inspect, which only reads an archive")
    others -= {"output", "force"}
    parser.counts_only(*others, where=lambda args: args.decode is None, only="without --decode, which only reads an archive")
    parser.counts_only("output", "force", where=lambda args: args.decode is not None, only="with --decode")


def main(args: argparse.Namespace) -> None:
    check_flags(args)
    if args.inspect is not None:
        return inspect(args)
    if args.decode is not None:
        return decode(args)

    device, world = setup.prepare(args)
    if args.evaluate:
        return score(args, device=device, world=world)
    lease, state, fallback = setup.take_up(args, world)

    seed_everything(args.seed)
    file = load_network(args.load_path, flag="--load-path", model=args.model)
    announced = setup.announce(args, file.model, device=device, world=world, state=state)
    file, data = with_data(args, file, device=device, world=world, state=state)
    network = without_zeros(file.network, data)
    bits = layer_bits(network, mode=args.quan_mode, bits=args.quan_bits)
    plan = setup.training_plan(args)
    if args.dry_run:
        lines = [f"{name} would share {2**count} values" for name, count in bits.items()]
        return print_plan(args, plan=plan, data=data, networks={"network": network}, lines=lines)

    networks = {"--load-path": file.network}
    run = setup.open_run(args, script=SCRIPT, device=device, world=world, lease=lease, state=state, networks=networks)
    setup.log_beginning(run, announced, plan, fallback, data=data)
    network = setup.to_device(network, device, sync_bn=args.sync_bn)
    quantize(run, network, bits, data, is_new=state is None)
    objective = CrossEntropyObjective(network, label_smoothing=args.label_smoothing)
    result = setup.train(
        args,
        objective,
        network=network,
        describe=partial(describe_quantized, args=args, file=file),
        data=data,
        run=run,
        plan=plan,
        state=state,
    )
    leave()  # the rest is for the main process alone
    if world.is_main:
        head = setup.summary_head(args, SCRIPT, run, objective=objective, data=data)
        encode(args, run, result, data.alone(), head=head)
    run.close()


def check_flags(args: argparse.Namespace) -> None:
    """Raises UserError for flags that are missing or contradict each other."""
    if args.inspect is not None and args.decode is not None:
        raise UserError(f"--inspect {args.inspect}: not with --decode, choose one of them")
    if args.decode is not None:
        return cli.require(args, "output")
    if args.inspect is None:
        cli.require(args, "load_path")


def with_data(
    args: argparse.Namespace,
    file: NetworkFile,
    *,
    device: torch.device,
    world: World,
    state: Mapping[str, Any] | None = None,
) -> tuple[NetworkFile, ImageData]:
    """The network of --load-path on the device, its pruned filters truly at zero, and the data that it is fit for."""
    origin = f"--load-path {args.load_path}"
    data = setup.load_data(args, device=device, world=world, files={origin: file.images}, state=state)
    setup.check_classes(file.num_classes, data, origin=origin)
    if not file.compact:
        with naming(origin):
            check_pruned_zeros(file.network.state_dict(), file.kept)
    setup.check_images(setup.to_device(file.network, device), data, origin=origin)
    return replace(file, images=data.dataset.images), data


def without_zeros(network: nn.Module, data: ImageData) -> nn.Module:
    """The network without the filters that are zero, so that they cost nothing; itself if it has none."""
    if isinstance(network, NarrowNetwork):
        return network
    smaller = compact(network, data.example)
    return smaller if smaller.kept else network


def quantize(run: Run, network: nn.Module, bits: Mapping[str, int], data: ImageData, *, is_new: bool) -> None:
    """Makes the layers of `bits` share their weights, in place; a new run logs what that does and keeps it in a file."""
    scores = {"original": evaluate(network, data)} if is_new else {}
    entries = share_weights(network, bits)
    if not is_new:
        return
    scores["quantized"] = evaluate(network, data)
    run.log(f"{len(entries)} layers share values: " + ", ".join(f"{name} {count}" for name, count in entries.items()))
    for name, result in scores.items():
        run.log(f"{name}, before fine-tuning: top1 {result['top1']:.2f}, loss {result['loss']:.4f}")
    run.save_json(BEFORE_TRAINING, scores)


def describe_quantized(
    network: nn.Module, kept: Mapping[str, Tensor], *, args: argparse.Namespace, file: NetworkFile
) -> dict[str, Any]:
    """A checkpoint with plain weights at full width, so that everything that reads the unquantized network reads it too."""
    plain = bake_weights(copy.deepcopy(network))
    is_narrow = isinstance(plain, NarrowNetwork)
    return describe_network(
        plain.dense_state_dict() if is_narrow else plain.state_dict(),
        model=file.model,
        num_classes=file.num_classes,
        images=file.images,
        config=setup.flags_of(args),
        kept=plain.kept if is_narrow else None,
    )


def describe_compact(network: nn.Module, *, config: Mapping[str, Any], **identity: Any) -> dict[str, Any]:
    """A checkpoint of the network as it is, narrow or not; `identity` is its model, number of classes and images."""
    kept = network.kept if isinstance(network, NarrowNetwork) else None
    return describe_network(network.state_dict(), **identity, config=config, kept=kept, compact=bool(kept))


def encode(args: argparse.Namespace, run: Run, result: dict[str, Any], data: ImageData, *, head: dict[str, Any]) -> None:
    """Encodes the best network, proves that it decodes to the same bits, and leaves archive, small checkpoint and summary."""
    best = load_network(run.folder / BEST, flag="--save-dir", model=args.model)
    dense = setup.to_device(best.network, data.device)
    small = setup.to_device(without_zeros(dense, data), data.device)
    identity = {"model": best.model, "num_classes": best.num_classes, "images": best.images}
    description = describe_compact(small, **identity, config=setup.flags_of(args))
    run.save(COMPACT, {**description, "epoch": result["best"]["epoch"], "metrics": result["best"]})
    report = save_archive(run.folder / ARCHIVE, small, **identity)
    decoded = setup.to_device(load_archive(run.folder / ARCHIVE, model=args.model), data.device)
    check_identical(small, decoded, data)
    scores = {**read_json(run.folder / BEFORE_TRAINING), "fine_tuned": evaluate(small, data), "decoded": evaluate(decoded, data)}
    sizes = compare_networks(dense, small, data.example[:1], files=(run.folder / BEST, run.folder / COMPACT))
    ratio = sizes["dense"]["file_bytes"] / report.file_bytes
    log_result(run, report, scores=scores, sizes=sizes, ratio=ratio)
    archive = {**report.as_dict(), "ratio": ratio, "identical": "yes"}
    run.save_json(SUMMARY, {**head, "model": best.model, **result, "accuracy": scores, "compact": sizes, "archive": archive})


@torch.no_grad()
def check_identical(encoded: nn.Module, decoded: nn.Module, data: ImageData) -> None:
    """Compares every tensor and the logits of every test image, bit for bit; a difference is an error of this program."""
    names = differing_tensors(encoded, decoded)
    with evaluating(encoded, decoded):
        same = all(torch.equal(encoded(batch.images), decoded(batch.images)) for batch in data.test_batches())
    if names or not same:
        raise RuntimeError(f"the decoded network is not the encoded one: {', '.join(names[:3]) or 'other logits'}")


def log_result(run: Run, report: ArchiveReport, *, scores: Mapping[str, Any], sizes: Mapping[str, Any], ratio: float) -> None:
    run.log("\n".join(report.lines()))
    checkpoints = ", ".join(f"{role} checkpoint {sizes[role]['file_bytes']:,}" for role in ("dense", "compact"))
    run.log(f"bytes on disk: {checkpoints}, archive {report.file_bytes:,}, {ratio:.2f}x smaller than the dense one")
    run.log("top1: " + ", ".join(f"{name.replace('_', '-')} {score['top1']:.2f}" for name, score in scores.items()))
    run.log("identical: yes, every tensor and the logits of every test image, before encoding and after decoding")
    run.log(f"done -> {run.folder / ARCHIVE}")


def inspect(args: argparse.Namespace) -> None:
    """Prints where the bytes of the archive in --inspect go."""
    _, report = read_flagged(args.inspect, flag="--inspect", model=args.model)
    print(f"{args.inspect}: {report.model}, {report.num_classes} classes")
    if report.images is not None:
        print(f"images: {report.images}")
    print("\n".join(report.lines()))


def decode(args: argparse.Namespace) -> None:
    """Writes the network of the archive in --decode as a checkpoint."""
    if Path(args.output).exists() and not args.force:
        raise UserError(f"--output {args.output}: exists already, choose another name or give --force")
    network, report = read_flagged(args.decode, flag="--decode", model=args.model)
    config = {"decoded_from": Path(args.decode).name}
    identity = {"model": report.model, "num_classes": report.num_classes, "images": report.images}
    save_checkpoint(args.output, describe_compact(network, **identity, config=config))
    print(f"{args.decode}: {report.model}, {report.num_classes} classes -> {args.output}")


def score(args: argparse.Namespace, *, device: torch.device, world: World) -> None:
    """Prints the accuracy of the network in --load-path, an archive or a checkpoint."""
    if not is_archive(args.load_path):
        file = load_network(args.load_path, flag="--load-path", model=args.model)
        file, data = with_data(args, file, device=device, world=world)
        return setup.print_score(file.model, data, evaluate(file.network, data, amp=args.amp))
    origin = f"--load-path {args.load_path}"
    network, report = read_flagged(args.load_path, flag="--load-path", model=args.model)
    data = setup.load_data(args, device=device, world=world, files={origin: report.images})
    setup.check_classes(report.num_classes, data, origin=origin)
    network = setup.to_device(network, device)
    setup.check_images(network, data, origin=origin)
    setup.print_score(report.model, data, evaluate(network, data, amp=args.amp))


def read_flagged(path: str, *, flag: str, model: str | None) -> tuple[nn.Module, ArchiveReport]:
    """`read_archive` of the file that `flag` names, which holds the `model` of --model where that is given."""
    try:
        return read_archive(path, model=model)
    except UserError as error:
        raise UserError(f"{flag} {error}") from error


if __name__ == "__main__":
    cli.execute(lambda: main(cli.parse_flags(get_args_parser())))
