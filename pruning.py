"""Prunes the filters of a network and fine-tunes it, with distillation from its unpruned self or from another teacher."""

import argparse
import copy
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import nn

from deploy.budget import describe, log_chosen, obtain_table
from deploy.flags import add_latency_flags, is_of_time
from deploy.latency import LatencyTable
from distill.flags import add_distillation_flags
from distill.objective import DistillationObjective, build_objective, check_losses
from models import NAMES, build_model, check_model
from models.network_file import NetworkFile, as_dense, load_network
from prune.allocation import FLOOR, parse_budget
from prune.choice import FilterChoice
from prune.compact import check_pruned_zeros
from prune.cost import Widths
from prune.flags import AUTO, add_pruning_flags
from prune.forms import build_schedule, check_compact_form, training_form
from prune.masks import keep_ratios, prunable_layers
from prune.preview import print_pruning
from prune.record import describe_pruned, finish, log_accuracy, log_pruning
from prune.schedule import SOFT_CRITERIA, PruningSchedule, check_soft_state
from utils import cli, setup
from utils.data import ImageData
from utils.distributed import World, leave
from utils.engine import evaluate
from utils.errors import UserError, naming
from utils.recalibration import check_recalibration
from utils.runs import Run
from utils.seed import seed_everything

SCRIPT = "pruning.py"


def get_args_parser() -> cli.Parser:
    parser = cli.Parser(prog=SCRIPT, description="Prune the filters of a network and fine-tune it with distillation.")
    networks = parser.add_argument_group("networks")
    networks.add_argument("--t-model", type=cli.checked(check_model), metavar="NAME", help=f"the teacher, unpruned: {NAMES}")
    networks.add_argument("--t-path", metavar="FILE", help="checkpoint of the teacher")
    networks.add_argument("--s-model", type=cli.checked(check_model), metavar="NAME",
                          help="the student: the network that is pruned (default: --t-model)")  # fmt: skip
    networks.add_argument("--s-path", metavar="FILE", help="checkpoint of the student (default: new weights)")
    networks.add_argument("--s-copy-t", action="store_true", help="the student starts as a copy of the teacher")
    add_pruning_flags(parser)
    add_latency_flags(parser)
    add_distillation_flags(parser)
    cli.add_data_flags(parser)
    cli.add_training_flags(parser, lr=0.01, n_epochs=200, schedule=(60, 120, 160), lr_drops=(0.2, 0.2, 0.2))
    cli.add_averaging_flags(parser)
    cli.add_run_flags(parser, log_name="pruning.txt")
    say_which_networks_count(parser)
    return parser


def say_which_networks_count(parser: cli.Parser) -> None:
    cli.counts_in_training(parser, "s_copy_t")
    scored = "--evaluate scores the file of --s-path where it is given"
    parser.counts_only("t_path", where=lambda args: not (args.evaluate and args.s_path), only=f"alone, {scored}")
    parser.counts_only("s_model", where=lambda args: args.s_path or not args.evaluate, only=f"with --s-path, {scored}")
    parser.counts_only(
        "t_model",
        where=lambda args: args.t_path or not (args.s_model or args.s_path),
        only="with --t-path, or where it names the student as well, without --s-model and --s-path",
    )


