"""Prunes the filters of a network and fine-tunes it, with distillation from its unpruned self or from another teacher."""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from deploy.flags import add_latency_flags, is_of_time, latency_settings
from distill.flags import add_distillation_flags, check_distillation, distillation_settings, losses_list
from models import NAMES, check_model
from prune.flags import (
    AUTO,
    add_pruning_flags,
    criteria_list,
    network_settings,
    prunes,
    pruning_settings,
    rates_file,
    say_what_trains,
)
from prune.settings import SOFT_CRITERIA, NetworkSettings, PruningSettings, check_sensitivity_file
from utils import cli
from utils.errors import UserError
from utils.runs.found import TRAINED

if TYPE_CHECKING:
    from deploy.latency import LatencyTable
    from deploy.settings import LatencySettings
    from distill.settings import DistillationSettings
    from models.network_file import NetworkFile
    from prune.choice import FilterChoice
    from prune.schedule import PruningSchedule
    from utils.training.session import Session

SCRIPT = "pruning.py"


def get_args_parser() -> cli.Parser:
    parser = cli.Parser(prog=SCRIPT, description="Prune the filters of a network and fine-tune it with distillation.")
    networks = parser.add_argument_group("networks")
    networks.add_argument("--t-model", metavar="NAME", help=f"the teacher, unpruned: {NAMES}")
    networks.add_argument("--t-path", type=cli.network_path(TRAINED), metavar="FILE", help="checkpoint of the teacher")
    networks.add_argument("--s-model", metavar="NAME",
                          help="the student: the network that is pruned (default: --t-model)")  # fmt: skip
    networks.add_argument(
        "--s-path", type=cli.network_path(TRAINED), metavar="FILE", help="checkpoint of the student (default: new weights)"
    )
    networks.add_argument("--s-copy-t", action="store_true", help="the student starts as a copy of the teacher")
    cli.add_recipe_flag(parser)
    add_pruning_flags(parser)
    add_latency_flags(parser)
    add_distillation_flags(parser)
    cli.add_config_flag(parser)
    cli.add_data_flags(parser)
    cli.add_training_flags(
        parser, lr=0.01, n_epochs=200, schedule=(60, 120, 160), lr_drops=(0.2, 0.2, 0.2), may_skip_training=True
    )
    cli.add_averaging_flags(parser)
    cli.add_run_flags(parser, log_name="pruning.txt")
    say_which_networks_count(parser)
    parser.checks |= {"t_model": check_model, "s_model": check_model}
    say_what_trains(parser)
    parser.leads_with(
        *("t_model", "t_path", "s_copy_t", "prune_rates", "budget", "prune_mode", "distill", "dataset", "n_epochs", "run_name"),
        lists={
            "criteria, by --prune-mode (source; what it looks at)": criteria_list(),
            "losses, by --distill (source; what it compares)": losses_list(),
        },
    )
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

    from deploy.budget import describe
    from distill.objective import session_objective, session_teacher
    from models.graph import ChannelGraph
    from prune.forms import check_compact_form
    from prune.mending import Reconstruction, check_images
    from prune.networks import build_networks, images_of, network_names, read_files
    from prune.preparation import filter_choice, schedule_of
    from prune.preview import print_pruning
    from prune.record import describe_pruned, finish, log_accuracy, log_pruning
    from prune.schedule import check_soft_state
    from utils.files import read_json
    from utils.runs.folder import SENSITIVITY
    from utils.training.recalibration import check_recalibration
    from utils.training.session import Session

    session, names, pruning = Session(cli.session_settings(SCRIPT, args)), network_settings(args), pruning_settings(args)
    if args.evaluate:
        return score(session, names)
    if pruning.sensitivity is not None and session.world.size > 1:
        raise UserError(f"--sensitivity {pruning.sensitivity}: for one process, start it without torchrun")
    if not session.is_new and pruning.soft_interval is not None:
        check_soft_state(session.state["resume"]["hooks"], folder=args.resume)

    session.seed()
    files = read_files(names)
    session.announce(network_names(names, files))
    distillation = distillation_settings(args)
    any_teacher = not names.s_copy_t and learns_from_maps(distillation)
    others = [f"--t-path {names.t_path}"] if any_teacher else []
    data = session.load_data(images_of(names, files), other_classes=others)
    teacher, student = build_networks(names, files, data, any_teacher=any_teacher)
    graph = ChannelGraph(student.network, data.example)
    frozen = session_teacher(session, distillation, teacher, graph=graph)
    objective_of = partial(session_objective, session, distillation, teacher=frozen)
    loss = objective_of(student.network).formula()  # losses that cannot compare the two say so here
    check_recalibration(student.network, session.plan.recalibrate_bn_batches)
    check_images(pruning.reconstruct, data)
    choose = filter_choice(session, pruning, student, graph=graph)
    choose.check()
    table = latency_table(session, latency_settings(args), choose, multiple=pruning.multiple) if is_of_time(args) else None
    if table is not None:
        choose = timed(choose, table, multiple=pruning.multiple)
        choose.check()
    if pruning.sensitivity is not None:
        return sensitivity(session, pruning.sensitivity, student, choose)
    if pruning.train_form == "compact" and session.is_new:
        check_compact_form(choose.without_pass()(), data.example)
    if args.dry_run:
        said = partial(describe, table, multiple=choose.multiple) if table is not None else None
        return print_pruning(session, student, choose, loss=loss, describe=said)

    read = {"--t-path": teacher and teacher.network, "--s-path": student.network if names.s_path is not None else None}
    run = session.open(read)
    if pruning.ratios_file is not None and session.is_new:
        run.save_json(SENSITIVITY, read_json(pruning.ratios_file))
    before = log_accuracy(run, teacher=teacher, student=student, data=data, is_copy=names.s_copy_t) if session.is_new else {}
    mend = Reconstruction(pruning.reconstruct, data, run) if pruning.reconstruct is not None else None
    on_choice = partial(log_later_step, session, pruning, table, choose)
    schedule = schedule_of(session, pruning, choose, on_choice=on_choice, mend=mend)
    if session.is_new:
        log_first_times(session, pruning, table, choose, schedule)
        batches = session.plan.recalibrate_bn_batches
        reached = {"recalibrate_bn_batches": batches, "before": mend and mend.before}
        log_pruning(run, before, schedule=schedule, layers=choose.layers, student=student, data=data, **reached)
    network = session.place(schedule.trained_network())
    describe_network = partial(describe_pruned, schedule=schedule, file=student, config=session.settings.flags)
    result = session.train(objective_of(network), network=network, describe=describe_network, pruning=schedule)
    if session.world.is_main:
        head, config = session.summary_head(), session.settings.flags
        then = {"head": head, "following": partial(session.following, "export.py")}
        finish(run, result, graph=choose.graph, model=student.model, data=data.alone(), config=config, **then)
    run.close()


