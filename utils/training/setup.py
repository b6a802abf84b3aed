"""From checked flags to what a run works with: its device, processes, data, and folder."""

import argparse
import sys
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from utils.checkpoints import digest
from utils.distributed import join
from utils.errors import UserError, naming
from utils.files import read_json
from utils.images.batches import ImageData
from utils.images.choice import Origins, agreed_normalisation, check_class_names, flagged_normalisation, image_remarks
from utils.images.datasets import load_dataset
from utils.images.spec import read_image_spec
from utils.modes import without_trace
from utils.runs.folder import CONFIG, check_entries, check_save_dir, check_text_log
from utils.runs.lease import Lease
from utils.runs.run import Run
from utils.runs.state import check_best, check_state, read_state
from utils.training.engine import Hooks, Trainer, TrainingPlan, check_acceleration, logits_of, prepare_step, sgd
from utils.training.learning_rate import LearningRate
from utils.world import World, world_from_environment

NO_SETTINGS = frozenset(("resume", "auto_resume", "dry_run", "defaults", "may_download"))


def prepare(args: argparse.Namespace) -> tuple[torch.device, World]:
    """Checks where the run computes and what it may write, and joins the other processes. Writes nothing."""
    world = world_from_environment()
    if args.batch_size % world.size:
        raise UserError(f"--batch-size {args.batch_size}: must be a multiple of the {world.size} processes that torchrun started")
    if args.batch_size < 2 * world.size and not args.evaluate:
        raise UserError(f"--batch-size {args.batch_size}: batch normalisation needs at least 2 images a process")
    device = choose_device(args.device, args.dev_idx, world)
    check_acceleration(device=device, amp=args.amp, compiled=args.compile, sync_bn=args.sync_bn)
    if args.resume is not None:
        check_text_log(args.resume, args.log_name)
    elif not args.evaluate:
        check_save_dir(args.save_dir, name=args.run_name, log_name=args.log_name)
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.backends.cudnn.benchmark = True
        torch.backends.cudnn.allow_tf32 = True
        torch.set_float32_matmul_precision("high")
    join(world, device)
    return device, world


def choose_device(name: str, index: int | None, world: World) -> torch.device:
    """The device of this process. Raises UserError for a CUDA device that is not there."""
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name == "cpu" or (name == "auto" and count == 0 and index is None):
        return torch.device("cpu")
    flag = f"--dev-idx {index}" if index is not None else f"--device {name}"
    if count == 0:
        raise UserError(f"{flag}: no CUDA device was found here; choose --device cpu")
    index = (index or 0) + world.local_rank
    if index >= count:
        raise UserError(f"{flag}: there is no CUDA device {index}, found {count} (0 to {count - 1})")
    return torch.device("cuda", index)


def take_up(args: argparse.Namespace, world: World) -> tuple[Lease | None, dict[str, Any] | None, str | None]:
    """What the run of --resume goes on from: the right to work on it, its state, and a sentence to log if that is not the last.

    The state is read once no other process can write one. A dry run takes nothing, and a new run has none of the three.
    """
    if args.resume is None:
        return None, None, None
    lease = None
    if world.is_main and not args.dry_run:
        check_entries(Path(args.resume))
        lease = Lease.take(Path(args.resume))
    if dist.is_initialized():
        dist.barrier()
    return lease, *read_state(args.resume)


def training_plan(args: argparse.Namespace) -> TrainingPlan:
    learning_rate = LearningRate(
        args.lr,
        n_epochs=args.n_epochs,
        kind=args.lr_schedule,
        schedule=args.schedule,
        lr_drops=args.lr_drops,
        warmup_epochs=args.warmup_epochs,
    )
    return TrainingPlan(
        learning_rate,
        amp=args.amp,
        checkpoint_interval=args.checkpoint_interval,
        checkpoint_minutes=args.checkpoint_minutes,
        ema_decay=getattr(args, "ema", None),
        ships_average=getattr(args, "ships", "average") == "average",
    )


def open_run(
    args: argparse.Namespace,
    *,
    script: str,
    device: torch.device,
    world: World,
    lease: Lease | None,
    state: dict[str, Any] | None,
    networks: Mapping[str, nn.Module] | None = None,
) -> Run:
    """A new run's folder, or with --resume the old one, of which `lease` and `state` are what `take_up` gave.

    `networks` holds, by flag, what was read from files: a resumed run must begin with the same ones.
    """
    digests = {flag: digest(network.state_dict()) for flag, network in (networks or {}).items()}
    if args.resume is not None:
        return _reopen_run(args, world=world, lease=lease, state=state, digests=digests)
    config = {
        "script": script,
        "flags": flags_of(args),
        "networks": digests,
        "device": _device_name(device),
        "processes": world.size,
    }
    return Run.create(args.save_dir, name=args.run_name, log_name=args.log_name, config=config, world=world)


