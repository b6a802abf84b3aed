"""Prunes the filters of a network and fine-tunes it, with distillation from its unpruned self or from another teacher."""

import argparse
import copy
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from distill import DISTILLERS, build_distiller, distiller_options, pick_options
from distill.objective import DistillationObjective, FrozenTeacher, sample_outputs
from models import MODELS, build_model
from models.narrow import NarrowNetwork
from models.network_file import NetworkFile, describe_network, load_network
from prune.compact import check_pruned_zeros, compact, relative_difference
from prune.criteria import CRITERIA, GM_DISTANCES
from prune.gradients import mean_gradients
from prune.masks import PrunableLayer, choose_filters, keep_ratios, prunable_layers
from prune.schedule import HardPruning, PhysicalPruning, PruningSchedule, SoftPruning
from utils import cli, setup
from utils.data import ImageData
from utils.distributed import leave, sum_over_processes
from utils.engine import TrainingPlan, evaluate
from utils.errors import UserError, naming
from utils.files import read_json
from utils.plan import print_plan
from utils.profile import compare_networks, comparison_table
from utils.runs import BEST, COMPACT, SUMMARY, Run, read_state
from utils.seed import derived_seed, generator, preserved_random_state, seed_everything

SCRIPT = "pruning.py"
KEPT_FILTERS, BEFORE_TRAINING = "kept_filters.json", "before_training.json"
CHANCE_MARGIN = 1.2  # a network that is right at most so many times as often as guessing is scored as guessing
SOFT_CRITERIA = ("filter-a", "filter-l2", "filter-gm")


def get_args_parser() -> cli.Parser:
    parser = cli.Parser(prog=SCRIPT, description="Prune the filters of a network and fine-tune it with distillation.")
    networks = parser.add_argument_group("networks")
    networks.add_argument("--t-model", choices=MODELS, help="the teacher: the unpruned network")
    networks.add_argument("--t-path", metavar="FILE", help="checkpoint of the teacher")
    networks.add_argument("--s-model", choices=MODELS, help="the student: the network that is pruned (default: --t-model)")
    networks.add_argument("--s-path", metavar="FILE", help="checkpoint of the student (default: new weights)")
    networks.add_argument("--s-copy-t", action="store_true", help="the student starts as a copy of the teacher")
    pruning = parser.add_argument_group("pruning")
    pruning.add_argument("--prune-rates", type=cli.keep_proportion, nargs="+", default=[0.6], metavar="R",
                         help="proportion of filters retained, one for all conv layers or one a layer")  # fmt: skip
    pruning.add_argument(
        "--prune-mode", default="filter-nggm", choices=CRITERIA, help="which filters go: those that it scores lowest"
    )
    pruning.add_argument("--soft-prune", action="store_true", help="SFP: pruned filters may grow back")
    pruning.add_argument(
        "--prune-interval", type=cli.positive_int, metavar="EPOCHS", help="epochs between soft prunings (default: 1)"
    )
    pruning.add_argument("--samp-batches", type=cli.positive_int, metavar="N",
                         help="training batches for the gradient of filter-nggm (default: all)")  # fmt: skip
    pruning.add_argument("--gamma", type=cli.proportion, default=0.5, help="weight of the distances in filter-nggm")
    pruning.add_argument(
        "--gm-distance", default="euclidean", choices=GM_DISTANCES, help="distances of filter-gm and filter-nggm"
    )
    pruning.add_argument("--exclude-layers", nargs="+", default=[], metavar="NAME", help="conv layers that keep all filters")
    pruning.add_argument("--channel-multiple", type=cli.positive_int, default=1, metavar="M",
                         help="round kept filters to a multiple of M, for speed")  # fmt: skip
    pruning.add_argument("--train-form", default="auto", choices=("auto", "compact", "masked"),
                         help="hard pruning trains the small network or the large one with zeros; auto: the faster")  # fmt: skip
    distillation = parser.add_argument_group("distillation")
    distillation.add_argument("--distill", nargs="+", default=["none"], choices=("none", *DISTILLERS), help="distillation losses")
    distillation.add_argument("--alpha", type=cli.non_negative_float, default=0.9, help="weight of KD")
    betas = ", ".join(f"{name} {entry.beta:g}" for name, entry in DISTILLERS.items() if entry.beta is not None)
    distillation.add_argument(
        "--betas", type=cli.non_negative_float, nargs="+", help=f"weights of the other losses (default: {betas})"
    )
    for keyword, option in distiller_options().items():
        kind = cli.positive_int if isinstance(option.default, int) else cli.positive_float
        distillation.add_argument(f"--{keyword.replace('_', '-')}", type=kind, default=option.default, help=option.help)
    cli.add_data_flags(parser)
    cli.add_training_flags(parser, lr=0.01, n_epochs=200, schedule=(60, 120, 160), lr_drops=(0.2, 0.2, 0.2))
    cli.add_run_flags(parser, log_name="pruning.txt")
    return parser


