"""One run of an entry script that trains, from its settings to its summary: what the recipes of all of them share."""

import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from utils.checkpoints import digest
from utils.cli.config_file import config_text
from utils.cli.effects import flag_of
from utils.cli.plan import print_plan
from utils.device import choose_device, device_name, to_device
from utils.distributed import join, leave
from utils.errors import ParameterError, UserError
from utils.files import read_json
from utils.images.batches import ImageData
from utils.images.choice import Origins
from utils.images.dataset import Normalisation
from utils.images.loading import load_images, of_state
from utils.python_file import code_digests
from utils.runs.environment import describe_environment
from utils.runs.folder import CONFIG, GIVEN, check_entries, check_save_dir, check_text_log
from utils.runs.lease import Lease
from utils.runs.run import Run
from utils.runs.state import check_best, check_state, read_state
from utils.seed import seed_everything
from utils.training.learning_rate import LearningRate
from utils.training.pruning import Pruning
from utils.training.reporting import log_beginning
from utils.training.settings import SessionSettings
from utils.training.step import amp_remarks, check_acceleration, prepare_step, sgd
from utils.training.trainer import Trainer, TrainingPlan
from utils.world import world_from_environment

Describe = Callable[[nn.Module, Mapping[str, Tensor]], dict[str, Any]]


