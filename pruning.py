"""Prunes the filters of a network and fine-tunes it, with distillation from its unpruned self or from another teacher."""

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from deploy.budget import describe, log_chosen, obtain_table
from deploy.flags import add_latency_flags, is_of_time
from deploy.latency import LatencyTable
from distill.flags import add_distillation_flags, check_distillation, flagged_objective
from models import NAMES, check_model
from models.network_file import NetworkFile
from prune.allocation import FLOOR, parse_budget
from prune.choice import FilterChoice
from prune.flags import AUTO, add_pruning_flags, rates_file, say_what_trains
from prune.forms import build_schedule, check_compact_form
from prune.masks import PrunableLayer, keep_ratios, prunable_layers
from prune.measured_forms import trains_faster_small
from prune.networks import build_networks, network_names, path_of, read_checked, read_files
from prune.preview import print_pruning
from prune.record import describe_pruned, finish, log_accuracy, log_pruning, log_step
from prune.schedule import SOFT_CRITERIA, PruningSchedule, check_soft_state
from prune.sensitivity import READ_BY_SENSITIVITY, check_file, measure_sensitivity, read_rates
from utils import cli
from utils.distributed import leave
from utils.errors import UserError
from utils.files import read_json, write_atomic
from utils.images.batches import ImageData
from utils.runs.folder import LATENCY_TABLE, SENSITIVITY
from utils.runs.run import Run
from utils.seed import seed_everything
from utils.training import setup
from utils.training.engine import evaluate
from utils.training.recalibration import check_recalibration
from utils.world import World

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
    say_what_trains(parser)
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
    if args.sensitivity is not None and world.size > 1:
        raise UserError(f"--sensitivity {args.sensitivity}: for one process, start it without torchrun")
    lease, state, fallback = setup.take_up(args, world)
    if state is not None and args.soft_prune:
        check_soft_state(state["resume"]["hooks"], folder=args.resume)

    seed_everything(args.seed)
    files = read_files(args)
    said = {f"{flag} {path_of(args, flag)}": file.images for flag, file in files.items()}
    announced = setup.announce(args, network_names(args, files), device=device, world=world, state=state)
    data = setup.load_data(args, device=device, world=world, files=said, state=state)
    teacher, student = build_networks(args, files, data)
    # losses that cannot compare the two say so here
    loss = flagged_objective(args, student.network, teacher, data).formula()
    check_recalibration(student.network, args.recalibrate_bn)
    choose = filter_choice(args, student, data)
    choose.check()
    table = latency_table(args, choose)
    if table is not None:
        choose = timed(args, choose, table)
        choose.check()
    if args.sensitivity is not None:
        return sensitivity(args, student, choose)
    if args.train_form == "compact" and state is None:
        check_compact_form(student.network, choose.without_pass()(), data.example)
    plan = replace(setup.training_plan(args), recalibrate_bn_batches=args.recalibrate_bn)
    if args.dry_run:
        return print_pruning(
            args, plan, student, choose, loss=loss, describe=partial(describe, table, multiple=choose.multiple) if table else None
        )

    networks = {"--t-path": teacher.network} if teacher is not None else {}
    if args.s_path is not None:
        networks["--s-path"] = student.network
    run = setup.open_run(args, script=SCRIPT, device=device, world=world, lease=lease, state=state, networks=networks)
    if rates_file(args) is not None and state is None:
        run.save_json(SENSITIVITY, read_json(rates_file(args)))
    setup.log_beginning(run, announced, plan, fallback, data=data)
    before = {} if state else log_accuracy(run, teacher=teacher, student=student, data=data, is_copy=args.s_copy_t)
    schedule = schedule_of(args, student, choose, table, run=run, state=state)
    if state is None:
        if table is not None:
            run.save_json(LATENCY_TABLE, asdict(table))
            log_time(args, run, table, choose, schedule, step=0)
        log_pruning(
            run, before, schedule=schedule, student=student, data=data, recalibrate_bn_batches=plan.recalibrate_bn_batches
        )
    network = setup.to_device(schedule.trained_network(), device, sync_bn=args.sync_bn)
    objective = flagged_objective(args, network, teacher, data)
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
        head = setup.summary_head(args, SCRIPT, run)
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
    if args.sensitivity is not None:
        check_file(Path(args.sensitivity))
    if rates_file(args) is not None and len(args.prune_rates) > 1:
        raise UserError(f"--prune-rates {rates_file(args)}: a file stands alone, without proportions beside it")
    if args.prune_steps > args.n_epochs:
        raise UserError(f"--prune-steps {args.prune_steps}: one an epoch, but --n-epochs {args.n_epochs} are fewer")
    if args.prune_steps > 1 and args.train_form == "compact" and args.ema is not None:
        raise UserError(f"--ema {args.ema:g}: not with --train-form compact and --prune-steps, whose steps have a network each")
    if args.soft_prune and args.ema is not None:
        raise UserError(f"--ema {args.ema:g}: not with --soft-prune, an average of what is cleared now and then is not pruned")
    check_distillation(args)