def main(args: argparse.Namespace) -> None:
    check_flags(args)
    device, world = setup.prepare(args)
    state, fallback = read_state(args.resume) if args.resume else (None, None)
    data = setup.load_data(args, device=device, world=world)
    if args.evaluate:
        return score(args, data)

    seed_everything(args.seed)
    teacher, student = load_networks(args, data)
    layers = prunable_layers(student.network)
    ratios = keep_ratios(layers, args.prune_rates, exclude=args.exclude_layers)
    build_objective(args, student.network, teacher, data)  # losses that cannot compare the two say so before anything is written
    plan = setup.training_plan(args)
    if args.dry_run:
        return dry_run(args, plan, data, student, layers, ratios)

    networks = {"--t-path": teacher.network} if teacher is not None else {}
    if args.s_path is not None:
        networks["--s-path"] = student.network
    run = setup.open_run(args, script=SCRIPT, device=device, world=world, state=state, networks=networks)
    setup.warn_about(run, plan, fallback)
    before = {} if state else log_accuracy(run, teacher=teacher, student=student, data=data)
    schedule = build_schedule(args, student, layers, ratios, data, state)
    if state is None:
        log_pruning(run, before, schedule=schedule, student=student, data=data)
    network = setup.to_device(schedule.trained_network(), device, sync_bn=args.sync_bn)
    objective = build_objective(args, network, teacher, data)
    result = setup.train(
        args,
        objective,
        network=network,
        describe=partial(describe_pruned, args=args, schedule=schedule, file=student),
        data=data,
        run=run,
        plan=plan,
        state=state,
        hooks=schedule,
    )
    leave()  # the rest is for the main process alone
    if world.is_main:
        finish(args, run, result, data.alone())
    run.close()


def check_flags(args: argparse.Namespace) -> None:
    """Raises UserError for flags that contradict each other."""
    if args.evaluate:
        return cli.require(args, "t_path" if args.s_path is None else "s_path")
    if args.s_copy_t:
        check_copy(args)
    elif args.s_model is None and args.s_path is None and args.t_model is None:
        raise UserError("--s-model: name the network to prune, or give --s-path, or --s-copy-t with --t-path")
    if args.prune_interval is not None and not args.soft_prune:
        raise UserError(f"--prune-interval {args.prune_interval}: only with --soft-prune, hard pruning chooses once")
    if args.soft_prune and args.prune_mode not in SOFT_CRITERIA:
        raise UserError(f"--soft-prune: not with --prune-mode {args.prune_mode}, choose from {', '.join(SOFT_CRITERIA)}")
    if args.soft_prune and args.train_form == "compact":
        raise UserError("--train-form compact: not with --soft-prune, whose filters may grow back; choose auto or masked")
    check_distillation(args)


def check_copy(args: argparse.Namespace) -> None:
    if args.t_path is None:
        raise UserError("--s-copy-t: needs the teacher to copy, give --t-path")
    if args.s_path is not None:
        raise UserError(f"--s-path {args.s_path}: not with --s-copy-t, the student has one origin only")
    if args.s_model not in (None, args.t_model):
        raise UserError(f"--s-copy-t: --s-model {args.s_model} is not --t-model {args.t_model}, a copy has the same architecture")


