"""The loop of a training: train an epoch, evaluate, record, save; stop at any step and go on as if nothing was."""

import contextlib
import math
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from utils.distributed import any_process, broadcast_from_main
from utils.errors import Interrupted, NonFiniteLoss, UserError, printable
from utils.images.batches import Batch, ImageData
from utils.profile import training_flops
from utils.runs.folder import AVERAGE, BEST, HITS, LAST, TRAINED
from utils.runs.run import Run
from utils.seed import random_state, restore_random_state
from utils.training.averaging import WeightAverage
from utils.training.classes import class_document
from utils.training.evaluation import evaluate, evaluate_each
from utils.training.learning_rate import LearningRate
from utils.training.metrics import Sums, first_non_finite
from utils.training.pruning import Pruning
from utils.training.recalibration import lags_behind, recalibrated_batch_norm
from utils.training.reporting import EpochReport
from utils.training.signals import StopSignals
from utils.training.step import train_step
from utils.world import World

READ_INTERVAL_STEPS = 50
VOTE_INTERVAL_STEPS = 20
LAGGING_EPOCHS = 2  # after which a test at chance is remarked


@dataclass(frozen=True)
class TrainingPlan:
    """How long and how: the recipe of a run as its flags give it."""

    learning_rate: LearningRate
    amp: bool = False
    checkpoint_interval: int = 1
    checkpoint_minutes: float | None = None
    recalibrate_bn_batches: int | None = None
    ema_decay: float | None = None
    ships_average: bool = True  # with a decay: whether the averaged network is scored and shipped, or the trained one

    @property
    def n_epochs(self) -> int:
        return self.learning_rate.n_epochs