def check_copy(args: argparse.Namespace) -> None:
    if args.t_path is None:
        raise UserError("--s-copy-t: needs the teacher to copy, give --t-path")
    if args.s_path is not None:
        raise UserError(f"--s-path {args.s_path}: not with --s-copy-t, the student has one origin only")
    if args.s_model not in (None, args.t_model):
        raise UserError(f"--s-copy-t: --s-model {args.s_model} is not --t-model {args.t_model}, a copy has the same architecture")


def latency_table(args: argparse.Namespace, choose: FilterChoice) -> LatencyTable | None:
    """What a budget of time has to know; None for other budgets."""
    if not is_of_time(args):
        return None
    return obtain_table(
        args,
        choose.network,
        choose.data,
        share=choose.budget.share,
        multiple=None if args.channel_multiple == AUTO else args.channel_multiple,
        narrowest=min(layer.filters for layer in choose.layers if choose.ratios[layer.name] < 1),
        chosen_by=lambda table: timed(args, choose, table).without_pass().outcome,
    )


def timed(args: argparse.Namespace, choose: FilterChoice, table: LatencyTable) -> FilterChoice:
    """The choice that counts its budget by the times of `table`, and takes its best multiple if that is asked for."""
    multiple = table.multiple if args.channel_multiple == AUTO else choose.multiple
    return replace(choose, multiple=multiple, seconds=table.seconds)


def rates_of(args: argparse.Namespace, layers: Sequence[PrunableLayer]) -> Sequence[float]:
    """The proportions that are retained; under a budget, or measured one by one, the least of each layer."""
    if args.budget is not None or args.sensitivity is not None:
        return [FLOOR]
    file = rates_file(args)
    if file is None:
        return args.prune_rates
    recorded = Path(args.resume or "") / SENSITIVITY
    return read_rates(recorded if args.resume and recorded.exists() else file, layers, drop=args.sensitivity_drop)


def sensitivity(args: argparse.Namespace, student: NetworkFile, choose: FilterChoice) -> None:
    """Measures what each layer loses alone, without training; leaves a file and a picture."""
    from reporting.layer_sensitivity import draw_sensitivity  # which nothing else here needs, and takes a second

    data, path = choose.data.alone(), Path(args.sensitivity)
    setting = {"network": student.model, "dataset": data.dataset.name, "images": len(data.dataset.test.labels)}
    setting |= {name: getattr(args, name) for name in READ_BY_SENSITIVITY}
    document = measure_sensitivity(choose, path, setting=setting, top1_of=lambda net: evaluate(net, data, amp=args.amp)["top1"])
    picture = path.with_suffix(".png")
    write_atomic(picture, draw_sensitivity(document))
    print(f"{len(document['families'])} layers or groups -> {path}, {picture}")


def filter_choice(args: argparse.Namespace, student: NetworkFile, data: ImageData) -> FilterChoice:
    """What chooses the filters of the student that stay; the best channel multiple counts as 1 until times are known."""
    layers = prunable_layers(student.network, linear=args.prune_linear, example=data.example)
    return FilterChoice(
        student.network,
        layers,
        keep_ratios(layers, rates_of(args, layers), exclude=args.exclude_layers),
        criterion=args.prune_mode,
        data=data,
        seed=args.seed,
        samp_batches=args.samp_batches,
        multiple=1 if args.channel_multiple == AUTO else args.channel_multiple,
        options={"gamma": args.gamma, "gm_distance": args.gm_distance},
        coupled=args.couple_channels,
        budget=parse_budget(args.budget) if args.budget else None,
        allocation=args.allocation,
        earlier=student.kept,
    )


def schedule_of(
    args: argparse.Namespace,
    student: NetworkFile,
    choose: FilterChoice,
    table: LatencyTable | None,
    *,
    run: Run,
    state: Mapping[str, Any] | None,
) -> PruningSchedule:
    """What keeps the student pruned."""
    return build_schedule(
        student.network,
        choose,
        soft_interval=(args.prune_interval or 1) if args.soft_prune else None,
        steps=args.prune_steps,
        last_epoch=args.n_epochs - 1,
        form="masked" if choose.is_whole or (args.prune_steps > 1 and args.ema is not None) else args.train_form,
        images=choose.data.example,
        warn=run.warn,
        is_faster_small=partial(trains_faster_small, choose, steps=args.prune_steps, amp=args.amp, compiled=args.compile),
        on_choice=partial(log_later_step, args, run, table, choose),
        state=state,
    )


def log_later_step(
    args: argparse.Namespace, run: Run, table: LatencyTable | None, choose: FilterChoice, schedule: PruningSchedule, step: int
) -> None:
    log_step(run, schedule, step, steps=args.prune_steps)
    log_time(args, run, table, choose, schedule, step=step)


def log_time(
    args: argparse.Namespace, run: Run, table: LatencyTable | None, choose: FilterChoice, schedule: PruningSchedule, *, step: int
) -> None:
    """Measures, under a budget of time, the network of the last step, and logs it."""
    if table is not None and step + 1 == args.prune_steps:
        setting = {"share": choose.budget.share, "multiple": choose.multiple, "data": choose.data}
        log_chosen(run, table, choose.network, choose.outcome(schedule.kept), **setting)


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