def check_distillation(args: argparse.Namespace) -> None:
    names = args.distill
    if len(set(names)) < len(names) or ("none" in names and len(names) > 1):
        raise UserError(f"--distill {' '.join(names)}: give each loss once, and none alone")
    if names != ["none"] and args.t_path is None:
        raise UserError(f"--distill {' '.join(names)}: needs a trained teacher, give --t-path")
    if names == ["kd"] and args.alpha == 0:
        raise UserError("--alpha 0: leaves --distill kd without any weight; choose --distill none instead")
    weighted = weighted_losses(names)
    if args.betas is not None and len(args.betas) != len(weighted):
        raise UserError(
            f"--betas: {len(args.betas)} values for the {len(weighted)} losses of --distill that have a beta; give one for each"
        )


def weighted_losses(names: Sequence[str]) -> list[str]:
    """Of the losses of --distill those that --betas weighs; alpha weighs KD."""
    return [name for name in names if name != "none" and DISTILLERS[name].beta is not None]


def load_networks(args: argparse.Namespace, data: ImageData) -> tuple[NetworkFile | None, NetworkFile]:
    """Teacher, if there is one, and student, on the device."""
    teacher = load_checked(args, data, "--t-path", args.t_path, args.t_model) if args.t_path is not None else None
    if args.s_copy_t:
        student = replace(teacher, network=copy.deepcopy(teacher.network))
    elif args.s_path is not None:
        student = load_checked(args, data, "--s-path", args.s_path, args.s_model)
    else:
        name, num_classes = args.s_model or args.t_model, len(data.dataset.classes)
        student = NetworkFile(build_model(name, num_classes=num_classes), name, num_classes)
    student = as_dense(student)
    for file in filter(None, (teacher, student)):
        setup.to_device(file.network, data.device)
        setup.check_images(file.network, data, origin=f"the {file.model}")
    return teacher, student


def load_checked(args: argparse.Namespace, data: ImageData, flag: str, path: str, model: str | None) -> NetworkFile:
    """The network of a file, fit for the dataset, its pruned filters truly at zero."""
    file = load_network(path, flag=flag, model=model, model_flag=flag.replace("path", "model"))
    setup.check_classes(file.num_classes, data, origin=f"{flag} {path}")
    if not file.compact:
        with naming(f"{flag} {path}"):
            check_pruned_zeros(file.network.state_dict(), file.kept)
    return file


def build_objective(
    args: argparse.Namespace, student: nn.Module, teacher: NetworkFile | None, data: ImageData
) -> DistillationObjective:
    """The loss of --distill for `student`, new parameters of the losses included. Draws from no stream that training uses."""
    if args.distill == ["none"]:
        return DistillationObjective(student)
    frozen = FrozenTeacher(teacher.network, channels_last=True, fold_batch_norm=True)
    images = data.example
    samples = {"student": sample_outputs(student, images), "teacher": frozen(images)}
    with preserved_random_state():
        torch.manual_seed(derived_seed(args.seed, "distillers"))
        build = {
            name: build_distiller(name, **samples, **pick_options(name, vars(args))).to(data.device)
            for name in {*args.distill, "kd"}
        }
    names = weighted_losses(args.distill)
    betas = args.betas or [DISTILLERS[name].beta for name in names]
    losses = [(name, build[name], beta) for name, beta in zip(names, betas, strict=True)]
    return DistillationObjective(
        student, teacher=frozen, losses=losses, kd=build["kd"] if args.alpha > 0 else None, alpha=args.alpha
    )


def build_schedule(
    args: argparse.Namespace,
    student: NetworkFile,
    layers: Sequence[PrunableLayer],
    ratios: Mapping[str, float],
    data: ImageData,
    state: Mapping[str, Any] | None,
) -> PruningSchedule:
    """What keeps the student pruned; hard pruning makes its one choice here, or takes it from the state of a resumed run."""
    choose = partial(choose_kept, args, student, layers, ratios, data)
    if args.soft_prune:
        return SoftPruning(student.network, choose, interval=args.prune_interval or 1, last_epoch=args.n_epochs - 1)
    kept = state["resume"]["hooks"]["kept"] if state is not None else choose()
    faster_small = data.device.type == "cpu" and not args.amp and not args.compile  # as measured, docs/performance.md
    small = args.train_form == "compact" or (args.train_form == "auto" and faster_small)
    if state is not None:
        small = was_trained_small(state)
    return (PhysicalPruning if small else HardPruning)(student.network, kept)