def _reopen_run(
    args: argparse.Namespace, *, world: World, lease: Lease | None, state: dict[str, Any] | None, digests: Mapping[str, str]
) -> Run:
    config = read_json(Path(args.resume) / CONFIG)
    processes = config.get("processes", 1)
    if processes != world.size:
        raise UserError(f"--resume {args.resume}: a run of {processes} processes, started with {world.size} now")
    recorded = config.get("networks") or {}  # runs of older versions say nothing
    for flag, found in digests.items():
        if recorded.get(flag, found) != found:
            path = getattr(args, flag.removeprefix("--").replace("-", "_"))
            raise UserError(f"{flag} {path}: holds other weights than when {args.resume} began; put that file back to resume it")
    if state is not None:
        check_state(state, flags_of(args), defaults=args.defaults, folder=args.resume)
        check_best(args.resume, state, flags_of(args), defaults=args.defaults)
    epochs = state["resume"]["epoch"] if state else 0
    run = Run.reopen(args.resume, log_name=args.log_name, world=world, epochs=epochs, lease=lease)
    run.save_json(CONFIG, {**config, "flags": flags_of(args)})  # a raised --n-epochs holds for the next resumption too
    return run


def flags_of(args: argparse.Namespace) -> dict[str, Any]:
    """The flags that make a run what it is, as plain values."""
    return {name: value for name, value in vars(args).items() if name not in NO_SETTINGS}


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu, {torch.get_num_threads()} threads"


def announce(
    args: argparse.Namespace, network: str, *, device: torch.device, world: World, state: Mapping[str, Any] | None
) -> str:
    """What begins, in one line that `log_beginning` logs; somebody at a terminal sees it before the data are read.

    Elsewhere it has to wait for the run, because of a refused command scripts expect nothing but the reason.
    """
    data = args.dataset if args.dataset != "folder" else args.data_dir
    place = f"{world.size} x {_device_name(device)}" if world.size > 1 else _device_name(device)
    done = f", {state['resume']['epoch']} of them done" if state is not None else ""
    line = f"network: {network}; data: {data}; device: {place}; epochs: {args.n_epochs}{done}"
    if world.is_main and not args.dry_run and _is_watched():
        print(line, flush=True)
    return line


def _is_watched() -> bool:
    return sys.stdout is not None and sys.stdout.isatty()


def load_data(
    args: argparse.Namespace,
    *,
    device: torch.device,
    world: World,
    files: Origins | None = None,
    state: Mapping[str, Any] | None = None,
) -> ImageData:
    """The dataset of the flags in batches, as the networks of `files`, or the run that is resumed from `state`, have seen it.

    Where it has to be downloaded the main process does it, the others wait. Raises UserError for files that disagree.
    """
    files = files or {}
    flagged = flagged_normalisation(args.mean, args.std)
    known = _of_state(args, state) if state is not None else files
    sizes = [spec.image_size for spec in known.values() if spec is not None]
    if dist.is_initialized() and not world.is_main:
        dist.barrier()
    dataset = load_dataset(
        args.dataset,
        data_dir=args.data_dir,
        download=world.is_main and args.may_download and not args.dry_run,
        normalisation=agreed_normalisation(known, flagged),
        image_size=sizes[0] if sizes else None,
        test_only=args.evaluate,
    )
    if dist.is_initialized() and world.is_main:
        dist.barrier()
    for origin, spec in {**files, **known}.items():
        check_class_names(origin, spec, dataset)
    data = ImageData(
        dataset,
        batch_size=args.batch_size,
        seed=args.seed,
        device=device,
        world=world,
        workers=args.workers,
        limit_batches=args.limit_batches,
        crop_padding=getattr(args, "crop_padding", None),
        remarks=image_remarks(known, flagged, dataset) if state is None else (),
    )
    if data.train_steps == 0 and not args.evaluate:
        images = len(dataset.train.labels)
        raise UserError(f"--data-dir {args.data_dir}: {images} training images are too few, 2 a process make the smallest batch")
    return data


def _of_state(args: argparse.Namespace, state: Mapping[str, Any]) -> Origins:
    """What the saved state of the run says; nothing in those of older versions, which took the dataset's values."""
    origin = f"--resume {args.resume}"
    names = state.get("class_names")
    with naming(origin):
        return {origin: read_image_spec(state, num_classes=len(names) if isinstance(names, list) else 0)}


def check_classes(num_classes: int, data: ImageData, *, origin: str) -> None:
    """Raises UserError unless the network of `origin` (flag and file) has as many classes as the dataset."""
    expected = len(data.dataset.classes)
    if num_classes != expected:
        raise UserError(f"{origin}: has {num_classes} classes, but --dataset {data.dataset.name} has {expected}")