def main(args: argparse.Namespace) -> None:
    check_flags(args)
    device, world = setup.prepare(args)
    if args.evaluate:
        return score(args, device=device, world=world)
    lease, state, fallback = setup.take_up(args, world)
    if state is not None and args.soft_prune:
        check_soft_state(state["resume"]["hooks"], folder=args.resume)

    seed_everything(args.seed)
    files = read_files(args)
    said = {f"{flag} {path_of(args, flag)}": file.images for flag, file in files.items()}
    announced = setup.announce(args, network_names(args, files), device=device, world=world, state=state)
    data = setup.load_data(args, device=device, world=world, files=said, state=state)
    teacher, student = build_networks(args, files, data)
    table = latency_table(args, student, data)
    choose = filter_choice(args, student, data, table)
    choose.check()
    loss = objective_of(args, student.network, teacher, data).formula()  # losses that cannot compare the two say so here
    check_recalibration(student.network, args.recalibrate_bn)
    if args.train_form == "compact" and state is None:
        check_compact_form(student.network, choose.without_pass()(), data.example)
    plan = replace(setup.training_plan(args), recalibrate_bn_batches=args.recalibrate_bn)
    if args.dry_run:
        time = [describe(table, choose.widths(choose.without_pass()()))] if table is not None else []
        return print_pruning(args, plan, student, choose, lines=[*time, f"loss: {loss}"])

    networks = {"--t-path": teacher.network} if teacher is not None else {}
    if args.s_path is not None:
        networks["--s-path"] = student.network
    run = setup.open_run(args, script=SCRIPT, device=device, world=world, lease=lease, state=state, networks=networks)
    setup.log_beginning(run, announced, plan, fallback, data=data)
    before = {} if state else log_accuracy(run, teacher=teacher, student=student, data=data)
    schedule = schedule_of(args, student, choose, run=run, state=state)
    if state is None:
        if table is not None:
            log_chosen(run, table, student.network, choose.small_network(schedule.kept or choose.without_pass()()), data)
        log_pruning(
            run, before, schedule=schedule, student=student, data=data, recalibrate_bn_batches=plan.recalibrate_bn_batches
        )
    network = setup.to_device(schedule.trained_network(), device, sync_bn=args.sync_bn)
    objective = objective_of(args, network, teacher, data)
    result = setup.train(
        args,
        objective,
        network=network,
        describe=partial(describe_pruned, schedule=schedule, file=student, config=setup.flags_of(args)),
        data=data,
        run=run,
        plan=plan,
        state=state,
        hooks=schedule,
    )
    leave()  # the rest is for the main process alone
    if world.is_main:
        head = setup.summary_head(args, SCRIPT, run, objective=objective, data=data)
        finish(run, result, model=student.model, data=data.alone(), config=setup.flags_of(args), head=head)
    run.close()


def check_flags(args: argparse.Namespace) -> None:
    """Raises UserError for flags that contradict each other."""
    if args.evaluate:
        return cli.require(args, "t_path" if args.s_path is None else "s_path")
    if args.s_copy_t:
        check_copy(args)
    elif args.s_model is None and args.s_path is None and args.t_model is None:
        raise UserError("--s-model: name the network to prune, or give --s-path, or --s-copy-t with --t-path")
    if args.soft_prune and args.prune_mode not in SOFT_CRITERIA:
        raise UserError(f"--soft-prune: not with --prune-mode {args.prune_mode}, choose from {', '.join(SOFT_CRITERIA)}")
    if args.channel_multiple == AUTO and not is_of_time(args):
        raise UserError("--channel-multiple auto: needs --budget latency=SHARE, whose table of times shows which is best")
    if args.soft_prune and args.ema is not None:
        raise UserError(f"--ema {args.ema:g}: not with --soft-prune, an average of what is cleared now and then is not pruned")
    check_losses(args.distill, has_teacher=args.t_path is not None, alpha=args.alpha, betas=args.betas)


def check_copy(args: argparse.Namespace) -> None:
    if args.t_path is None:
        raise UserError("--s-copy-t: needs the teacher to copy, give --t-path")
    if args.s_path is not None:
        raise UserError(f"--s-path {args.s_path}: not with --s-copy-t, the student has one origin only")
    if args.s_model not in (None, args.t_model):
        raise UserError(f"--s-copy-t: --s-model {args.s_model} is not --t-model {args.t_model}, a copy has the same architecture")


def read_files(args: argparse.Namespace) -> dict[str, NetworkFile]:
    """The networks of --t-path and --s-path, by flag, their pruned filters truly at zero."""
    files = {}
    for flag, model in (("--t-path", args.t_model), ("--s-path", args.s_model)):
        if path_of(args, flag) is not None:
            files[flag] = read_checked(flag, path_of(args, flag), model)
    return files


def path_of(args: argparse.Namespace, flag: str) -> str | None:
    return args.t_path if flag == "--t-path" else args.s_path


def read_checked(flag: str, path: str, model: str | None) -> NetworkFile:
    file = load_network(path, flag=flag, model=model, model_flag=flag.replace("path", "model"))
    if not file.compact:
        with naming(f"{flag} {path}"):
            check_pruned_zeros(file.network.state_dict(), file.kept)
    return file


def student_file(args: argparse.Namespace, files: Mapping[str, NetworkFile]) -> NetworkFile | None:
    """What the student starts from, unless it is new."""
    return files.get("--t-path" if args.s_copy_t else "--s-path")


def student_name(args: argparse.Namespace, files: Mapping[str, NetworkFile]) -> str:
    file = student_file(args, files)
    return file.model if file is not None else args.s_model or args.t_model


def network_names(args: argparse.Namespace, files: Mapping[str, NetworkFile]) -> str:
    """The student, and its teacher where there is one."""
    teacher = files.get("--t-path")
    return student_name(args, files) + (f", teacher {teacher.model}" if teacher is not None else "")