class Trainer:
    """One training, from its first step or from a saved state on.

    `objective` is trained through what `prepare(objective)` makes of it, as `prepare_step` does; `network` is the part of it that
    is evaluated, which `pruning` may exchange for another between epochs; that one `place(network)` puts where it trains.
    `describe(network, kept)` gives the checkpoint that others read, called with the network as it ships and `pruning.shipped()`.
    """

    def __init__(
        self,
        objective: nn.Module,
        *,
        prepare: Callable[[nn.Module], Callable[..., Any]],
        network: nn.Module,
        describe: Callable[[nn.Module, Mapping[str, Tensor]], dict[str, Any]],
        optimizer: torch.optim.Optimizer,
        data: ImageData,
        run: Run,
        plan: TrainingPlan,
        pruning: Pruning | None = None,
        place: Callable[[nn.Module], nn.Module] = lambda network: network,
    ):
        self.objective, self.prepare, self.network, self.describe, self.place = objective, prepare, network, describe, place
        self.step = prepare(objective)
        self.optimizer, self.data, self.run, self.plan = optimizer, data, run, plan
        self.pruning = pruning or Pruning()
        self.report = EpochReport(run, data, n_epochs=plan.n_epochs)
        self.epoch, self.batch = 0, 0  # epochs and, in the current one, batches that are done
        self.sums = Sums(data.device)
        self.average = WeightAverage(network, plan.ema_decay) if plan.ema_decay is not None else None
        self.earlier = {"flops": 0, "epochs": 0}  # what networks took that were exchanged for others since
        self.best: dict[str, float] | None = None
        self.last: dict[str, float] | None = None
        self.classes: dict[str, Any] | None = None  # of the last epoch
        self._saved_at, self._lagging_epochs = time.monotonic(), 0

    def fit(self) -> dict[str, Any]:
        """Trains to the end and gives `{"last": ..., "best": ...}`, each with epoch, loss, top1, top5, `training_flops`,
        and `classes`, what the last network is right about class by class.

        A plan of no epoch scores and saves the network as it is. Raises Interrupted once the state is saved after a signal,
        NonFiniteLoss if training diverges.
        """
        with StopSignals() as signals:
            if not self.plan.n_epochs:
                return self._ship_untrained()
            while self.epoch < self.plan.n_epochs:
                self._train_epoch(signals)
                self._finish_epoch()
        flops = self.earlier["flops"] + self._flops(self.plan.n_epochs - self.earlier["epochs"])
        classes = {"classes": self.classes} if self.classes is not None else {}
        return {"last": self.last, "best": self.best, **classes, "training_flops": flops}

    def _ship_untrained(self) -> dict[str, Any]:
        """What `fit` gives of a training without a step; a later one that goes on from here begins at epoch 0."""
        with self._shipped() as kept:
            test, hits, confusion = evaluate_each(self.network, self.data, amp=self.plan.amp)
            metrics = {"epoch": -1, **{name: test[name] for name in ("loss", "top1", "top5")}}
            checkpoint = {**self._checkpoint(kept), "metrics": metrics}
        self.run.save(BEST, checkpoint)
        self.run.save_json(HITS, {"epoch": -1, **hits.document()})
        self.classes = class_document(confusion, self.data.dataset.classes)
        self._save_last(checkpoint)
        return {"last": metrics, "best": metrics, "classes": self.classes, "training_flops": 0}

    def _flops(self, epochs: int) -> int:
        """Of the steps of so many epochs of the network that is trained now."""
        return training_flops(self.objective, self.data.example[:1]) * self.data.train_images * epochs

    def _train_epoch(self, signals: StopSignals) -> None:
        self.objective.train()
        self._began, self._began_batch = time.monotonic(), self.batch
        batches = self.data.train_batches(self.epoch, start=self.batch)
        with self.report.progress_bar(self.epoch, done=self.batch) as bar:
            for batch in batches:
                self._train_step(batch)
                self.batch += 1
                bar.update()
                if self.batch % READ_INTERVAL_STEPS == 0:
                    self.sums.check_finite(epoch=self.epoch)
                    if not bar.disable and self.run.world.size == 1:  # reading speaks to the other processes
                        bar.set_postfix(loss=f"{self.sums.read()['loss']:.4f}")
                self._save_within_epoch(signals)
        self._check_finite()

    def _train_step(self, batch: Batch) -> None:
        lr = self.plan.learning_rate.at(self.epoch, self.batch, steps=self.data.train_steps)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.objective.begin_step(self.epoch, self.batch, steps=self.data.train_steps)
        loss, logits, terms = train_step(self.step, batch, optimizer=self.optimizer, amp=self.plan.amp)
        self.pruning.after_step()
        if self.average is not None:
            self.average.update()
        self.sums.add({"loss": loss, **terms}, logits, batch.labels, step=self.batch)

    def _save_within_epoch(self, signals: StopSignals) -> None:
        """Saves if `--checkpoint-minutes` have passed or a signal came; in step with all other processes."""
        if dist.is_initialized() and self.batch % VOTE_INTERVAL_STEPS and self.batch < self.data.train_steps:
            return
        minutes = self.plan.checkpoint_minutes
        due = minutes is not None and time.monotonic() - self._saved_at >= 60 * minutes
        stop = any_process(signals.received is not None)
        if stop or any_process(due):
            self._check_finite()
            self._save_last()
        if stop:
            number = signals.received or signal.SIGTERM
            name = signal.Signals(number).name
            where = f"epoch {self.epoch + 1}, step {self.batch} of {self.data.train_steps}"
            raise Interrupted(f"stopped by {name} after {where}; go on with: {self.run.resume_command()}", signal_number=number)

    def _check_finite(self) -> None:
        """Raises NonFiniteLoss before a state is saved that could only go on to it: a last step may have spoilt what is saved."""
        self.sums.check_finite(epoch=self.epoch)
        spoilt = first_non_finite({**dict(self.objective.named_parameters()), **dict(self.objective.named_buffers())})
        if spoilt is not None:
            where = f"after epoch {self.epoch + 1}, step {self.batch}"
            layer, _, tensor = spoilt.rpartition(".")
            layer = layer.partition(".")[2] or layer  # the objective calls the network its own
            raise NonFiniteLoss(f"the {tensor} of layer {layer} holds numbers that are not finite {where}; try a lower --lr")

    def _finish_epoch(self) -> None:
        train, seconds = self.sums.read(), time.monotonic() - self._began
        broadcast_from_main(self.network.buffers())
        if self.average is not None:
            broadcast_from_main(self.average.buffers(self.network))
        other = self.pruning.next_network(self.epoch)
        if other is not None:
            self._exchange(self.place(other))
        if self.average is not None:
            with self.average.swapped():  # which still has the weights that the network has just lost
                self.pruning.clear_pruned()
        self._check_finite()
        began = time.monotonic()
        with self._shipped() as kept:
            test, hits, confusion = evaluate_each(self.network, self.data, amp=self.plan.amp)
            test_seconds = time.monotonic() - began
            if not math.isfinite(test["loss"]):
                raise NonFiniteLoss(f"the test loss is no finite number after epoch {self.epoch + 1}; try a lower --lr")
            self.last = {"epoch": self.epoch, **{name: test[name] for name in ("loss", "top1", "top5")}}
            is_best = self._has_no_best() or self.last["top1"] > self.best["top1"]
            self.best = self.last if is_best else self.best
            checkpoint = self._checkpoint(kept)
        beside = self._score_other()
        self.report.epoch(
            self.epoch,
            {"train": train, "test": {**test, **beside}},
            lr=self.optimizer.param_groups[0]["lr"],
            seconds={"train": seconds, "test": test_seconds},
            skipped_steps=self._began_batch,
            best=self.best,
        )
        self._remark_on_lag(train["top1"], test["top1"])
        if is_best:
            self.run.save(BEST, checkpoint)
        if self.epoch + 1 == self.plan.n_epochs:
            self.run.save_json(HITS, {"epoch": self.epoch, **hits.document()})
            self.classes = class_document(confusion, self.data.dataset.classes)
        self.epoch, self.batch, self.sums = self.epoch + 1, 0, Sums(self.data.device)
        if self.epoch % self.plan.checkpoint_interval == 0 or self.epoch == self.plan.n_epochs:
            self._save_last(checkpoint)

    def _exchange(self, network: nn.Module) -> None:
        """Goes on with another network; what stays of the parameters keeps its momentum."""
        epochs = self.epoch + 1
        self.earlier = {"flops": self.earlier["flops"] + self._flops(epochs - self.earlier["epochs"]), "epochs": epochs}
        before, momentum = self.network, self.optimizer.state
        carried = {
            name: self.pruning.carried_over(name, momentum[parameter]["momentum_buffer"], before=before)
            for name, parameter in before.named_parameters()
            if momentum.get(parameter, {}).get("momentum_buffer") is not None
        }
        self.objective.exchange(network)
        self.network = network
        settings = {name: value for name, value in self.optimizer.param_groups[0].items() if name != "params"}
        self.optimizer = torch.optim.SGD(list(self.objective.parameters()), **settings)
        own = {parameter: name for name, parameter in network.named_parameters()}
        for parameter in self.optimizer.param_groups[0]["params"]:
            if own.get(parameter) in carried:
                self.optimizer.state[parameter]["momentum_buffer"] = carried[own[parameter]].contiguous(
                    memory_format=torch.channels_last if parameter.dim() == 4 else torch.contiguous_format
                )
            elif parameter in momentum:
                self.optimizer.state[parameter] = momentum[parameter]
        torch.compiler.reset()  # it gives up on code that it has compiled for too many networks
        self.step = self.prepare(self.objective)

    def _has_no_best(self) -> bool:
        """Whether the first epoch of its kind has ended: one before the network has its final form is no rival of those after."""
        return self.best is None or (self.pruning.is_finished(self.epoch) and not self.pruning.is_finished(self.best["epoch"]))

    def _score_other(self) -> dict[str, float]:
        """With an average: scores the network that is not shipped, `average_top1` or `trained_top1`, and saves it beside."""
        if self.average is None:
            return {}
        other = "trained" if self.plan.ships_average else "average"
        with self._shipped(average=other == "average") as kept:
            scores = evaluate(self.network, self.data, amp=self.plan.amp)
            values = {name: scores[name] for name in ("loss", "top1", "top5")}
            if (self.epoch + 1) % self.plan.checkpoint_interval == 0 or self.epoch + 1 == self.plan.n_epochs:
                metrics = {"epoch": self.epoch, **values}
                checkpoint = {**self.describe(self.network, kept), "epoch": self.epoch, "metrics": metrics}
                self.run.save(AVERAGE if other == "average" else TRAINED, checkpoint)
        return {f"{other}_{name}": value for name, value in values.items()}

    @contextlib.contextmanager
    def _shipped(self, *, average: bool | None = None) -> Iterator[Mapping[str, Tensor]]:
        """Within it the network is as it is evaluated and saved for others, batch norm statistics included.

        `average` says whether it is the averaged one; None takes the one that is to be shipped.
        """
        batches = self.plan.recalibrate_bn_batches
        averaged = self.average is not None and (self.plan.ships_average if average is None else average)
        with (
            self.pruning.shipped() as kept,
            self.average.swapped() if averaged else contextlib.nullcontext(),
            recalibrated_batch_norm(self.network, self.data, batches=batches, amp=self.plan.amp),
        ):
            yield kept

    def _checkpoint(self, kept: Mapping[str, Tensor]) -> dict[str, Any]:
        return {**self.describe(self.network, kept), "epoch": self.last["epoch"] if self.last else -1, "metrics": self.last or {}}

    def _remark_on_lag(self, train_top1: float, test_top1: float) -> None:
        """Says once what helps where the test stays at chance for two epochs while training rises."""
        classes = len(self.data.dataset.classes)
        lags = self.plan.recalibrate_bn_batches is None and lags_behind(
            self.network, train_top1=train_top1, test_top1=test_top1, num_classes=classes
        )
        self._lagging_epochs = self._lagging_epochs + 1 if lags else 0
        if self._lagging_epochs == LAGGING_EPOCHS:
            self.run.warn(
                f"test top1 stays at chance ({100 / classes:.1f}) while training rises: batch norm's running statistics lag "
                "behind the weights; --recalibrate-bn estimates them anew before each evaluation"
            )

    def _save_last(self, checkpoint: dict[str, Any] | None = None) -> None:
        if checkpoint is None:
            with self._shipped() as kept:
                checkpoint = self._checkpoint(kept)
        self.run.save(LAST, {**checkpoint, "resume": self.state_dict()})
        self._saved_at = time.monotonic()

    def state_dict(self) -> dict[str, Any]:
        """Everything that decides how training goes on."""
        return {
            "epoch": self.epoch,
            "batch": self.batch,
            "earlier": dict(self.earlier),
            "best": self.best,
            "last": self.last,
            "sums": _gather(self.sums.state_dict(), self.run.world),
            "objective": self.objective.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "hooks": self.pruning.state_dict(),
            "random": _gather(random_state(), self.run.world),
            **({"classes": self.classes} if self.classes is not None else {}),
            **({"average": self.average.state_dict()} if self.average is not None else {}),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from what `state_dict` gave, in this or another process. Raises UserError for the state of another training."""
        rank = self.run.world.rank
        try:
            self.epoch, self.batch, self.best, self.last = state["epoch"], state["batch"], state["best"], state["last"]
            self.earlier = state.get("earlier", self.earlier)  # states of older versions have none
            self.classes = state.get("classes")
            self.sums.load_state_dict(state["sums"][rank])
            self.objective.load_state_dict(state["objective"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.pruning.load_state_dict(state["hooks"])
            if self.average is not None:
                self.average.load_state_dict(state["average"])
            restore_random_state(state["random"][rank])
            if self.batch > self.data.train_steps:
                raise ValueError(f"it has done {self.batch} of the {self.data.train_steps} steps of an epoch")
        except (RuntimeError, LookupError, TypeError, ValueError, AttributeError, OverflowError) as error:
            reason = printable(str(error))
            raise UserError(f"--resume {self.run.folder}: its saved state does not fit this run: {reason}") from error


def _gather(value: Any, world: World) -> list[Any]:
    if world.size == 1:
        return [value]
    values: list[Any] = [None] * world.size
    dist.all_gather_object(values, value)
    return values