def was_trained_small(state: Mapping[str, Any]) -> bool:
    """Whether the saved state is that of the small network itself, whatever device this goes on with."""
    trained = state["resume"]["objective"]
    return any(trained[f"student.{name}"].shape != tensor.shape for name, tensor in state["state_dict"].items())


def choose_kept(
    args: argparse.Namespace, student: NetworkFile, layers: Sequence[PrunableLayer], ratios: Mapping[str, float], data: ImageData
) -> dict[str, Tensor]:
    """The filters that stay, by layer; what an earlier pruning removed stays removed."""
    gradients = None
    if CRITERIA[args.prune_mode].needs_gradient:
        batches = ((batch.images, batch.labels) for batch in islice(data.train_batches("scoring"), args.samp_batches))
        gradients = mean_gradients(student.network, batches, layers=layers, all_reduce=sum_over_processes)
    kept = choose_filters(
        layers,
        ratios,
        criterion=args.prune_mode,
        gradients=gradients,
        multiple=args.channel_multiple,
        gamma=args.gamma,
        gm_distance=args.gm_distance,
        generator=generator(args.seed, "filters"),
    )
    earlier = {name: torch.tensor(channels) for name, channels in student.kept.items()}
    return {name: channels[torch.isin(channels, earlier.get(name, channels))] for name, channels in kept.items()}


def as_dense(file: NetworkFile) -> NetworkFile:
    """The same network at its full width, with zeros where filters are gone."""
    if not file.compact:
        return file
    network = build_model(file.model, num_classes=file.num_classes)
    network.load_state_dict(file.network.dense_state_dict())
    return replace(file, network=network, compact=False)


def log_accuracy(run: Run, *, teacher: NetworkFile | None, student: NetworkFile, data: ImageData) -> dict[str, Any]:
    """Scores the networks before pruning; warns where a trained one is no better than guessing."""
    chance = 100 / len(data.dataset.classes)
    scores = {}
    for role, file in (("teacher", teacher), ("student", student)):
        if file is None:
            continue
        scores[role] = {"model": file.model, **evaluate(file.network, data)}
        run.log(f"{role} {file.model}: top1 {scores[role]['top1']:.2f}, loss {scores[role]['loss']:.4f}")
        if role == "teacher" and scores[role]["top1"] <= CHANCE_MARGIN * chance:
            run.warn(f"the teacher scores at chance ({chance:.1f}) on {data.dataset.name}: is --t-path the right file?")
    return scores


def log_pruning(run: Run, scores: dict[str, Any], *, schedule: PruningSchedule, student: NetworkFile, data: ImageData) -> None:
    """Logs the choice and what it did to the accuracy, and leaves both in files of the run."""
    with schedule.shipped() as kept:
        scores["pruned"] = evaluate(student.network, data)
    chance = 100 / len(data.dataset.classes)
    for layer in schedule.layers.values():
        channels = kept[layer.name].tolist()
        run.log(f"{layer.name} keeps {len(channels)} of {layer.filters}: {' '.join(map(str, channels))}")
        if not channels:
            run.warn(f"{layer.name} has lost every filter")
    run.log(f"pruned, before fine-tuning: top1 {scores['pruned']['top1']:.2f}, loss {scores['pruned']['loss']:.4f}")
    trained = scores["student"]["top1"] > CHANCE_MARGIN * chance
    if trained and scores["pruned"]["top1"] <= CHANCE_MARGIN * chance:
        run.warn(f"accuracy fell to chance ({chance:.1f}) by pruning; fine-tuning starts nearly from nothing")
    save_kept(run, schedule, kept)
    run.save_json(BEFORE_TRAINING, scores)


