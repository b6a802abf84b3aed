import copy

import pytest
import torch
import torch.nn.functional as F
from selections import prunable_layers
from torch import nn

from models import build_model
from models.graph.layers import PrunableLayer
from prune.gradients import importances, mean_gradients
from utils.errors import UserError


class PlainNetwork(nn.Module):
    """No batch norm and no dropout: the gradient is one number, however the images are batched."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.unused = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 5, 3), nn.Conv2d(3, 2, 1)
        self.classifier = nn.Linear(5, 5)

    def forward(self, x):
        return self.classifier(self.second(self.first(x).tanh()).mean((2, 3)))


class NoisyNetwork(nn.Module):
    """Everything that leaves traces: batch norm, dropout, a frozen layer, an eval-mode part."""

    def __init__(self):
        super().__init__()
        self.conv, self.bn, self.dropout = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout()
        self.frozen, self.frozen_bn = nn.Conv2d(4, 5, 3), nn.BatchNorm2d(5)
        self.classifier = nn.Linear(5, 5)

    def forward(self, x):
        x = self.dropout(self.bn(self.conv(x)).relu())
        return self.classifier(self.frozen_bn(self.frozen(x)).mean((2, 3)))


def batches_of(*sizes, classes=5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [(torch.randn(n, 3, 8, 8, generator=generator), torch.randint(classes, (n,), generator=generator)) for n in sizes]


def test_the_mean_is_over_images_not_over_batches():
    torch.manual_seed(0)
    model, batches = PlainNetwork(), batches_of(7, 2, 1)
    layers = prunable_layers(model)
    images, labels = (torch.cat(parts) for parts in zip(*batches, strict=True))
    F.cross_entropy(model(images), labels).backward()
    gradients = mean_gradients(model, batches, layers=layers)
    assert list(gradients) == ["first", "second", "unused"]
    torch.testing.assert_close(gradients["first"], model.first.weight.grad)
    torch.testing.assert_close(gradients["second"], model.second.weight.grad)
    assert gradients["unused"].eq(0).all()


def test_it_is_the_gradient_of_training_mode():
    torch.manual_seed(0)
    model = build_model("resnet20", num_classes=5).eval()
    twin = copy.deepcopy(model).train()
    [(images, labels)] = batches = batches_of(4)
    F.cross_entropy(twin(images), labels).backward()
    gradients = mean_gradients(model, batches, layers=prunable_layers(model))
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, twin.get_submodule(name).weight.grad)


def evaluated_twin(model):
    """Statistics that are not those of a batch, and a copy whose maps behind batch norm can be looked at."""
    for _ in range(3):
        model.train()(torch.randn(8, 3, 8, 8))
    return copy.deepcopy(model).eval()


def test_the_importance_of_gates_is_what_the_maps_and_their_gradients_say_batch_by_batch():
    """With a the map behind batch norm: the square of the sum over images and positions of `a dL/da`, summed over batches."""
    torch.manual_seed(0)
    model = build_model("resnet20", num_classes=5)
    twin, batches = evaluated_twin(model), batches_of(4, 2)
    layers, maps = prunable_layers(twin), {}
    for layer in layers:
        layer.norm.register_forward_hook(lambda norm, given, out, name=layer.name: maps.update({name: out}))
    expected = {layer.name: torch.zeros(layer.filters) for layer in layers}
    for images, labels in batches:
        loss = F.cross_entropy(twin(images), labels)
        for name, gradient in zip(maps, torch.autograd.grad(loss, list(maps.values())), strict=True):
            expected[name] += (maps[name] * gradient).sum((0, 2, 3)).square().detach()
    found = importances(model, batches, layers=prunable_layers(model), of="gates")
    assert found.keys() == expected.keys()
    for name in found:
        torch.testing.assert_close(found[name].float(), expected[name], rtol=1e-3, atol=1e-10)


def test_the_importance_of_weights_is_squared_weight_by_weight_and_batch_by_batch():
    torch.manual_seed(0)
    model = PlainNetwork()
    batches = batches_of(5, 3)
    expected = torch.zeros(4)
    for images, labels in batches:
        [gradient] = torch.autograd.grad(F.cross_entropy(model(images), labels), [model.first.weight])
        expected += (model.first.weight * gradient).square().sum((1, 2, 3)).detach()
    found = importances(model, batches, layers=prunable_layers(model), of="weights")
    torch.testing.assert_close(found["first"].float(), expected)
    assert found["unused"].eq(0).all()


def test_a_gate_is_at_the_layer_itself_where_no_norm_reads_it():
    """A linear output `w x`: the gate's gradient is `sum over images of dL/d(wx) * wx`, by hand for two filters of one weight."""
    model = nn.Sequential(nn.Conv2d(1, 2, 1, bias=False), nn.Conv2d(2, 1, 1, bias=False))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([2.0, -3.0]).view(2, 1, 1, 1))
        model[1].weight.copy_(torch.tensor([5.0, 1.0]).view(1, 2, 1, 1))
    layers = [PrunableLayer("0", model[0])]
    batches = [
        (torch.tensor([1.0, 3.0]).view(2, 1, 1, 1), torch.zeros(2)),
        (torch.tensor([2.0]).view(1, 1, 1, 1), torch.zeros(1)),
    ]
    found = importances(model, batches, layers=layers, of="gates", loss=lambda outputs, labels: outputs.mean())
    # batch means of x are 2 and 2: the gates' gradients are 5 * 2 * 2 = 20 and 1 * -3 * 2 = -6 in both
    assert found["0"].tolist() == [800.0, 72.0]


