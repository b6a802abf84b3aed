"""Trains a network from scratch, or from published weights, and leaves it in saves/<run>/model_best.pt."""

import argparse
from functools import partial

import torch

from models import NAMES, build_model, check_model
from models.network_file import describe_network, load_network
from utils import cli, setup
from utils.distributed import World
from utils.engine import CrossEntropyObjective, evaluate
from utils.plan import print_plan
from utils.profile import profile_network
from utils.run_folder import BEST, SUMMARY
from utils.run_state import read_state
from utils.seed import seed_everything

SCRIPT = "initial_train.py"


def get_args_parser() -> cli.Parser:
    parser = cli.Parser(prog=SCRIPT, description="Train a network.")
    parser.add_argument("--model", type=cli.checked(check_model), metavar="NAME", help=f"the network: {NAMES}")
    parser.add_argument(
        "--pretrained", action="store_true", help="start from the weights that torchvision or timm publish for it"
    )
    parser.add_argument("--load-path", metavar="FILE", help="checkpoint that --evaluate scores")
    cli.add_data_flags(parser)
    cli.add_training_flags(parser, lr=0.01, n_epochs=200, schedule=(1, 60, 120, 160), lr_drops=(10, 0.2, 0.2, 0.2))
    cli.add_run_flags(parser, log_name="initial_train.txt")
    cli.counts_in_training(parser, "pretrained")
    return parser


def main(args: argparse.Namespace) -> None:
    cli.require(args, "load_path" if args.evaluate else "model")
    device, world = setup.prepare(args)
    if args.evaluate:
        return score(args, device=device, world=world)
    state, fallback = read_state(args.resume) if args.resume else (None, None)
    data = setup.load_data(args, device=device, world=world, state=state)

    seed_everything(args.seed)
    num_classes = len(data.dataset.classes)
    network = build_model(args.model, num_classes=num_classes, pretrained=args.pretrained and state is None)
    network = setup.to_device(network, device, sync_bn=args.sync_bn)
    setup.check_images(network, data, origin=f"--model {args.model}")
    plan = setup.training_plan(args)
    if args.dry_run:
        return print_plan(args, plan=plan, data=data, networks={"network": network})

    run = setup.open_run(args, script=SCRIPT, device=device, world=world, state=state)
    setup.warn_about(run, plan, fallback, data=data)
    objective = CrossEntropyObjective(network)
    identity = {"model": args.model, "num_classes": num_classes, "images": data.dataset.images}
    describe = partial(describe_network, **identity, config=setup.flags_of(args))
    result = setup.train(
        args,
        objective,
        network=network,
        describe=lambda network, kept: describe(network.state_dict()),
        data=data,
        run=run,
        plan=plan,
        state=state,
    )
    if not world.is_main:
        return
    size = {"checkpoint_bytes": (run.folder / BEST).stat().st_size, **profile_network(network, data.example[:1])}
    summary = {**setup.summary_head(args, SCRIPT, run), "model": args.model, **result, **size}
    run.save_json(SUMMARY, summary)
    run.log(f"done: last top1 {result['last']['top1']:.2f}, best {result['best']['top1']:.2f} -> {run.folder / BEST}")
    run.close()


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
