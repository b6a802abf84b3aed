"""Quantizes a network and fine-tunes it: by shared weights, encoded into one file that decodes bit for bit, or for int8."""

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from distill.flags import add_distillation_flags, check_distillation, flagged_objective
from models import check_model
from models.int8 import Int8Network
from models.narrow import NarrowNetwork
from models.network_file import NetworkFile, load_network
from prune.compact import check_pruned_zeros, compact
from prune.networks import read_checked
from quantize.archive import read_flagged
from quantize.codebook import QUAN_MODES, layer_bits
from quantize.record import describe_compact, describe_quantized, encode, finish_int8, share, simulate
from utils import cli
from utils.checkpoints import save_checkpoint
from utils.cli.plan import print_plan
from utils.distributed import leave
from utils.errors import UserError, naming
from utils.files import is_archive
from utils.images.batches import ImageData
from utils.runs.folder import BEST
from utils.runs.run import Run
from utils.seed import seed_everything
from utils.training import setup
from utils.training.engine import CrossEntropyObjective, Objective, TrainingPlan, evaluate
from utils.world import World

SCRIPT = "quantize_encode.py"
INT8 = "int8"  # a --quan-mode beside those that share weights
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
    quantization.add_argument("--quan-mode", default="all-quan", choices=(*QUAN_MODES, *SHORT_MODES, INT8),
                              help="which layers share weights; int8: none, all are trained in simulated eight bits")  # fmt: skip
    quantization.add_argument("--quan-bits", nargs="+", default=["5"], metavar="BITS",
                              help="2^BITS shared weights a layer, 1 to 16; NAME=BITS for single layers")  # fmt: skip
    teacher = parser.add_argument_group("teacher, for int8")
    teacher.add_argument("--t-model", type=cli.checked(check_model), metavar="NAME",
                         help="its network (default: the one that its file names)")  # fmt: skip
    teacher.add_argument("--t-path", metavar="FILE", help="its checkpoint, such as the unpruned network")
    add_distillation_flags(parser)
    files = parser.add_argument_group("archives")
    files.add_argument("--decode", metavar="FILE", help="only write the network of an archive into --output")
    files.add_argument("--output", metavar="FILE", help="checkpoint that --decode writes")
    files.add_argument("--force", action="store_true", help="let --decode replace an existing --output")
    files.add_argument("--inspect", metavar="FILE", help="only print where the bytes of an archive go")
    cli.add_data_flags(parser)
    cli.add_training_flags(parser, lr=0.001, n_epochs=20, schedule=(), lr_drops=())
    cli.add_run_flags(parser, log_name="quantize_encode.txt")
    say_what_counts(parser, training=[*cli.names_of(quantization), *cli.names_of(teacher)])
    return parser


def say_what_counts(parser: cli.Parser, *, training: Sequence[str]) -> None:
    """Which flags count beside which: the modes that only read an archive take nothing else."""
    cli.counts_in_training(parser, *training)
    parser.counts_only("quan_bits", where=lambda args: args.quan_mode != INT8, only="where weights are shared, not with int8")
    parser.counts_only("t_path", "t_model", "distill", where=lambda args: args.quan_mode == INT8, only="with --quan-mode int8")
    parser.counts_only("sync_bn", where=lambda args: args.quan_mode != INT8, only="where batch norms learn, not with int8")
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
    teacher = read_checked("--t-path", args.t_path, args.t_model) if args.t_path is not None else None
    file, data = with_data(args, file, teacher=teacher, device=device, world=world, state=state)
    network = small_network(args, file.network, data)
    bits = {} if args.quan_mode == INT8 else layer_bits(network, mode=args.quan_mode, bits=args.quan_bits)
    plan = setup.training_plan(args)
    if args.dry_run:
        return print_quantization(args, plan, network, bits, teacher, data)

    networks = {"--load-path": file.network, **({"--t-path": teacher.network} if teacher is not None else {})}
    run = setup.open_run(args, script=SCRIPT, device=device, world=world, lease=lease, state=state, networks=networks)
    setup.log_beginning(run, announced, plan, fallback, data=data)
    network = setup.to_device(network, device, sync_bn=args.sync_bn)
    if args.quan_mode == INT8:
        network = simulate(run, network, data, is_new=state is None)
    else:
        share(run, network, bits, data, is_new=state is None)
    objective = objective_of(args, network, teacher, data)
    result = setup.train(
        args,
        objective,
        network=network,
        describe=partial(describe_quantized, config=setup.flags_of(args), file=file),
        data=data,
        run=run,
        plan=plan,
        state=state,
    )
    leave()  # the rest is for the main process alone
    if world.is_main:
        head = setup.summary_head(args, SCRIPT, run)
        finish(args, run, result, data.alone(), head=head)
    run.close()