def learns_from_maps(settings: DistillationSettings) -> bool:
    """Whether the teacher is one of feature maps alone, whatever classes it knows."""
    from distill.registry import active_losses, logit_losses

    weighed = {"alpha": settings.alpha}
    return bool(active_losses(settings.losses, **weighed)) and not logit_losses(settings.losses, **weighed)


def check_flags(args: argparse.Namespace) -> None:
    """Raises UserError for flags that contradict each other."""
    if args.evaluate:
        return cli.require(args, "t_path" if args.s_path is None else "s_path")
    if args.s_copy_t:
        check_copy(args)
    elif args.s_model is None and args.s_path is None and args.t_model is None:
        raise UserError("--s-model: name the network to prune, or give --s-path, or --s-copy-t with --t-path")
    if args.n_epochs == 0 and (args.soft_prune or not prunes(args)):
        raise UserError("--n-epochs 0: only where filters are pruned for good, nothing else changes the network without training")
    if args.soft_prune and args.prune_mode not in SOFT_CRITERIA:
        raise UserError(f"--soft-prune: not with --prune-mode {args.prune_mode}, choose from {', '.join(SOFT_CRITERIA)}")
    if args.channel_multiple == AUTO and not is_of_time(args):
        raise UserError("--channel-multiple auto: needs --budget latency=SHARE, whose table of times shows which is best")
    if args.sensitivity is not None:
        check_sensitivity_file(Path(args.sensitivity))
    if rates_file(args) is not None and len(args.prune_rates) > 1:
        raise UserError(f"--prune-rates {rates_file(args)}: a file stands alone, without proportions beside it")
    if args.prune_steps > max(args.n_epochs, 1):
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


