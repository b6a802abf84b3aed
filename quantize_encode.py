"""Quantizes a network and fine-tunes it: by shared weights, encoded into one file that decodes bit for bit, or for int8."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distill.flags import add_distillation_flags, check_distillation, distillation_settings, losses_list
from models import check_model
from quantize.flags import add_quantization_flags, codec_settings, quantization_settings
from quantize.settings import INT8, TRELLIS, CodecSettings, QuantizationSettings
from utils import cli
from utils.errors import UserError, naming
from utils.runs.found import SHIPPED, TRAINED

if TYPE_CHECKING:
    from torch import nn

    from distill.objective import FrozenTeacher
    from distill.settings import DistillationSettings
    from models.network_file import NetworkFile
    from utils.training.objective import Objective
    from utils.training.session import Session

SCRIPT = "quantize_encode.py"


def get_args_parser() -> cli.Parser:
    parser = cli.Parser(prog=SCRIPT, description="Quantize a network by shared weights and encode it into one file.")
    network = parser.add_argument_group("network")
    network.add_argument("--model", metavar="NAME",
                         help="the network (default: the one that its file names, unless that is FILE.py:FUNCTION)")  # fmt: skip
    network.add_argument(
        "--load-path",
        type=cli.network_path(SHIPPED),
        metavar="FILE",
        help="its checkpoint: dense, pruned or compact; for --evaluate also an archive",
    )
    add_quantization_flags(parser)
    teacher = parser.add_argument_group("teacher, for int8")
    teacher.add_argument("--t-model", metavar="NAME",
                         help="its network (default: the one that its file names)")  # fmt: skip
    teacher.add_argument(
        "--t-path", type=cli.network_path(TRAINED), metavar="FILE", help="its checkpoint, such as the unpruned network"
    )
    add_distillation_flags(parser)
    files = parser.add_argument_group("archives")
    files.add_argument("--decode", metavar="FILE", help="only write the network of an archive into --output")
    files.add_argument("--output", metavar="FILE", help="checkpoint that --decode writes")
    files.add_argument("--force", action="store_true", help="let --decode replace an existing --output")
    files.add_argument("--inspect", metavar="FILE", help="only print where the bytes of an archive go")
    cli.add_config_flag(parser)
    cli.add_data_flags(parser)
    cli.add_training_flags(parser, lr=0.001, n_epochs=20, schedule=(), lr_drops=())
    cli.add_run_flags(parser, log_name="quantize_encode.txt")
    parser.checks |= {"model": check_model, "t_model": check_model}
    cli.counts_in_training(parser, *cli.names_of(teacher))
    say_what_counts(parser)
    parser.leads_with(
        *("load_path", "quan_mode", "quan_bits", "codec", "dataset", "n_epochs", "distill", "t_path", "run_name", "evaluate"),
        lists={"losses, by --distill, for --quan-mode int8 (source; what it compares)": losses_list()},
    )
    return parser


def say_what_counts(parser: cli.Parser) -> None:
    """Which flags count beside which: the modes that only read an archive take nothing else."""
    parser.counts_only("t_path", "t_model", "distill", where=lambda args: args.quan_mode == INT8, only="with --quan-mode int8")
    parser.counts_only(
        "recalibrate_bn", where=lambda args: args.quan_mode != INT8, only="where batch norms are not folded, not with int8"
    )
    parser.counts_only("sync_bn", where=lambda args: args.quan_mode != INT8, only="where batch norms learn, not with int8")
    trains = [
        *parser.names_in("training"),
        *parser.names_in("averaging"),
        "t_path",
        "t_model",
        "distill",
        "resume",
        "compile",
        "amp",
    ]
    parser.counts_only(*trains, where=lambda args: args.codec != TRELLIS, only="without --codec trellis, which takes no training")
    others = parser.names() - {"inspect", "decode", *cli.PLACES}
    parser.counts_only(*others, where=lambda args: args.inspect is None, only="without --inspect, which only reads an archive")
    others -= {"output", "force"}
    parser.counts_only(*others, where=lambda args: args.decode is None, only="without --decode, which only reads an archive")
    parser.counts_only("output", "force", where=lambda args: args.decode is not None, only="with --decode")


def main(args: argparse.Namespace) -> None:
    check_flags(args)
    if args.inspect is not None:
        return inspect(args.inspect, model=args.model)
    if args.decode is not None:
        return decode(args.decode, Path(args.output), model=args.model, force=args.force)

    from distill.objective import session_teacher
    from models.network_file import check_training, load_network
    from prune.networks import read_checked
    from quantize.codebook import layer_bits
    from quantize.record import describe_quantized, share, simulate
    from utils.training.recalibration import check_recalibration
    from utils.training.session import Session

    session, settings = Session(cli.session_settings(SCRIPT, args)), quantization_settings(args)
    if args.evaluate:
        return score(session, args.load_path, model=args.model)

    session.seed()
    file = load_network(args.load_path, flag="--load-path", model=args.model)
    session.announce(file.model)
    files = {f"--load-path {args.load_path}": file}
    if args.t_path is not None:
        files[f"--t-path {args.t_path}"] = read_checked("--t-path", args.t_path, args.t_model)
    file, teacher = fit_for_data(session, files)
    distillation = distillation_settings(args)
    frozen = session_teacher(session, distillation, teacher)
    objective_for = partial(objective_of, session, teacher=frozen, distillation=distillation)
    network = small_network(session, file.network, whole_too=settings.is_int8)
    if session.is_new:
        with naming(f"--load-path {args.load_path}"):
            check_training(file, network, session.data.example)
    if (codec := codec_settings(args)) is not None:
        return compress_network(session, file, network, codec=codec, path=args.load_path)
    check_recalibration(network, session.plan.recalibrate_bn_batches)
    bits = {} if settings.is_int8 else layer_bits(network, mode=settings.mode, bits=settings.bits)
    if args.dry_run:
        return print_quantization(session, network, bits, objective_for=objective_for)

    run = session.open({"--load-path": file.network, "--t-path": teacher.network if teacher is not None else None})
    network = session.place(network)
    if settings.is_int8:
        network = simulate(run, network, session.data, is_new=session.is_new)
    else:
        share(run, network, bits, session.data, is_new=session.is_new)
    describe = partial(describe_quantized, config=session.settings.flags, file=file)
    result = session.train(objective_for(network), network=network, describe=describe)
    if session.world.is_main:
        finish(session, settings, result, model=args.model)
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


def fit_for_data(session: Session, files: Mapping[str, NetworkFile]) -> tuple[NetworkFile, NetworkFile | None]:
    """The network and, if there is one, its teacher, on the device, fit for the session's data, which are loaded for them.

    `files` holds the two by flag and path, whose pruned filters must truly be at zero.
    """
    from dataclasses import replace

    from prune.compact import check_zeros_of
    from utils.device import to_device
    from utils.images.loading import check_classes, check_images

    data = session.load_data({origin: file.images for origin, file in files.items()})
    for origin, file in files.items():
        check_classes(file.num_classes, data, origin=origin, remark=file.remark)
        check_zeros_of(file, origin=origin)
    trained = None if session.settings.run.evaluate else next(iter(files))
    for origin, file in files.items():
        check_images(to_device(file.network, session.device), data, origin=origin, trains=origin == trained)
    network, teacher = (*files.values(), None)[:2]
    return replace(network, images=data.dataset.images), teacher


def small_network(session: Session, network: nn.Module, *, whole_too: bool) -> nn.Module:
    """The network without the filters that are zero, so that they cost nothing; one that has none only if `whole_too`."""
    from models.narrow import NarrowNetwork
    from prune.compact import compact

    if isinstance(network, NarrowNetwork):
        return network
    smaller = compact(network, session.data.example)
    return smaller if smaller.kept or whole_too else network


def objective_of(
    session: Session, network: nn.Module, *, teacher: FrozenTeacher | None, distillation: DistillationSettings
) -> Objective:
    """The loss that the quantized network trains by; only one of int8 has a teacher."""
    from distill.objective import session_objective
    from models.int8 import Int8Network
    from utils.training.objective import CrossEntropyObjective

    if isinstance(network, Int8Network):
        return session_objective(session, distillation, network, teacher)
    return CrossEntropyObjective(network, label_smoothing=session.settings.training.label_smoothing)


def print_quantization(
    session: Session, network: nn.Module, bits: Mapping[str, int], *, objective_for: Callable[[nn.Module], Objective]
) -> None:
    """The plan of a dry run; without `bits` for int8."""
    from models.int8 import Int8Network

    trained, lines = network, [f"{name} would share {2**count} values" for name, count in bits.items()]
    if not bits:
        trained = Int8Network(network)
        lines = [f"{name} would compute in int8" for name in trained.layers]
    session.print_plan({"network": network}, [*lines, f"loss: {objective_for(trained).formula()}"])


def finish(session: Session, settings: QuantizationSettings, result: Mapping[str, Any], *, model: str | None) -> None:
    """Leaves what the run is for: the archive of the best network, or its checkpoint for int8."""
    from models.network_file import load_network
    from quantize.record import encode, finish_int8
    from utils.device import to_device
    from utils.runs.folder import BEST

    best = load_network(session.run.folder / BEST, flag="--save-dir", model=model)
    to_device(best.network, session.device)
    small = to_device(small_network(session, best.network, whole_too=settings.is_int8), session.device)
    leave_files = finish_int8 if settings.is_int8 else encode
    head, config = session.summary_head(), session.settings.flags
    leave_files(session.run, result, session.data.alone(), best=best, small=small, config=config, head=head)


def compress_network(session: Session, file: NetworkFile, network: nn.Module, *, codec: CodecSettings, path: str) -> None:
    """Leaves the archive of the second codec, which takes no training."""
    from quantize.level_run import find_candidate, leave_candidate

    if session.settings.run.dry_run:
        return session.print_plan({"network": network}, [f"its weights would become levels of steps: {codec}"])
    if session.world.size > 1:
        raise UserError(f"--codec {TRELLIS}: takes no training, start it as one process")
    network, found = session.place(network), []
    best = find_candidate(file, network, session.data, settings=codec, say=found.append)  # a bound may be out of reach
    run = session.open({"--load-path": file.network})
    run.log("\n".join(found))
    places = {"path": path, "config": session.settings.flags, "head": session.summary_head()}
    leave_candidate(run, best, session.data, file=file, original=network, **places)
    run.close()


def inspect(path: str, *, model: str | None) -> None:
    """Prints where the bytes of an archive go."""
    from quantize.archive import read_flagged

    _, report = read_flagged(path, flag="--inspect", model=model)
    print(f"{path}: {report.model}, {report.num_classes} classes")
    if report.images is not None:
        print(f"images: {report.images}")
    print("\n".join(report.lines()))


def decode(path: str, output: Path, *, model: str | None, force: bool) -> None:
    """Writes the network of an archive as a checkpoint."""
    from quantize.archive import read_flagged
    from quantize.record import describe_compact
    from utils.checkpoints import save_checkpoint

    if output.exists() and not force:
        raise UserError(f"--output {output}: exists already, choose another name or give --force")
    network, report = read_flagged(path, flag="--decode", model=model)
    config = {"decoded_from": Path(path).name}
    identity = {"model": report.model, "num_classes": report.num_classes, "images": report.images}
    save_checkpoint(output, describe_compact(network, **identity, config=config))
    print(f"{path}: {report.model}, {report.num_classes} classes -> {output}")


def score(session: Session, path: str, *, model: str | None) -> None:
    """Prints the accuracy of the network in an archive or a checkpoint."""
    from models.network_file import load_network
    from quantize.archive import read_flagged
    from utils.device import to_device
    from utils.files import is_archive
    from utils.images.loading import check_classes, check_images
    from utils.training.evaluation import evaluate_each, print_score

    origin, amp = f"--load-path {path}", session.settings.run.amp
    if not is_archive(path):
        file, _ = fit_for_data(session, {origin: load_network(path, flag="--load-path", model=model)})
        return print_score(file.model, session.data, evaluate_each(file.network, session.data, amp=amp))
    network, report = read_flagged(path, flag="--load-path", model=model)
    data = session.load_data({origin: report.images})
    check_classes(report.num_classes, data, origin=origin)
    network = to_device(network, session.device)
    check_images(network, data, origin=origin)
    print_score(report.model, data, evaluate_each(network, data, amp=amp))


if __name__ == "__main__":
    cli.run_script(get_args_parser, main)