def build_networks(
    args: argparse.Namespace, files: Mapping[str, NetworkFile], data: ImageData
) -> tuple[NetworkFile | None, NetworkFile]:
    """Teacher, if there is one, and student, on the device, fit for the dataset."""
    for flag, file in files.items():
        setup.check_classes(file.num_classes, data, origin=f"{flag} {path_of(args, flag)}")
    teacher = files.get("--t-path")
    student = student_file(args, files)
    if student is None:
        name, num_classes = student_name(args, files), len(data.dataset.classes)
        student = NetworkFile(build_model(name, num_classes=num_classes), name, num_classes)
    elif student is teacher:
        student = replace(teacher, network=copy.deepcopy(teacher.network))
    student = replace(as_dense(student), images=data.dataset.images)
    for file in filter(None, (teacher, student)):
        setup.to_device(file.network, data.device)
        setup.check_images(file.network, data, origin=f"the {file.model}")
    return teacher, student


def objective_of(
    args: argparse.Namespace, student: nn.Module, teacher: NetworkFile | None, data: ImageData
) -> DistillationObjective:
    """The loss that `student` trains by."""
    return build_objective(
        student,
        teacher.network if teacher is not None else None,
        args.distill,
        images=data.example,
        alpha=args.alpha,
        betas=args.betas,
        options=vars(args),
        n_epochs=args.n_epochs,
        label_smoothing=args.label_smoothing,
        seed=args.seed,
    )


def latency_table(args: argparse.Namespace, student: NetworkFile, data: ImageData) -> LatencyTable | None:
    """What a budget of time has to know; None for other budgets."""

    def chosen(table: LatencyTable) -> tuple[nn.Module, Widths]:
        choose = filter_choice(args, student, data, table).without_pass()
        choose.check()
        return choose.small_network(choose())

    layers = prunable_layers(student.network, linear=args.prune_linear)
    multiple = None if args.channel_multiple == AUTO else args.channel_multiple
    narrowest = min(layer.filters for layer in layers)
    return obtain_table(args, student.network, data, multiple=multiple, narrowest=narrowest, chosen=chosen)


def filter_choice(args: argparse.Namespace, student: NetworkFile, data: ImageData, table: LatencyTable | None) -> FilterChoice:
    """What chooses the filters of the student that stay."""
    layers = prunable_layers(student.network, linear=args.prune_linear)
    return FilterChoice(
        student.network,
        layers,
        keep_ratios(layers, [FLOOR] if args.budget else args.prune_rates, exclude=args.exclude_layers),
        criterion=args.prune_mode,
        data=data,
        seed=args.seed,
        samp_batches=args.samp_batches,
        multiple=table.multiple if args.channel_multiple == AUTO else args.channel_multiple,
        options={"gamma": args.gamma, "gm_distance": args.gm_distance},
        coupled=args.couple_channels,
        budget=parse_budget(args.budget) if args.budget else None,
        allocation=args.allocation,
        earlier=student.kept,
        seconds=table.seconds if table is not None else None,
    )


def schedule_of(
    args: argparse.Namespace, student: NetworkFile, choose: FilterChoice, *, run: Run, state: Mapping[str, Any] | None
) -> PruningSchedule:
    """What keeps the student pruned."""
    return build_schedule(
        student.network,
        choose,
        soft_interval=(args.prune_interval or 1) if args.soft_prune else None,
        last_epoch=args.n_epochs - 1,
        form="masked"
        if choose.is_whole
        else training_form(args.train_form, choose.data.device, amp=args.amp, compiled=args.compile),
        images=choose.data.example,
        warn=run.warn,
        state=state,
    )


def score(args: argparse.Namespace, *, device: torch.device, world: World) -> None:
    """Prints the accuracy of the student's file, or else the teacher's: dense, pruned or compact."""
    flag, path, model = ("--s-path", args.s_path, args.s_model) if args.s_path else ("--t-path", args.t_path, args.t_model)
    file = read_checked(flag, path, model)
    data = setup.load_data(args, device=device, world=world, files={f"{flag} {path}": file.images})
    setup.check_classes(file.num_classes, data, origin=f"{flag} {path}")
    result = evaluate(setup.to_device(file.network, device), data, amp=args.amp)
    setup.print_score(file.model, data, result)


if __name__ == "__main__":
    cli.execute(lambda: main(cli.parse_flags(get_args_parser())))