def save_kept(run: Run, schedule: PruningSchedule, kept: Mapping[str, Tensor]) -> None:
    layers = {name: {"filters": layer.filters, "kept": kept[name].tolist()} for name, layer in schedule.layers.items()}
    run.save_json(KEPT_FILTERS, layers)


def describe_pruned(
    network: nn.Module, kept: Mapping[str, Tensor], *, args: argparse.Namespace, schedule: PruningSchedule, file: NetworkFile
) -> dict[str, Any]:
    """A checkpoint of the pruned network at full width, so that everything that reads the unpruned one reads it too."""
    state = network.dense_state_dict() if isinstance(network, NarrowNetwork) else network.state_dict()
    live = schedule.live_channels(kept)
    return describe_network(state, model=file.model, num_classes=file.num_classes, config=setup.flags_of(args), kept=live)


def finish(args: argparse.Namespace, run: Run, result: dict[str, Any], data: ImageData) -> None:
    """Removes the pruned filters of the best network, proves that nothing changed, and leaves small network and summary."""
    best = load_network(run.folder / BEST, flag="--save-dir")
    dense = setup.to_device(best.network, data.device)
    small = compact(dense, data.example)
    difference = relative_difference(dense, small, (batch.images for batch in data.test_batches()))
    accuracy = {name: evaluate(network, data)["top1"] for name, network in (("dense", dense), ("compact", small))}
    description = describe_network(
        small.state_dict(),
        model=best.model,
        num_classes=best.num_classes,
        config=setup.flags_of(args),
        kept=small.kept,
        compact=True,
    )
    run.save(COMPACT, {**description, "epoch": result["best"]["epoch"], "metrics": result["best"]})
    comparison = compare_networks(dense, small, data.example[:1], files=(run.folder / BEST, run.folder / COMPACT))
    run.log(comparison_table(comparison))
    run.log(f"top1 of the dense network {accuracy['dense']:.2f}, of the compact {accuracy['compact']:.2f}")
    run.log(f"largest difference of their logits, relative to the largest logit: {difference:.1e}")
    kept = {layer.name: len(best.kept.get(layer.name, range(layer.filters))) for layer in prunable_layers(dense)}
    before = read_json(run.folder / BEFORE_TRAINING)
    summary = {**setup.summary_head(args, SCRIPT, run), "model": best.model, **before, **result, "kept_filters": kept}
    run.save_json(SUMMARY, {**summary, "compact": {"top1": accuracy, "relative_difference": difference, **comparison}})
    run.log(f"done: last top1 {result['last']['top1']:.2f}, best {result['best']['top1']:.2f} -> {run.folder / COMPACT}")


def score(args: argparse.Namespace, data: ImageData) -> None:
    """Prints the accuracy of the student's file, or else the teacher's: dense, pruned or compact."""
    flag, path, model = ("--s-path", args.s_path, args.s_model) if args.s_path else ("--t-path", args.t_path, args.t_model)
    file = load_checked(args, data, flag, path, model)
    result = evaluate(setup.to_device(file.network, data.device), data, amp=args.amp)
    setup.print_score(file.model, data, result)


def dry_run(
    args: argparse.Namespace,
    plan: TrainingPlan,
    data: ImageData,
    student: NetworkFile,
    layers: Sequence[PrunableLayer],
    ratios: Mapping[str, float],
) -> None:
    """Prints what would be pruned and trained. The sizes are exact where the choice needs no gradient, else those of L1's."""
    mode = "filter-a" if CRITERIA[args.prune_mode].needs_gradient else args.prune_mode
    kept = choose_kept(argparse.Namespace(**{**vars(args), "prune_mode": mode}), student, layers, ratios, data)
    pruned = copy.deepcopy(student.network)
    HardPruning(pruned, kept)
    lines = [f"{layer.name} would keep {len(kept[layer.name])} of {layer.filters}" for layer in layers]
    print_plan(
        args, plan=plan, data=data, networks={"dense": student.network, "pruned": compact(pruned, data.example)}, lines=lines
    )


if __name__ == "__main__":
    cli.execute(lambda: main(cli.parse_flags(get_args_parser())))
