"""The training loop: learning rates, what is recorded and saved, where it stops."""

import copy
import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from utils.checkpoints import load_checkpoint
from utils.errors import NonFiniteLoss, UserError
from utils.images.batches import Batch, ImageData
from utils.images.dataset import Dataset, SmallImages
from utils.runs.folder import BEST, LAST
from utils.runs.metrics_file import read_metrics
from utils.runs.run import Run
from utils.training.evaluation import evaluate
from utils.training.learning_rate import LearningRate
from utils.training.objective import CrossEntropyObjective
from utils.training.pruning import Pruning
from utils.training.reporting import EpochReport, gain_lines
from utils.training.step import sgd, train_step
from utils.training.trainer import Trainer, TrainingPlan
from utils.world import World

CPU = torch.device("cpu")
CLASSES = 3


def tiny_data(*, train: int = 10, test: int = 6, batch_size: int = 4) -> ImageData:
    random = torch.Generator().manual_seed(0)
    splits = [
        SmallImages(torch.randint(256, (count, 3, 4, 4), generator=random, dtype=torch.uint8), torch.arange(count) % CLASSES)
        for count in (train, test)
    ]
    dataset = Dataset("tiny", tuple("abc"), *splits, (0.5,) * 3, (0.3,) * 3)
    return ImageData(dataset, batch_size=batch_size, seed=1, device=CPU)


def tiny_network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(48, CLASSES))


def trainer(run: Run, objective: nn.Module, *, pruning: Pruning | None = None, **plan) -> Trainer:
    rate = {name: plan.pop(name) for name in ("lr", "n_epochs", "kind", "schedule", "lr_drops", "warmup_epochs") if name in plan}
    plan = TrainingPlan(LearningRate(**{"lr": 0.1, "n_epochs": 2, **rate}), **plan)
    return Trainer(
        objective,
        prepare=lambda objective: objective,
        network=objective.network,
        describe=lambda network, kept: {"state_dict": {name: value.clone() for name, value in network.state_dict().items()}},
        optimizer=sgd(objective.parameters(), lr=plan.learning_rate.lr, momentum=0.9, weight_decay=1e-3),
        data=tiny_data(),
        run=run,
        plan=plan,
        pruning=pruning,
    )


@pytest.fixture
def run(tmp_path) -> Run:
    return Run.create(tmp_path, name="run", log_name="log.txt", config={}, world=World())