def check_flags(args: argparse.Namespace) -> None:
    """Raises UserError for flags that are missing or contradict each other."""
    if args.inspect is not None and args.decode is not None:
        raise UserError(f"--inspect {args.inspect}: not with --decode, choose one of them")
    if args.decode is not None:
        return cli.require(args, "output")
    if args.inspect is None:
        cli.require(args, "load_path")
    check_distillation(args)
    if args.t_path is not None and args.distill == ["none"]:
        raise UserError(f"--t-path {args.t_path}: teaches by no loss, name one with --distill")


def print_quantization(
    args: argparse.Namespace,
    plan: TrainingPlan,
    network: nn.Module,
    bits: Mapping[str, int],
    teacher: NetworkFile | None,
    data: ImageData,
) -> None:
    """The plan of a dry run."""
    trained, lines = network, [f"{name} would share {2**count} values" for name, count in bits.items()]
    if args.quan_mode == INT8:
        trained = Int8Network(network)
        lines = [f"{name} would compute in int8" for name in trained.layers]
    lines.append(f"loss: {objective_of(args, trained, teacher, data).formula()}")
    print_plan(args, plan=plan, data=data, networks={"network": network}, lines=lines)


def with_data(
    args: argparse.Namespace,
    file: NetworkFile,
    *,
    device: torch.device,
    world: World,
    teacher: NetworkFile | None = None,
    state: Mapping[str, Any] | None = None,
) -> tuple[NetworkFile, ImageData]:
    """The network of --load-path, its pruned filters truly at zero, and the data that it is fit for.

    It is on the device then, and so is its teacher's, which must be fit for the same data.
    """
    origin = f"--load-path {args.load_path}"
    files = {origin: file, **({f"--t-path {args.t_path}": teacher} if teacher is not None else {})}
    said = {name: own.images for name, own in files.items()}
    data = setup.load_data(args, device=device, world=world, files=said, state=state)
    for name, own in files.items():
        setup.check_classes(own.num_classes, data, origin=name)
    if not file.compact:
        with naming(origin):
            check_pruned_zeros(file.network.state_dict(), file.kept)
    for name, own in files.items():
        setup.check_images(setup.to_device(own.network, device), data, origin=name, trains=own is file and not args.evaluate)
    return replace(file, images=data.dataset.images), data


def small_network(args: argparse.Namespace, network: nn.Module, data: ImageData) -> nn.Module:
    """The network without the filters that are zero, so that they cost nothing; if it has none itself, unless for int8."""
    if isinstance(network, NarrowNetwork):
        return network
    smaller = compact(network, data.example)
    return smaller if smaller.kept or args.quan_mode == INT8 else network


def objective_of(args: argparse.Namespace, network: nn.Module, teacher: NetworkFile | None, data: ImageData) -> Objective:
    """The loss that the quantized network trains by."""
    if args.quan_mode == INT8:
        return flagged_objective(args, network, teacher, data)
    return CrossEntropyObjective(network, label_smoothing=args.label_smoothing)


def finish(args: argparse.Namespace, run: Run, result: dict[str, Any], data: ImageData, *, head: dict[str, Any]) -> None:
    """Leaves what the run is for: the archive of the best network, or its checkpoint for int8."""
    best = load_network(run.folder / BEST, flag="--save-dir", model=args.model)
    setup.to_device(best.network, data.device)
    small = setup.to_device(small_network(args, best.network, data), data.device)
    leave_files = finish_int8 if args.quan_mode == INT8 else encode
    leave_files(run, result, data, best=best, small=small, config=setup.flags_of(args), head=head)


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


if __name__ == "__main__":
    cli.execute(lambda: main(cli.parse_flags(get_args_parser())))