def latency_table(session: Session, settings: LatencySettings, choose: FilterChoice, *, multiple: int | None) -> LatencyTable:
    """What a budget of time has to know."""
    from deploy.budget import obtain_table
    from utils.runs.folder import LATENCY_TABLE

    return obtain_table(
        settings,
        choose.network,
        choose.data,
        recorded=session.recorded(LATENCY_TABLE),
        share=choose.budget.share,
        multiple=multiple,
        narrowest=min(layer.filters for layer in choose.layers if choose.ratios[layer.name] != 1),
        chosen_by=lambda table: timed(choose, table, multiple=multiple).without_pass().outcome,
    )


def timed(choose: FilterChoice, table: LatencyTable, *, multiple: int | None) -> FilterChoice:
    """The choice that counts its budget by the times of `table`, and takes its best multiple where none is given."""
    from dataclasses import replace

    return replace(choose, multiple=table.multiple if multiple is None else multiple, seconds=table.seconds)


def sensitivity(session: Session, path: Path, student: NetworkFile, choose: FilterChoice) -> None:
    """Measures what each layer loses alone, without training; leaves a file and a picture."""
    from prune.sensitivity import READ_BY_SENSITIVITY, measure_sensitivity
    from reporting.layer_sensitivity import draw_sensitivity
    from utils.files import write_atomic
    from utils.training.evaluation import evaluate

    data, amp = choose.data.alone(), session.settings.run.amp
    setting = {"network": student.model, "dataset": data.dataset.name, "images": len(data.dataset.test.labels)}
    setting |= {name: session.settings.flags[name] for name in READ_BY_SENSITIVITY}
    document = measure_sensitivity(choose, path, setting=setting, top1_of=lambda net: evaluate(net, data, amp=amp)["top1"])
    picture = path.with_suffix(".png")
    write_atomic(picture, draw_sensitivity(document))
    print(f"{len(document['families'])} layers or groups -> {path}, {picture}")


def log_first_times(
    session: Session, pruning: PruningSettings, table: LatencyTable | None, choose: FilterChoice, schedule: PruningSchedule
) -> None:
    """Keeps the table of a budget of time, and measures the network of the first step where that is the last."""
    from dataclasses import asdict

    from utils.runs.folder import LATENCY_TABLE

    if table is not None:
        session.run.save_json(LATENCY_TABLE, asdict(table))
        log_time(session, pruning, table, choose, schedule, step=0)


def log_later_step(
    session: Session,
    pruning: PruningSettings,
    table: LatencyTable | None,
    choose: FilterChoice,
    schedule: PruningSchedule,
    step: int,
) -> None:
    """Logs a step of gradual pruning after the first."""
    from prune.record import log_step

    log_step(session.run, choose.layers, schedule.selection, step, steps=pruning.steps)
    log_time(session, pruning, table, choose, schedule, step=step)


def log_time(
    session: Session,
    pruning: PruningSettings,
    table: LatencyTable | None,
    choose: FilterChoice,
    schedule: PruningSchedule,
    *,
    step: int,
) -> None:
    """Measures, under a budget of time, the network of the last step, and logs it."""
    from deploy.budget import log_chosen
    from prune.choice import outcome_of

    if table is not None and step + 1 == pruning.steps:
        setting = {"share": choose.budget.share, "multiple": choose.multiple, "data": choose.data}
        log_chosen(session.run, table, choose.network, outcome_of(schedule.selection), **setting)


def score(session: Session, names: NetworkSettings) -> None:
    """Prints the accuracy of the student's file, or else the teacher's: dense, pruned or compact."""
    from prune.networks import read_checked
    from utils.device import to_device
    from utils.images.loading import check_classes
    from utils.training.evaluation import evaluate_each, print_score

    flag, path, model = names.scored
    file = read_checked(flag, path, model)
    data = session.load_data({f"{flag} {path}": file.images})
    check_classes(file.num_classes, data, origin=f"{flag} {path}", remark=file.remark)
    print_score(file.model, data, evaluate_each(to_device(file.network, session.device), data, amp=session.settings.run.amp))


if __name__ == "__main__":
    cli.run_script(get_args_parser, main)