class TestFit:
    def test_is_plain_sgd(self, run):
        """The same steps written out: Nesterov momentum, weight decay, the learning rate of each epoch."""
        network, data = tiny_network(), tiny_data()
        weights = [parameter.detach().clone() for parameter in network.parameters()]
        velocities = [torch.zeros_like(weight) for weight in weights]
        for epoch, lr in ((0, 0.1), (1, 0.05)):
            for batch in data.train_batches(epoch):
                for weight in weights:
                    weight.requires_grad_(True)
                loss = F.cross_entropy(F.linear(batch.images.flatten(1), *weights), batch.labels)
                gradients = torch.autograd.grad(loss, weights)
                for index, gradient in enumerate(gradients):
                    gradient = gradient + 1e-3 * weights[index].detach()
                    velocities[index] = 0.9 * velocities[index] + gradient
                    weights[index] = weights[index].detach() - lr * (gradient + 0.9 * velocities[index])
        trainer(run, CrossEntropyObjective(network), schedule=(1,), lr_drops=(0.5,)).fit()
        for parameter, weight in zip(network.parameters(), weights, strict=True):
            torch.testing.assert_close(parameter.detach(), weight)

    def test_records_a_line_an_epoch_and_split(self, run):
        result = trainer(run, CrossEntropyObjective(tiny_network()), n_epochs=3, schedule=(2,), lr_drops=(0.1,)).fit()
        lines = read_metrics(run.folder)
        assert [(line["epoch"], line["split"]) for line in lines] == [(e, s) for e in range(3) for s in ("train", "test")]
        assert [line["lr"] for line in lines[::2]] == pytest.approx([0.1, 0.1, 0.01])
        fields = {"epoch", "split", "loss", "top1", "top5", "lr", "seconds", "images_per_second"}
        assert all(line.keys() == fields for line in lines)
        assert result["last"]["top1"] == lines[-1]["top1"]
        assert result["best"]["top1"] == max(line["top1"] for line in lines[1::2])

    def test_keeps_the_first_of_equally_good_epochs(self, run):
        result = trainer(run, CrossEntropyObjective(tiny_network()), n_epochs=2, lr=1e-12).fit()
        assert (result["best"]["epoch"], result["last"]["epoch"]) == (0, 1)
        assert load_checkpoint(run.folder / BEST)["epoch"] == 0

    @pytest.mark.parametrize(("interval", "saved"), [(1, [1, 2, 3]), (2, [2, 3]), (5, [3])])
    def test_saves_every_interval_and_at_the_end(self, interval, saved, run, monkeypatch):
        states = []
        save = run.save
        monkeypatch.setattr(run, "save", lambda name, state: (save(name, state), states.append((name, state))))
        trainer(run, CrossEntropyObjective(tiny_network()), n_epochs=3, checkpoint_interval=interval).fit()
        assert [state["resume"]["epoch"] for name, state in states if name == LAST] == saved

    def test_saves_within_epochs_after_so_many_minutes(self, run, monkeypatch):
        states = []
        monkeypatch.setattr(run, "save", lambda name, state: states.append(state["resume"]) if name == LAST else None)
        trainer(run, CrossEntropyObjective(tiny_network()), n_epochs=1, checkpoint_minutes=0).fit()
        assert [(state["epoch"], state["batch"]) for state in states] == [(0, 1), (0, 2), (0, 3), (1, 0)]

    @pytest.mark.parametrize("rate", [{}, {"kind": "linear", "warmup_epochs": 1}], ids=["steps", "linear"])
    def test_can_go_on_from_every_saved_state(self, run, tmp_path, monkeypatch, rate):
        states = []

        def keep(name: str, checkpoint: dict) -> None:
            if name == LAST:
                states.append(copy.deepcopy(checkpoint["resume"]))

        monkeypatch.setattr(run, "save", keep)
        whole = CrossEntropyObjective(tiny_network())
        trainer(run, whole, checkpoint_minutes=0, **rate).fit()
        expected = [parameter.detach().clone() for parameter in whole.parameters()]
        for number, state in enumerate(states):
            other = Run.create(tmp_path, name=str(number), log_name="log.txt", config={}, world=World())
            resumed = CrossEntropyObjective(tiny_network())
            second = trainer(other, resumed, **rate)
            second.load_state_dict(state)
            second.fit()
            assert all(torch.equal(p, e) for p, e in zip(resumed.parameters(), expected, strict=True))

    def test_calls_hooks_in_their_order(self, run):
        calls = []

        class Noting(Pruning):
            def after_step(self) -> None:
                calls.append("step")

            def next_network(self, epoch: int) -> None:
                calls.append(f"epoch {epoch}")

        trainer(run, CrossEntropyObjective(tiny_network()), pruning=Noting()).fit()
        assert calls == ["step", "step", "step", "epoch 0", "step", "step", "step", "epoch 1"]

    def test_smooths_labels_where_it_is_told_to(self):
        logits, labels = torch.tensor([[2.0, 0.0, -1.0]]), torch.tensor([0])
        network = nn.Linear(1, 3)
        with torch.no_grad():
            network.weight.zero_()
            network.bias.copy_(logits[0])
        logarithms = logits.log_softmax(1)[0]
        expected = -0.7 * logarithms[0] - 0.3 * logarithms.mean()  # three tenths of the target go to all classes alike
        loss, _, _ = CrossEntropyObjective(network, label_smoothing=0.3)(torch.zeros(1, 1), labels)
        torch.testing.assert_close(loss, expected)

    def test_tells_how_it_is(self, run, tmp_path):
        trainer(run, CrossEntropyObjective(tiny_network())).fit()
        lines = [line.partition(" run ")[2] for line in (tmp_path / "log.txt").read_text().splitlines()]
        assert [line.split() for line in lines[:2]] == [
            ["test", "test"],
            ["epoch", "lr", "loss", "top1", "CE", "top1", "best", "img/s", "s", "left"],
        ]
        assert [line.split()[0] for line in lines[2:]] == ["1/2", "2/2"] and lines[2].endswith("0:00:00")
        assert len({len(line) for line in lines[1:]}) == 1 and len(lines[1]) <= 80

    def test_keeps_a_line_of_every_figure_within_80_characters(self, run, tmp_path):
        values = {"loss": 123.456, "top1": 100.0, "top5": 100.0, "images": 10}
        data = tiny_data()
        report = EpochReport(run, data, n_epochs=200)
        object.__setattr__(data.dataset, "classes", tuple("abcdef"))
        scores = {"train": {**values, "ce": 1.25, "hint": 3.0}, "test": {**values, "average_top1": 99.5}}
        report.epoch(99, scores, lr=1.25e-5, seconds={"train": 100.0, "test": 1.0}, skipped_steps=0, best={"top1": 100.0})
        lines = [line.partition(" run ")[2] for line in (tmp_path / "log.txt").read_text().splitlines()]
        assert lines[1].split() == ["epoch", "lr", "loss", "CE", "top1", "CE", "top1", "top1", "best", "s", "left"]
        assert len(lines[2]) == len(lines[1]) <= 80


