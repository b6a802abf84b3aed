import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from models import build_model
from prune.criteria import CRITERIA
from prune.gradients import mean_gradients
from prune.masks import prunable_layers
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


def test_without_training_it_is_the_gradient_of_the_network_as_it_is_evaluated():
    torch.manual_seed(0)
    model = build_model("resnet20", num_classes=5).train()
    for _ in range(3):  # statistics that are not those of the batch
        model(torch.randn(8, 3, 8, 8))
    twin, batches = copy.deepcopy(model).eval(), batches_of(4, 2)
    images, labels = (torch.cat(parts) for parts in zip(*batches, strict=True))
    F.cross_entropy(twin(images), labels).backward()
    gradients = mean_gradients(model, batches, layers=prunable_layers(model), training=False)
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, twin.get_submodule(name).weight.grad, rtol=1e-4, atol=1e-6)


def test_a_scale_of_a_filter_is_seen_in_evaluation_alone():
    """Why `filter-taylor` takes its gradient there: `sum w_i g_i` is the slope of the loss along the filter itself."""
    torch.manual_seed(0)
    model = build_model("resnet20", num_classes=5).train()
    model(torch.randn(64, 3, 8, 8))
    layers, batches = prunable_layers(model), batches_of(16)
    slopes = {}
    for training in (True, False):
        products = {
            layer.name: (layer.module.weight * gradient).detach().flatten(1)
            for layer, gradient in zip(
                layers, mean_gradients(model, batches, layers=layers, training=training).values(), strict=True
            )
        }
        slopes[training] = max((p.sum(1).abs() / p.abs().sum(1)).median().item() for p in products.values())
    assert slopes[True] < 1e-3 < 1e-2 < slopes[False]
    assert CRITERIA["filter-taylor"].gradient_mode == "evaluation"


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
    with pytest.raises(UserError, match="--samp-batches"):
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
