"""Trains a network from scratch, from published weights or from those of a file, and leaves it in saves/<run>/model_best.pt."""

import argparse
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from models import NAMES, build_model, check_model
from models.narrow import NarrowNetwork, narrow
from models.network_file import NetworkFile, describe_network, example_images, load_network
from prune.compact import check_pruned_zeros
from utils import cli
from utils.cli.plan import print_plan
from utils.distributed import leave
from utils.errors import UserError, naming
from utils.images.batches import ImageData
from utils.profile import profile_network
from utils.runs.folder import BEST, SUMMARY
from utils.seed import seed_everything
from utils.training import setup
from utils.training.engine import CrossEntropyObjective, cross_entropy_formula, evaluate
from utils.world import World

SCRIPT = "initial_train.py"


def get_args_parser() -> cli.Parser:
    parser = cli.Parser(prog=SCRIPT, description="Train a network.")
    parser.add_argument(
        "--model",
        type=cli.checked(check_model),
        metavar="NAME",
        help=f"the network: {NAMES} (default: the one that --load-path names)",
    )
    parser.add_argument(
        "--pretrained", action="store_true", help="start from the weights that torchvision or timm publish for it"
    )
    parser.add_argument("--load-path", metavar="FILE", help="checkpoint to fine-tune, or that --evaluate scores")
    cli.add_data_flags(parser)
    cli.add_training_flags(parser, lr=0.01, n_epochs=200, schedule=(1, 60, 120, 160), lr_drops=(10, 0.2, 0.2, 0.2))
    cli.add_averaging_flags(parser)
    cli.add_run_flags(parser, log_name="initial_train.txt")
    cli.counts_in_training(parser, "pretrained")
    parser.counts_only("pretrained", where=lambda args: args.load_path is None, only="without --load-path, which has the weights")
    return parser


def main(args: argparse.Namespace) -> None:
    if args.evaluate or args.model is None:
        require_network(args)
    device, world = setup.prepare(args)
    if args.evaluate:
        return score(args, device=device, world=world)
    lease, state, fallback = setup.take_up(args, world)
    given = load_network(args.load_path, flag="--load-path", model=args.model) if args.load_path is not None else None
    said = {f"--load-path {args.load_path}": given.images} if given is not None else {}
    announced = setup.announce(args, given.model if given else args.model, device=device, world=world, state=state)
    data = setup.load_data(args, device=device, world=world, files=said, state=state)

    seed_everything(args.seed)
    file = starting_network(args, given, data, is_new=state is None)
    plan = setup.training_plan(args)
    if args.dry_run:
        loss = f"loss: {cross_entropy_formula(args.label_smoothing)}"
        return print_plan(args, plan=plan, data=data, networks={"network": file.network}, lines=[loss])

    networks = {"--load-path": file.network} if args.load_path is not None else {}
    run = setup.open_run(args, script=SCRIPT, device=device, world=world, lease=lease, state=state, networks=networks)
    setup.log_beginning(run, announced, plan, fallback, data=data)
    network = setup.to_device(file.network, device, sync_bn=args.sync_bn)
    objective = CrossEntropyObjective(network, label_smoothing=args.label_smoothing)
    result = setup.train(
        args,
        objective,
        network=network,
        describe=partial(describe_trained, file=file, config=setup.flags_of(args)),
        data=data,
        run=run,
        plan=plan,
        state=state,
    )
    leave()  # the rest is for the main process alone
    if not world.is_main:
        return
    size = {"checkpoint_bytes": (run.folder / BEST).stat().st_size, **profile_network(network, data.example[:1])}
    summary = {**setup.summary_head(args, SCRIPT, run), "model": file.model, **result, **size}
    run.save_json(SUMMARY, summary)
    run.log(f"done: last top1 {result['last']['top1']:.2f}, best {result['best']['top1']:.2f} -> {run.folder / BEST}")
    run.close()


def require_network(args: argparse.Namespace) -> None:
    """Raises UserError unless the flags say what to score, or what to train."""
    if args.load_path is None:
        raise UserError("--load-path is required" if args.evaluate else "--model is required, or --load-path with its checkpoint")


def starting_network(args: argparse.Namespace, file: NetworkFile | None, data: ImageData, *, is_new: bool) -> NetworkFile:
    """A new network on the device, or that of the file in --load-path, without the filters that were pruned there."""
    if file is None:
        num_classes, origin = len(data.dataset.classes), f"--model {args.model}"
        network = build_model(args.model, num_classes=num_classes, pretrained=args.pretrained and is_new)
        file = NetworkFile(network, args.model, num_classes)
    else:
        origin = f"--load-path {args.load_path}"
        setup.check_classes(file.num_classes, data, origin=origin)
        if file.kept and not file.compact:  # at full width its zeros would grow back
            with naming(origin):
                check_pruned_zeros(file.network.state_dict(), file.kept)
                example = example_images(file.network, data.dataset.images)
                file = replace(file, network=narrow(file.network, file.kept, example=example), compact=True)
    setup.check_images(setup.to_device(file.network, data.device), data, origin=origin, trains=True)
    return replace(file, images=data.dataset.images)


def describe_trained(
    network: nn.Module, kept: Mapping[str, Tensor], *, file: NetworkFile, config: Mapping[str, Any]
) -> dict[str, Any]:
    """A checkpoint at full width, with zeros where the network began without filters."""
    is_narrow = isinstance(network, NarrowNetwork)
    return describe_network(
        network.dense_state_dict() if is_narrow else network.state_dict(),
        model=file.model,
        num_classes=file.num_classes,
        config=config,
        images=file.images,
        kept=network.kept if is_narrow else None,
    )


def score(args: argparse.Namespace, *, device: torch.device, world: World) -> None:
    """Prints the accuracy of the network in --load-path."""
    origin = f"--load-path {args.load_path}"
    file = load_network(args.load_path, flag="--load-path", model=args.model)
    data = setup.load_data(args, device=device, world=world, files={origin: file.images})
    setup.check_classes(file.num_classes, data, origin=origin)
    result = evaluate(setup.to_device(file.network, data.device), data, amp=args.amp)
    setup.print_score(file.model, data, result)


if __name__ == "__main__":
    cli.execute(lambda: main(cli.parse_flags(get_args_parser())))