def test_says_why_a_smaller_network_is_not_faster():
    def network(ms: float, macs: int) -> dict:
        return {"file_bytes": macs, "macs": macs, "latency": {"1": {"median_ms": ms}}}

    lines = gain_lines({"dense": network(3.0, 400), "compact": network(4.0, 200)}, relayouts=9)
    assert lines[0] == "times smaller: 2.00 (MACs 2.00); times faster: 0.75 at batch 1"
    assert "0.50 of the MACs, but 0.75 of the speed at batch 1: 9 steps" in lines[1] and "--couple-channels" in lines[1]
    assert len(gain_lines({"dense": network(3.0, 400), "compact": network(2.0, 200)}, relayouts=9)) == 1


class Spoiling(CrossEntropyObjective):
    """Cross-entropy that `spoil` may change, given the loss and the number of the step."""

    def __init__(self, network: nn.Module, spoil: Callable[[torch.Tensor, int], torch.Tensor]):
        super().__init__(network)
        self.spoil, self.step = spoil, 0

    def forward(self, images, labels, indices=None):
        loss, logits, terms = super().forward(images, labels)
        loss, self.step = self.spoil(loss, self.step), self.step + 1
        return loss, logits, terms


class InfiniteGradient(torch.autograd.Function):
    """The identity, whose gradient is infinite: a loss that is finite, and the weights after it are not."""

    @staticmethod
    def forward(context, loss):
        return loss.clone()

    @staticmethod
    def backward(context, gradient):
        return gradient * math.inf


class TestDiverging:
    """Three steps an epoch; the state of the last good epoch stays."""

    @pytest.mark.parametrize("value", [math.nan, math.inf])
    def test_loss_stops_the_run_and_names_the_step(self, value, run):
        objective = Spoiling(tiny_network(), lambda loss, step: loss * value if step == 4 else loss)
        with pytest.raises(NonFiniteLoss, match="epoch 2, step 2; try a lower --lr"):
            trainer(run, objective).fit()
        self.check_last_good_state(run)

    def test_last_step_of_an_epoch_that_spoils_the_weights(self, run):
        objective = Spoiling(tiny_network(), lambda loss, step: InfiniteGradient.apply(loss) if step == 5 else loss)
        with pytest.raises(NonFiniteLoss, match="the weight of layer 1 holds numbers that are not finite after epoch 2, step 3"):
            trainer(run, objective).fit()
        self.check_last_good_state(run)

    @pytest.mark.parametrize("value", [math.nan, math.inf])
    @pytest.mark.parametrize("minutes", [None, 0.0])
    def test_batch_norm_statistics_that_are_spoilt(self, value, minutes, run):
        network = nn.Sequential(tiny_network(), nn.BatchNorm1d(3))

        def spoil(loss: torch.Tensor, step: int) -> torch.Tensor:
            if step == 5:
                network[1].running_var.data.fill_(value)  # the loss of a step does not look at it, and x / inf is finite
            return loss

        with pytest.raises(
            NonFiniteLoss, match="the running_var of layer 1 holds numbers that are not finite after epoch 2, step 3"
        ):
            trainer(run, Spoiling(network, spoil), checkpoint_minutes=minutes).fit()
        state = load_checkpoint(run.folder / LAST)["resume"]["objective"]
        assert all(value.isfinite().all() for value in state.values())

    def test_step_before_a_save_that_spoils_the_weights(self, run):
        objective = Spoiling(tiny_network(), lambda loss, step: InfiniteGradient.apply(loss) if step == 4 else loss)
        with pytest.raises(NonFiniteLoss, match="after epoch 2, step 2"):
            trainer(run, objective, checkpoint_minutes=0).fit()
        assert all(value.isfinite().all() for value in load_checkpoint(run.folder / LAST)["state_dict"].values())

    def test_weights_so_large_that_only_the_test_loss_overflows(self, run):
        def explode(loss: torch.Tensor, step: int) -> torch.Tensor:
            return loss if step < 5 else loss + 1.5e38 * sum(parameter.sum() for parameter in objective.parameters())

        objective = Spoiling(tiny_network(), explode)
        with pytest.raises(NonFiniteLoss, match="the test loss is no finite number after epoch 2"):
            trainer(run, objective, lr=1.0).fit()
        self.check_last_good_state(run)

    def check_last_good_state(self, run: Run) -> None:
        state = load_checkpoint(run.folder / LAST)
        assert state["resume"]["epoch"] == 1
        assert all(value.isfinite().all() for value in state["state_dict"].values())
        assert [line["epoch"] for line in read_metrics(run.folder)] == [0, 0]