@torch.no_grad()
def check_images(network: nn.Module, data: ImageData, *, origin: str, trains: bool = False) -> None:
    """Raises UserError if the network of `origin` (flag and value) gives no logits for images of the dataset's size.

    One that `trains` may give more beside its logits in training, which is remarked once. The network is left as it was.
    """
    with without_trace(network):
        result = _result_for_example(network.eval(), data, origin)
        if not _are_logits(result, data):
            raise UserError(f"{origin}: must return {_logits_wanted(data)}, not {_found(result)}")
        if trains:
            with naming(origin):
                network.train()
            result = _result_for_example(network, data, origin)
    if not _are_logits(logits_of(result), data):
        raise UserError(f"{origin}: must return {_logits_wanted(data)} in training too, or first of all, not {_found(result)}")
    if not isinstance(result, Tensor):
        data.remarks += (f"{origin} returns {_found(result)} in training: it trains by the first entry, the logits",)


def _result_for_example(network: nn.Module, data: ImageData, origin: str) -> Any:
    height, width = data.example.shape[2:]
    try:
        return network(data.example)
    except Exception as error:  # networks refuse a size in any way: by an assertion, a shape that does not fit
        reason = str(error).partition("\n")[0]
        where = " in training" if network.training else ""
        raise UserError(
            f"{origin}: cannot take {width}x{height} images of --dataset {data.dataset.name}{where} ({reason})"
        ) from error


def _are_logits(result: Any, data: ImageData) -> bool:
    return isinstance(result, Tensor) and result.shape == (len(data.example), len(data.dataset.classes))


def _logits_wanted(data: ImageData) -> str:
    return f"logits of shape {(len(data.example), len(data.dataset.classes))} for {len(data.example)} images"


def _found(result: Any) -> str:
    if isinstance(result, Tensor):
        return f"shape {tuple(result.shape)}"
    entries = f" of {len(result)}" if isinstance(result, tuple | list) else ""
    return f"a {type(result).__name__}{entries}"


def to_device(network: nn.Module, device: torch.device, *, sync_bn: bool = False) -> nn.Module:
    """The network on `device` in channels-last layout, the faster one for convolutions on CPUs and on tensor cores."""
    if sync_bn:
        network = nn.SyncBatchNorm.convert_sync_batchnorm(network)
    return network.to(device, memory_format=torch.channels_last)


def train(
    args: argparse.Namespace,
    objective: nn.Module,
    *,
    network: nn.Module,
    describe: Callable[[nn.Module, Mapping[str, Tensor]], dict[str, Any]],
    data: ImageData,
    run: Run,
    plan: TrainingPlan,
    state: Mapping[str, Any] | None,
    hooks: Hooks | None = None,
) -> dict[str, Any]:
    """Trains `objective` as the flags say, from `state` on where there is one; arguments and result are those of `Trainer`."""
    trainer = Trainer(
        objective,
        prepare=partial(prepare_step, device=data.device, world=data.world, compiled=args.compile),
        network=network,
        describe=describe,
        optimizer=sgd(
            objective.parameters(),
            lr=args.lr,
            momentum=args.momentum,
            weight_decay=args.weight_decay,
            nesterov=not args.no_nesterov,
        ),
        data=data,
        run=run,
        plan=plan,
        hooks=hooks,
        place=partial(to_device, device=data.device, sync_bn=args.sync_bn),
    )
    if state is not None:
        trainer.load_state_dict(state["resume"])
    return trainer.fit()


def log_beginning(run: Run, announced: str, plan: TrainingPlan, fallback: str | None, *, data: ImageData) -> None:
    """Logs what was announced, and what else a user should know before a training starts."""
    say = run.note if _is_watched() else run.log
    say(announced)
    for remark in (*data.remarks, *filter(None, [fallback]), *plan.learning_rate.remarks()):
        run.warn(remark)


def summary_head(args: argparse.Namespace, script: str, run: Run) -> dict[str, Any]:
    """What every summary.json begins with.

    `seconds` is the wall time of all epochs. What the training gave follows, `training_flops` among it: what all steps took, of
    a teacher its forward passes included, without evaluations and the pass that scores filters.
    """
    return {
        "script": script,
        "run": run.folder.name,
        "dataset": args.dataset,
        "seed": args.seed,
        "seconds": round(run.seconds(), 3),
    }


def print_score(model: str, data: ImageData, result: dict[str, float]) -> None:
    """The accuracy of a network, after what a user should know of the images that it was given."""
    if data.world.is_main:
        print_remarks(data)
        print(
            f"{model} on {data.dataset.name}: loss {result['loss']:.4f}, top1 {result['top1']:.2f}, top5 {result['top5']:.2f} "
            f"over {result['images']} images"
        )


def print_remarks(data: ImageData) -> None:
    for remark in data.remarks:
        print(f"WARNING: {remark}")
