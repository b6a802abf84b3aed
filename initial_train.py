"""Trains a network from scratch, from published weights or from those of a file, and leaves it in saves/<run>/model_best.pt."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

from models import NAMES, check_model
from prune.flags import add_sparsity_flags, sparsity_of
from utils import cli
from utils.errors import UserError, naming
from utils.runs.found import SHIPPED

if TYPE_CHECKING:
    from torch import Tensor, nn

    from models.network_file import NetworkFile
    from prune.settings import Sparsity
    from utils.training.objective import Objective
    from utils.training.session import Session

SCRIPT = "initial_train.py"


def get_args_parser() -> cli.Parser:
    parser = cli.Parser(prog=SCRIPT, description="Train a network.")
    parser.add_argument(
        "--model",
        metavar="NAME",
        help=f"the network: {NAMES} (default: the one that --load-path names)",
    )
    parser.add_argument(
        "--pretrained", action="store_true", help="start from the weights that torchvision or timm publish for it"
    )
    parser.add_argument(
        "--load-path", type=cli.network_path(SHIPPED), metavar="FILE", help="checkpoint to fine-tune, or that --evaluate scores"
    )
    cli.add_recipe_flag(parser)
    cli.add_config_flag(parser)
    cli.add_data_flags(parser)
    cli.add_training_flags(
        parser, lr=0.01, n_epochs=200, schedule=(1, 60, 120, 160), lr_drops=(10, 0.2, 0.2, 0.2),
        fine_tunes=lambda args: args.pretrained or args.load_path is not None,
    )  # fmt: skip
    add_sparsity_flags(parser)
    cli.add_averaging_flags(parser)
    cli.add_run_flags(parser, log_name="initial_train.txt")
    parser.checks["model"] = check_model
    cli.counts_in_training(parser, "pretrained")
    parser.counts_only("pretrained", where=lambda args: args.load_path is None, only="without --load-path, which has the weights")
    parser.leads_with(
        *("model", "pretrained", "dataset", "data_dir", "recipe", "n_epochs", "lr", "batch_size", "run_name", "resume")
    )
    return parser


def main(args: argparse.Namespace) -> None:
    from models import published_normalisation
    from models.network_file import load_network
    from utils.training.recalibration import check_recalibration
    from utils.training.session import Session

    if args.evaluate or args.model is None:
        require_network(args)
    session = Session(cli.session_settings(SCRIPT, args))
    if args.evaluate:
        return score(session, args.load_path, model=args.model)
    given = load_network(args.load_path, flag="--load-path", model=args.model) if args.load_path is not None else None
    session.announce(given.model if given else args.model)
    published = published_normalisation(args.model) if args.pretrained else None
    session.load_data({f"--load-path {args.load_path}": given.images} if given is not None else {}, published=published)

    session.seed()
    if given is None:
        file = new_network(session, args.model, pretrained=args.pretrained)
    else:
        file = given_network(session, given, origin=f"--load-path {args.load_path}")
    check_recalibration(file.network, session.plan.recalibrate_bn_batches)
    if args.dry_run:
        loss = objective_of(session, file.network, sparsity_of(args)).formula()
        return session.print_plan({"network": file.network}, [f"loss: {loss}"])

    run = session.open({"--load-path": file.network if given is not None else None})
    network = session.place(file.network)
    objective = objective_of(session, network, sparsity_of(args))
    describe = partial(describe_trained, file=file, config=session.settings.flags)
    result = session.train(objective, network=network, describe=describe)
    if session.world.is_main:
        finish(session, network, result, model=file.model)
    run.close()


def require_network(args: argparse.Namespace) -> None:
    """Raises UserError unless the flags say what to score, or what to train."""
    if args.load_path is None:
        raise UserError("--load-path is required" if args.evaluate else "--model is required, or --load-path with its checkpoint")


def new_network(session: Session, model: str, *, pretrained: bool) -> NetworkFile:
    """A network with new weights, or with published ones, on the device."""
    from models import build_model
    from models.network_file import NetworkFile
    from utils.device import to_device
    from utils.images.loading import check_images

    num_classes = len(session.data.dataset.classes)
    network = build_model(model, num_classes=num_classes, pretrained=pretrained and session.is_new)
    check_images(to_device(network, session.device), session.data, origin=f"--model {model}", trains=True)
    return NetworkFile(network, model, num_classes, images=session.data.dataset.images)


def given_network(session: Session, file: NetworkFile, *, origin: str) -> NetworkFile:
    """The network of a file on the device, without the filters pruned there: at full width its zeros would grow back.

    Of a file for other classes it is everything but the classifier.
    """
    from dataclasses import replace

    from models.graph import ChannelGraph
    from models.narrow import Selection
    from models.network_file import check_training, example_images, transferred
    from prune.compact import check_zeros_of
    from utils.device import to_device
    from utils.images.loading import check_classes, check_images

    images = session.data.dataset.images
    if file.num_classes != len(images.class_names):
        with naming(origin):
            file = transferred(file, num_classes=len(images.class_names))
    check_classes(file.num_classes, session.data, origin=origin, remark=file.remark)
    check_zeros_of(file, origin=origin)
    if file.kept and not file.compact:
        with naming(origin):
            example = example_images(file.network, images)
            selection = Selection.from_json(ChannelGraph(file.network, example), file.kept)
            file = replace(file, network=selection.shrink(), compact=True)
    check_images(to_device(file.network, session.device), session.data, origin=origin, trains=True)
    if session.is_new:
        with naming(origin):
            check_training(file, file.network, session.data.example)
    return replace(file, images=images)


def objective_of(session: Session, network: nn.Module, sparsity: Sparsity | None) -> Objective:
    """The cross-entropy, with a penalty beside it where channels are to become small."""
    from utils.training.objective import CrossEntropyObjective

    objective = CrossEntropyObjective(network, label_smoothing=session.settings.training.label_smoothing)
    if sparsity is None:
        return objective

    from prune.sparsity import SparseObjective

    return SparseObjective(objective, network, sparsity, example=session.data.example)


def describe_trained(
    network: nn.Module, kept: Mapping[str, Tensor], *, file: NetworkFile, config: Mapping[str, Any]
) -> dict[str, Any]:
    """A checkpoint at full width, with zeros where the network began without filters."""
    from models.narrow import NarrowNetwork
    from models.network_file import describe_network

    is_narrow = isinstance(network, NarrowNetwork)
    return describe_network(
        network.dense_state_dict() if is_narrow else network.state_dict(),
        model=file.model,
        num_classes=file.num_classes,
        config=config,
        images=file.images,
        kept=network.kept if is_narrow else None,
    )


def finish(session: Session, network: nn.Module, result: Mapping[str, Any], *, model: str) -> None:
    """Leaves the summary of the training."""
    from utils.profile import profile_network
    from utils.runs.folder import BEST, SUMMARY
    from utils.training.reporting import log_end

    best = session.run.folder / BEST
    size = {"checkpoint_bytes": best.stat().st_size, **profile_network(network, session.data.example[:1])}
    session.run.save_json(SUMMARY, {**session.summary_head(), "model": model, **result, **size})
    words = ["--t-model", model, "--t-path", str(best), "--s-copy-t", "--prune-rates", "0.5"]
    log_end(session.run, result, written=best, following=session.following("pruning.py", *words))


def score(session: Session, path: str, *, model: str | None) -> None:
    """Prints the accuracy of the network in a file."""
    from models.network_file import load_network
    from utils.device import to_device
    from utils.images.loading import check_classes
    from utils.training.evaluation import evaluate_each, print_score

    origin = f"--load-path {path}"
    file = load_network(path, flag="--load-path", model=model)
    data = session.load_data({origin: file.images})
    check_classes(file.num_classes, data, origin=origin, remark=file.remark)
    print_score(file.model, data, evaluate_each(to_device(file.network, session.device), data, amp=session.settings.run.amp))


if __name__ == "__main__":
    cli.run_script(get_args_parser, main)