class Session:
    """A run: its `settings`, its `device` and `world`, the `state` that it goes on from, then its `data` and its folder, `run`.

    A recipe makes one, and calls `announce`, `load_data`, `open`, `train` and `finish` in this order. Nothing is written before
    `open`; a session that only scores, or shows its plan, never gets there. Of many processes the main one writes.
    """

    data: ImageData
    run: Run

    def __init__(self, settings: SessionSettings):
        """Checks where the run computes and what it may write, joins the other processes, and reads what is resumed.

        Raises UserError where that cannot be. A dry run takes no right to work on the folder; a new run has no `state`.
        """
        self.settings, self.world = settings, world_from_environment()
        self._check_batch_size()
        run = settings.run
        self.device = choose_device(run.device, run.dev_idx, self.world)
        check_acceleration(device=self.device, amp=run.amp, compiled=run.compile, sync_bn=run.sync_bn)
        if run.resume is not None:
            check_text_log(run.resume, run.log_name)
        elif not run.evaluate:
            check_save_dir(run.save_dir, name=run.run_name, log_name=run.log_name)
        _use(self.device)
        join(self.world, self.device)
        self._lease: Lease | None = None
        self.state, self._fallback = self._take_up() if run.resume is not None and not run.evaluate else (None, None)
        self._announced = ""

    def _check_batch_size(self) -> None:
        images, processes = self.settings.data.batch_size, self.world.size
        if images % processes:
            raise ParameterError("batch_size", images, f"must be a multiple of the {processes} processes that torchrun started")
        if images < 2 * processes and not self.settings.run.evaluate:
            raise ParameterError("batch_size", images, "batch normalisation needs at least 2 images a process")

    def _take_up(self) -> tuple[dict[str, Any] | None, str | None]:
        """The state to go on from, and a sentence to log if it is not the last; read once no other process can write one."""
        folder = Path(self.settings.run.resume)
        if self.world.is_main and not self.settings.run.dry_run:
            check_entries(folder)
            self._lease = Lease.take(folder)
        if dist.is_initialized():
            dist.barrier()
        return read_state(folder)

    @property
    def is_new(self) -> bool:
        """Whether the run begins now, and does not go on."""
        return self.state is None

    @property
    def plan(self) -> TrainingPlan:
        """How long the run trains, and how."""
        training, run = self.settings.training, self.settings.run
        learning_rate = LearningRate(
            training.lr,
            n_epochs=training.n_epochs,
            kind=training.lr_schedule,
            schedule=training.schedule,
            lr_drops=training.lr_drops,
            warmup_epochs=training.warmup_epochs,
        )
        return TrainingPlan(
            learning_rate,
            amp=run.amp,
            checkpoint_interval=run.checkpoint_interval,
            checkpoint_minutes=run.checkpoint_minutes,
            recalibrate_bn_batches=training.recalibrate_bn,
            ema_decay=training.ema,
            ships_average=training.ships == "average",
        )

    def announce(self, network: str) -> None:
        """Says what begins, in one line that `open` logs; somebody at a terminal sees it before the data are read.

        Elsewhere it has to wait for the run, because of a refused command scripts expect nothing but the reason.
        """
        name, world = device_name(self.device), self.world
        place = f"{world.size} x {name}" if world.size > 1 else name
        done = f", {self.state['resume']['epoch']} of them done" if self.state is not None else ""
        epochs = f"{self.settings.training.n_epochs}{done}"
        self._announced = f"network: {network}; data: {self.settings.data.title}; device: {place}; epochs: {epochs}"
        if world.is_main and not self.settings.run.dry_run and _is_watched():
            print(self._announced, flush=True)

    def load_data(
        self, files: Origins | None = None, *, other_classes: Collection[str] = (), published: Normalisation | None = None
    ) -> ImageData:
        """The images, as the networks of `files` or the state of the run say; see `load_images`."""
        run = self.settings.run
        self.data = load_images(
            self.settings.data,
            seed=run.seed,
            device=self.device,
            world=self.world,
            files=files,
            resumed=of_state(self.state, origin=f"--resume {run.resume}") if self.state is not None else None,
            other_classes=other_classes,
            published=published,
            test_only=run.evaluate,
            may_write=not run.dry_run,
        )
        return self.data

    def seed(self) -> None:
        """Sets the streams of random numbers to where every run of this seed begins."""
        seed_everything(self.settings.run.seed)

    def place(self, network: nn.Module) -> nn.Module:
        """The network on the run's device, as it trains there."""
        return to_device(network, self.device, sync_bn=self.settings.run.sync_bn)

    def print_plan(self, networks: Mapping[str, nn.Module], lines: Sequence[str]) -> None:
        """What the run would do with these networks, by role, for a dry run."""
        print_plan(self.settings.run, plan=self.plan, data=self.data, networks=networks, lines=lines)

    def open(self, networks: Mapping[str, nn.Module | None]) -> Run:
        """Makes the run's folder, or takes the old one, and logs what was announced with all that a user should know before.

        `networks` holds, by flag, what was read from files, None where nothing was: a resumed run must begin with the same ones.
        """
        digests = {flag: digest(network.state_dict()) for flag, network in networks.items() if network is not None}
        self.run = self._create(digests) if self.settings.run.resume is None else self._reopen(digests)
        say = self.run.note if _is_watched() else self.run.log
        say(self._announced)
        log_beginning(self.run, self.data, recipe=self._recipe())
        rate, amp = self.plan.learning_rate.remarks(), amp_remarks(self.device, amp=self.plan.amp)
        for remark in (*self.data.remarks, *filter(None, [self._fallback]), *rate, *amp):
            self.run.warn(remark)
        return self.run

    def _recipe(self) -> str:
        training = self.settings.training
        if training.n_epochs == 0:
            return "no training"
        momentum = f"momentum {training.momentum:g}" + ("" if training.no_nesterov or not training.momentum else " (Nesterov)")
        return (
            f"SGD, {momentum}, weight decay {training.weight_decay:g}, {self.data.train_steps} steps an epoch of "
            f"{self.data.batch_size} images, learning rate {self.plan.learning_rate.describe()}"
        )

    def following(self, script: str, *words: str) -> list[str]:
        """A command that takes up what this run leaves: `script`, its `words`, and the flags that say which images."""
        flags, defaults = self.settings.flags, self.settings.defaults
        kept = ("dataset", "data_dir", "test_share", "image_size")
        given = [(name, flags[name]) for name in kept if flags.get(name) is not None and flags[name] != defaults.get(name)]
        return [script, *words, *(part for name, value in given for part in (flag_of(name), str(value)))]

    def recorded(self, name: str) -> Path | None:
        """A file that the run which goes on has left in its folder, if it has."""
        path = Path(self.settings.run.resume or "", name)
        return path if self.settings.run.resume is not None and path.exists() else None

    def _create(self, digests: Mapping[str, str]) -> Run:
        run = self.settings.run
        config = {
            "script": self.settings.script,
            "flags": dict(self.settings.flags),
            "networks": dict(digests),
            "device": device_name(self.device),
            "processes": self.world.size,
            "images": self._images(),
        }
        code = code_digests(self.settings.flags)
        config |= {"code": code} if code else {}
        created = Run.create(run.save_dir, name=run.run_name, log_name=run.log_name, config=config, world=self.world)
        created.save_text(GIVEN, config_text(self.settings.script, self.settings.given))
        return created

    def _images(self) -> dict[str, Any]:
        """Which images the run works on, so that others are noticed when it goes on."""
        dataset = self.data.dataset
        counts = {"train": len(dataset.train.labels), "test": len(dataset.test.labels)}
        files = {"files": dataset.fingerprint} if dataset.fingerprint else {}
        lists = {"test_files": list(dataset.test_files), "left_out_broken": list(dataset.broken)}
        return {**counts, **files, **{name: paths for name, paths in lists.items() if paths}}

    def _check_images(self, recorded: Mapping[str, Any]) -> None:
        """Raises ParameterError where the run began with other images; runs of older versions do not say with which."""
        found = self._images()
        if not recorded or all(recorded.get(name) == value for name, value in found.items()):
            return
        if not self.settings.data.accept_data:
            counts = " and ".join(f"{recorded.get(name)} {name}" for name in ("train", "test"))
            now = " and ".join(f"{found[name]} {name}" for name in ("train", "test"))
            raise ParameterError(
                "data_dir",
                self.settings.data.data_dir,
                f"holds other images ({now}) than {self.settings.run.resume} began with ({counts}): names or sizes of files "
                "differ; put those back, or give --accept-data to go on with these",
            )

    def _check_networks(self, digests: Mapping[str, str], config: Mapping[str, Any]) -> None:
        """Raises UserError for a network that is not the one which the run began with, wherever its file lies by now."""
        folder, flags, recorded = self.settings.run.resume, self.settings.flags, config.get("networks") or {}
        for flag, found in digests.items():
            name = flag.removeprefix("--").replace("-", "_")
            if recorded.get(flag, found) != found:
                raise UserError(
                    f"{flag} {flags[name]}: holds other weights than when {folder} began; put that file back to resume it"
                )
            if flag not in recorded and flags[name] != config["flags"].get(name):  # runs of older versions say nothing
                raise UserError(f"{flag} {flags[name]}: {folder} does not say which weights it began with; put the file back")

    def _reopen(self, digests: Mapping[str, str]) -> Run:
        folder, flags = self.settings.run.resume, dict(self.settings.flags)
        config = read_json(Path(folder) / CONFIG)
        processes = config.get("processes", 1)
        if processes != self.world.size:
            raise ParameterError("resume", folder, f"a run of {processes} processes, started with {self.world.size} now")
        self._check_networks(digests, config)
        self._check_images(config.get("images") or {})
        if self.state is not None:
            check_state(self.state, flags, defaults=self.settings.defaults, folder=folder)
            check_best(folder, self.state, flags, defaults=self.settings.defaults)
        epochs = self.state["resume"]["epoch"] if self.state else 0
        run = Run.reopen(folder, log_name=self.settings.run.log_name, world=self.world, epochs=epochs, lease=self._lease)
        resumption = {"epoch": epochs, "device": device_name(self.device), **describe_environment()}
        resumptions = [*(config.get("resumptions") or []), resumption]
        # a raised --n-epochs, moved files and accepted images hold for the next resumption too
        run.save_json(CONFIG, {**config, "flags": flags, "images": self._images(), "resumptions": resumptions})
        return run

    def train(
        self, objective: nn.Module, *, network: nn.Module, describe: Describe, pruning: Pruning | None = None
    ) -> dict[str, Any]:
        """Trains `objective` to the end, from the state on where there is one; arguments and result are those of `Trainer`.

        The processes part when this returns: what follows is for the main one alone.
        """
        training = self.settings.training
        trainer = Trainer(
            objective,
            prepare=partial(prepare_step, device=self.device, world=self.world, compiled=self.settings.run.compile),
            network=network,
            describe=describe,
            optimizer=sgd(
                objective.parameters(),
                lr=training.lr,
                momentum=training.momentum,
                weight_decay=training.weight_decay,
                nesterov=not training.no_nesterov,
            ),
            data=self.data,
            run=self.run,
            plan=self.plan,
            pruning=pruning,
            place=self.place,
        )
        if self.state is not None:
            trainer.load_state_dict(self.state["resume"])
        result = trainer.fit()
        leave()
        return result

    def summary_head(self) -> dict[str, Any]:
        """What every summary.json begins with; where not all test images are shown, how many of how many.

        `seconds` is the wall time of all epochs. What the training gave follows, `training_flops` among it: what all steps took,
        of a teacher its forward passes included, without evaluations and the pass that scores filters.
        """
        shown, whole = self.data.shown_test_images, len(self.data.dataset.test.labels)
        limited = {"test_images": {"shown": shown, "all": whole}} if shown < whole else {}
        return {
            "script": self.settings.script,
            "run": self.run.folder.name,
            "dataset": self.settings.data.dataset,
            "seed": self.settings.run.seed,
            "seconds": round(self.run.seconds(), 3),
            **limited,
        }


def _use(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.backends.cudnn.benchmark = True
        torch.backends.cudnn.allow_tf32 = True
        torch.set_float32_matmul_precision("high")


def _is_watched() -> bool:
    return sys.stdout is not None and sys.stdout.isatty()
