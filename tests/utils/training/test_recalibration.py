"""Batch norm statistics estimated anew: their values, and that nothing else changes."""

import copy

import pytest
import torch
from torch import nn

from models.batch_norm import quicken_batch_norms
from utils.checkpoints import load_checkpoint
from utils.errors import UserError
from utils.images.batches import ImageData
from utils.images.dataset import Dataset, SmallImages
from utils.runs.folder import BEST, LAST
from utils.runs.metrics_file import read_metrics
from utils.runs.run import Run
from utils.seed import random_state
from utils.training.evaluation import evaluate
from utils.training.learning_rate import LearningRate
from utils.training.objective import CrossEntropyObjective
from utils.training.recalibration import check_recalibration, recalibrated_batch_norm
from utils.training.step import sgd
from utils.training.trainer import Trainer, TrainingPlan
from utils.world import World

CPU = torch.device("cpu")


def noise(*, train=24, batch_size=8) -> ImageData:
    stream = torch.Generator().manual_seed(0)
    train, test = (
        SmallImages(torch.randint(256, (count, 3, 8, 8), generator=stream, dtype=torch.uint8), torch.arange(count) % 4)
        for count in (train, 8)
    )
    dataset = Dataset("noise", tuple("abcd"), train, test, (0.5,) * 3, (0.3,) * 3)
    return ImageData(dataset, batch_size=batch_size, seed=1, device=CPU)


def network(channels=10) -> nn.Module:
    torch.manual_seed(0)
    first, second = nn.Conv2d(3, channels, 3, padding=1), nn.Conv2d(channels, 4, 3, padding=1)
    norms = nn.BatchNorm2d(channels), nn.BatchNorm2d(4)
    layers = (first, norms[0], nn.ReLU(), nn.Dropout(0.5), second, norms[1], nn.AdaptiveAvgPool2d(1), nn.Flatten())
    return nn.Sequential(*layers).to(memory_format=torch.channels_last)


@pytest.mark.parametrize(("batches", "used"), [(1, 1), (2, 2), (99, 3)])
def test_statistics_are_the_means_of_those_of_the_batches(batches, used):
    data, net = noise(), network()
    images = [batch.images for batch in data.train_batches("batch norm")][:used]
    first, norm = net[0].double(), net[1]
    maps = [first(batch.double()).detach() for batch in images]
    first.float()
    with recalibrated_batch_norm(net, data, batches=batches):
        mean = torch.stack([x.mean((0, 2, 3)) for x in maps]).mean(0)
        variance = torch.stack([x.var((0, 2, 3)) for x in maps]).mean(0)
        torch.testing.assert_close(norm.running_mean, mean.float())
        torch.testing.assert_close(norm.running_var, variance.float())
        assert norm.num_batches_tracked == used


def test_a_batch_norm_behind_another_sees_what_the_recalibrated_one_gives():
    # With one batch the statistics of evaluation are those of the batch: both modes then compute the same, but for n / (n - 1).
    data, net = noise(), network()
    net[3].p = 0.0
    images = next(data.train_batches("batch norm")).images
    expected = copy.deepcopy(net).train()(images)
    with recalibrated_batch_norm(net, data, batches=1), torch.no_grad():
        torch.testing.assert_close(net.eval()(images), expected, rtol=1e-2, atol=1e-2)


def test_narrow_batch_norms_are_recalibrated_alike():
    plain, quick = network(), network()
    quicken_batch_norms(quick)
    with recalibrated_batch_norm(plain, noise(), batches=2), recalibrated_batch_norm(quick, noise(), batches=2):
        torch.testing.assert_close(quick.state_dict(), plain.state_dict())


@pytest.mark.parametrize("fails", [False, True])
def test_leaves_no_trace(fails):
    net = network().train()
    net[1].momentum = 0.25
    net[4].requires_grad_(False)
    net[5].eval()
    before, stream = copy.deepcopy(net.state_dict()), random_state()["torch"]
    modes = [module.training for module in net.modules()]
    try:
        with recalibrated_batch_norm(net, noise(), batches=2):
            assert not torch.equal(net[1].running_mean, before["1.running_mean"])
            if fails:
                raise KeyError
    except KeyError:
        pass
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert [module.training for module in net.modules()] == modes
    assert (net[1].momentum, net[5].momentum) == (0.25, 0.1)
    assert torch.equal(random_state()["torch"], stream)
    assert all(parameter.grad is None for parameter in net.parameters())


def test_without_a_number_of_batches_nothing_happens():
    net = network()
    before = copy.deepcopy(net.state_dict())
    with recalibrated_batch_norm(net, noise(), batches=None):
        assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


def test_a_network_without_running_statistics_is_refused():
    check_recalibration(nn.Conv2d(3, 4, 1), None)
    check_recalibration(network(), 5)
    for net in (nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4, track_running_stats=False)):
        with pytest.raises(UserError, match="batches 5: this network has no batch norm with running statistics"):
            check_recalibration(net, 5)


def train(folder, name, **plan):
    run = Run.create(folder, name=name, log_name="log.txt", config={}, world=World())
    net = network()
    objective = CrossEntropyObjective(net)
    trainer = Trainer(
        objective,
        prepare=lambda objective: objective,
        network=net,
        describe=lambda net, kept: {"state_dict": {name: value.clone() for name, value in net.state_dict().items()}},
        optimizer=sgd(net.parameters(), lr=0.1, momentum=0.9, weight_decay=0),
        data=noise(),
        run=run,
        plan=TrainingPlan(LearningRate(0.1, n_epochs=2), **plan),
    )
    trainer.fit()
    return run.folder, net


def test_training_is_the_same_and_what_is_scored_and_saved_is_recalibrated(tmp_path):
    (plain, expected), (recalibrated, found) = train(tmp_path, "a"), train(tmp_path, "b", recalibrate_bn_batches=2)
    assert all(torch.equal(value, expected.state_dict()[name]) for name, value in found.state_dict().items())
    losses = [[line["loss"] for line in read_metrics(folder)] for folder in (plain, recalibrated)]
    assert losses[0][::2] == losses[1][::2] and losses[0][1] != losses[1][1] and losses[0][3] != losses[1][3]
    for name in (BEST, LAST):
        checkpoint = load_checkpoint(recalibrated / name)
        saved = network()
        saved.load_state_dict(checkpoint["state_dict"])
        assert evaluate(saved, noise())["loss"] == checkpoint["metrics"]["loss"]
    assert torch.equal(
        load_checkpoint(recalibrated / LAST)["resume"]["objective"]["network.1.running_mean"], found[1].running_mean
    )