def test_gates_leave_no_trace():
    model = NoisyNetwork()
    before = copy.deepcopy(model.state_dict())
    importances(model, batches_of(4), layers=prunable_layers(model), of="gates")
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(module._forward_hooks for module in model.modules()) and model.training
    with pytest.raises(UserError, match="not one training batch"):
        importances(model, [], layers=prunable_layers(model), of="gates")


def test_it_leaves_no_trace():
    torch.manual_seed(0)
    model = NoisyNetwork().train()
    model.frozen.requires_grad_(False)
    model.frozen_bn.eval()
    model.conv.weight.grad = torch.full_like(model.conv.weight, 2.0)
    state, random_state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    mean_gradients(model, batches_of(4, 3), layers=prunable_layers(model))
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random_state)
    assert model.conv.weight.grad.eq(2).all()
    assert [name for name, parameter in model.named_parameters() if parameter.grad is not None] == ["conv.weight"]
    assert [name for name, module in model.named_modules() if not module.training] == ["frozen_bn"]
    frozen = [name for name, parameter in model.named_parameters() if not parameter.requires_grad]
    assert frozen == ["frozen.weight", "frozen.bias"]


def test_a_failing_batch_leaves_no_trace_either():
    torch.manual_seed(0)
    model = NoisyNetwork().eval()
    state = copy.deepcopy(model.state_dict())

    def failing():
        yield from batches_of(4)
        raise OSError("unreadable image")

    with pytest.raises(OSError, match="unreadable"):
        mean_gradients(model, failing(), layers=prunable_layers(model))
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert not any(module.training for module in model.modules())


def test_random_layers_draw_from_a_copy_of_the_stream():
    torch.manual_seed(0)
    model, batches = NoisyNetwork(), batches_of(4)
    layers = prunable_layers(model)
    torch.manual_seed(1)
    first, again = (mean_gradients(model, batches, layers=layers)["conv"] for _ in range(2))
    torch.manual_seed(2)
    other = mean_gradients(model, batches, layers=layers)["conv"]
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_only_the_asked_layers_and_the_given_loss():
    torch.manual_seed(0)
    model, batches = PlainNetwork(), batches_of(3, 2)
    layers = [layer for layer in prunable_layers(model) if layer.name == "second"]
    plain = mean_gradients(model, batches, layers=layers)
    doubled = mean_gradients(model, batches, layers=layers, loss=lambda logits, labels: 2 * F.cross_entropy(logits, labels))
    assert list(plain) == ["second"]
    torch.testing.assert_close(doubled["second"], 2 * plain["second"])


def test_it_works_where_the_caller_has_switched_gradients_off():
    torch.manual_seed(0)
    model, batches = PlainNetwork(), batches_of(3)
    expected = mean_gradients(model, batches, layers=prunable_layers(model))
    with torch.no_grad():
        gradients = mean_gradients(model, batches, layers=prunable_layers(model))
    assert torch.equal(gradients["first"], expected["first"])


def test_processes_add_up_to_the_mean_over_all_images():
    torch.manual_seed(0)
    model, mine, others = PlainNetwork(), batches_of(5, 2), batches_of(1, seed=1)
    layers = prunable_layers(model)
    theirs = mean_gradients(model, others, layers=layers)
    received = [*(theirs[layer.name] * 1 for layer in layers), torch.tensor(1)]

    def all_reduce(tensor):
        tensor += received.pop(0)

    reduced = mean_gradients(model, mine, layers=layers, all_reduce=all_reduce)
    expected = mean_gradients(model, mine + others, layers=layers)
    torch.testing.assert_close(reduced, expected)


def test_no_batches_are_refused():
    model = PlainNetwork()
    with pytest.raises(UserError, match="samp_batches"):
        mean_gradients(model, [], layers=prunable_layers(model))


def test_a_gradient_that_is_not_finite_is_named():
    model = PlainNetwork()
    with torch.no_grad():
        model.first.weight[0] = float("inf")
    with pytest.raises(UserError, match="the gradient of first is NaN or infinite"):
        mean_gradients(model, batches_of(2), layers=prunable_layers(model))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_it_leaves_the_cuda_stream_as_it_was():
    model = NoisyNetwork().cuda()
    before = torch.cuda.get_rng_state()
    mean_gradients(model, [(images.cuda(), labels.cuda()) for images, labels in batches_of(4)], layers=prunable_layers(model))
    assert torch.equal(torch.cuda.get_rng_state(), before)
