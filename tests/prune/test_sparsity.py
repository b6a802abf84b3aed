"""Penalties that make channels small: their gradients by hand, and what a training with one leaves."""

import torch
from torch import nn

from prune.settings import Sparsity
from prune.sparsity import SparseObjective
from utils.training.objective import CrossEntropyObjective

IMAGES, LABELS = torch.zeros(2, 1, 2, 2), torch.tensor([0, 1])


def network() -> nn.Sequential:
    torch.manual_seed(0)
    layers = (nn.Conv2d(1, 3, 1, bias=False), nn.BatchNorm2d(3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    return nn.Sequential(*layers, nn.Linear(3, 2))


def penalised(model: nn.Module, kind: str, strength: float) -> SparseObjective:
    objective = SparseObjective(CrossEntropyObjective(model), model, Sparsity(kind, strength), example=IMAGES)
    objective.begin_step(0, 0, steps=1)
    return objective


def gradient_of_penalty(model: nn.Module, objective: SparseObjective) -> None:
    loss, _, terms = objective(IMAGES, LABELS)
    (loss - CrossEntropyObjective(model)(IMAGES, LABELS)[0]).backward()
    assert terms.keys() == {"ce", "sparsity"}


def test_scales_of_batch_norms_are_pulled_by_their_signs():
    model = network()
    model[1].weight.data = torch.tensor([0.5, -2.0, 1.0])
    gradient_of_penalty(model, penalised(model, "bn", 0.1))
    torch.testing.assert_close(model[1].weight.grad, torch.tensor([0.1, -0.1, 0.1]))


def test_the_smallest_group_is_pulled_sixteen_times_as_much_as_the_largest():
    model = network()
    model[0].weight.data = torch.tensor([1.0, 2.0, 3.0]).view(3, 1, 1, 1)
    model[1].weight.data = torch.zeros(3)
    model[5].weight.data = torch.zeros(2, 3)
    objective = penalised(model, "group", 0.1)  # squares 1, 4 and 9: exponents 4, 2.5 and 0
    gradient_of_penalty(model, objective)
    expected = 0.1 * torch.tensor([16.0, 2**2.5, 1.0]) * torch.tensor([1.0, 2.0, 3.0])
    torch.testing.assert_close(model[0].weight.grad.flatten(), expected)
    assert torch.equal(objective.state_dict()["penalty.weights"], objective.penalty.weights)


def test_equal_groups_are_pulled_alike():
    model = network()
    for parameter in model.parameters():
        parameter.data.fill_(1.0)
    assert penalised(model, "group", 1.0).penalty.weights.tolist() == [1, 1, 1]