class TestStateOfAnotherTraining:
    @pytest.mark.parametrize(
        "change",
        [
            lambda state: state["objective"].pop("network.1.bias"),
            lambda state: state["objective"].update({"network.1.bias": torch.zeros(9)}),
            lambda state: state.update(optimizer={}),
            lambda state: state.update(random=[]),
            lambda state: state.update(sums=0),
            lambda state: state.update(sums=[{"loss": 0.5, "first_bad_step": "never"}]),
            lambda state: state.update(objective=dict.fromkeys(state["objective"])),
            lambda state: state.update(objective={1: torch.zeros(3)}),
            lambda state: state.update(optimizer={"state": 7, "param_groups": 7}),
            lambda state: state.update(optimizer={"state": {}, "param_groups": [None]}),
            lambda state: state["random"][0].update(torch=None),
            lambda state: state["random"][0].update(python=[3, [10**30], None]),
            lambda state: state["random"][0].update(numpy=["MT19937", [1], 0, 0, 0.0]),
        ],
    )
    def test_is_refused(self, change, run):
        state = trainer(run, CrossEntropyObjective(tiny_network())).state_dict()
        change(state)
        with pytest.raises(UserError, match=r"--resume .*/run: its saved state does not fit this run"):
            trainer(run, CrossEntropyObjective(tiny_network())).load_state_dict(state)


class TestEvaluate:
    def test_is_over_all_images_and_keeps_the_mode(self):
        network, data = tiny_network().train(), tiny_data(test=6, batch_size=4)
        result = evaluate(network, data)
        images = torch.cat([batch.images for batch in data.test_batches()])
        logits, labels = network(images).detach(), data.dataset.test.labels
        assert result["loss"] == pytest.approx(float(F.cross_entropy(logits, labels)), rel=1e-6)
        assert result["top1"] == pytest.approx(100 * float((logits.argmax(1) == labels).float().mean()))
        assert (result["top5"], result["images"]) == (100, 6)
        assert network.training

    def test_uses_running_statistics_and_leaves_them(self):
        network = nn.Sequential(nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(48, CLASSES))
        before = {name: value.clone() for name, value in network.state_dict().items()}
        evaluate(network, tiny_data())
        assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())


def test_momentum_is_nesterovs_unless_there_is_none():
    parameters = [nn.Parameter(torch.zeros(2))]
    assert sgd(parameters, lr=0.1, momentum=0.9, weight_decay=0).defaults["nesterov"]
    assert not sgd(parameters, lr=0.1, momentum=0, weight_decay=0).defaults["nesterov"]


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_a_parameter_may_have_its_first_gradient_later_than_others(momentum):
    torch.manual_seed(0)
    parameters, plain = ([nn.Parameter(torch.ones(3)) for _ in range(2)] for _ in range(2))
    optimizer = sgd(parameters, lr=0.1, momentum=momentum, weight_decay=1e-4)
    reference = torch.optim.SGD(plain, lr=0.1, momentum=momentum, weight_decay=1e-4, nesterov=momentum > 0, foreach=False)
    for step in range(3):
        batch = Batch(torch.randn(2, 3), torch.zeros(2), 1)

        def loss_of(first, second, images, is_late=step > 0):
            loss = (images * first).square().sum() + ((images * second).sum() if is_late else 0)
            return loss, images, {}

        reference.zero_grad()
        loss_of(*plain, batch.images)[0].backward()
        reference.step()
        train_step(lambda images, *_, loss_of=loss_of: loss_of(*parameters, images), batch, optimizer=optimizer)
    for own, expected in zip(parameters, plain, strict=True):
        torch.testing.assert_close(own, expected)


def test_metrics_are_json_that_everyone_reads(run):
    trainer(run, CrossEntropyObjective(tiny_network())).fit()
    for line in Path(run.folder / "metrics.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
