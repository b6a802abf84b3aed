"""What networks do with their maps between two pruned convolutions: the small network evaluates and trains as the masked one."""

import pytest
import torch
import torch.nn.functional as F
from selections import physical_pruning, prunable_layers
from torch import Tensor, nn

from prune.masks import choose_filters, keep_ratios
from prune.schedule import PhysicalPruning


class Between(nn.Module):
    """conv_a - norm_a - relu - `construct` - conv_b - norm_b - relu - head; (B, 8, 6, 6) before and behind the construct."""

    def __init__(self, construct):
        super().__init__()
        torch.manual_seed(0)
        self.conv_a, self.norm_a = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.construct = construct
        self.conv_b, self.norm_b = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.head = nn.Linear(8, 4)
        for norm in (self.norm_a, self.norm_b):
            nn.init.normal_(norm.bias), nn.init.uniform_(norm.weight, 0.5, 1.5), norm.running_mean.normal_()

    def forward(self, x: Tensor) -> Tensor:
        x = self.construct(F.relu(self.norm_a(self.conv_a(x))))
        return self.head(F.relu(self.norm_b(self.conv_b(x))).mean((2, 3)))


class WithParameters(nn.Module):
    """A function of the maps and of tensors of its own, given by their shapes."""

    def __init__(self, function, *shapes: tuple[int, ...]):
        super().__init__()
        self.function = function
        self.tensors = nn.ParameterList(torch.randn(shape) for shape in shapes)

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x, *self.tensors)


class SqueezeExcitation(nn.Module):
    def __init__(self):
        super().__init__()
        self.down, self.up = nn.Linear(8, 4), nn.Linear(4, 8)

    def forward(self, x: Tensor) -> Tensor:
        batch, channels, _, _ = x.shape
        gate = torch.sigmoid(self.up(F.relu(self.down(F.adaptive_avg_pool2d(x, 1).view(batch, channels)))))
        return x * gate.view(batch, channels, 1, 1).expand_as(x)


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.query, self.key, self.value = nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        batch, channels, height, width = x.shape
        query, key, value = (layer(x).flatten(2) for layer in (self.query, self.key, self.value))
        weights = torch.softmax(query.transpose(1, 2) @ key / channels**0.5, -1)
        return (value @ weights.transpose(1, 2)).view(batch, channels, height, width)


class Tokens(nn.Module):
    """`layer` on the pixels as tokens (B, 36, 8)."""

    def __init__(self, layer: nn.Module):
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(2).transpose(1, 2)
        found = self.layer(tokens, tokens, tokens)[0] if isinstance(self.layer, nn.MultiheadAttention) else self.layer(tokens)
        return found.transpose(1, 2).reshape(x.shape[0], 8, 6, 6)


class Shifted(nn.Conv2d):
    """A convolution that gives 1 for a filter of zeros."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + 1


class Standardised(nn.Conv2d):
    """Qiao et al., "Micro-Batch Training with Batch-Channel Normalization and Weight Standardization", arXiv 1903.10520."""

    def forward(self, x: Tensor) -> Tensor:
        mean, std = self.weight.mean((1, 2, 3), keepdim=True), self.weight.std((1, 2, 3), keepdim=True)
        return F.conv2d(x, (self.weight - mean) / (std + 1e-5), self.bias)


class FunctionalNorm(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm2d(8)

    def forward(self, x: Tensor) -> Tensor:
        norm = self.norm
        return F.batch_norm(x, norm.running_mean, norm.running_var, norm.weight, norm.bias, self.training)


class Tied(nn.Module):
    """Two layers of one weight."""

    def __init__(self, *, transposed: bool):
        super().__init__()
        self.first, self.second = nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1)
        self.second.weight = self.first.weight
        self.transposed = transposed

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.first(x))
        return F.conv_transpose2d(x, self.first.weight) if self.transposed else self.second(x)


class Blur(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("kernel", torch.ones(8, 1, 3, 3) / 9)

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.kernel, padding=1, groups=8)


class GlobalResponse(nn.Module):
    """Woo et al., "ConvNeXt V2", CVPR 2023: each channel over the mean of all."""

    def __init__(self):
        super().__init__()
        self.gamma, self.beta = nn.Parameter(torch.randn(1, 8, 1, 1)), nn.Parameter(torch.randn(1, 8, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        size = x.norm(dim=(2, 3), keepdim=True)
        return self.gamma * (x * size / (size.mean(1, keepdim=True) + 1e-6)) + self.beta + x


def in_groups(x: Tensor) -> Tensor:
    batch, channels, height, width = x.shape
    return x.view(batch, 2, channels // 2, height, width)


def hooked() -> nn.Module:
    layer = nn.Conv2d(8, 8, 1)
    layer.register_forward_hook(lambda module, inputs, result: result + 1)
    return layer


def hooked_activation() -> nn.Module:
    layer = nn.ReLU()
    layer.register_forward_hook(lambda module, inputs, result: result + 1)
    return layer


def hooked_before() -> nn.Module:
    layer = nn.BatchNorm2d(8)
    layer.register_forward_pre_hook(lambda module, inputs: (inputs[0].flip(1),))
    return layer


CONSTRUCTS = {
    "nothing": nn.Identity,
    "LayerScale": lambda: WithParameters(torch.mul, (8, 1, 1)),
    "LayerScale, channels last": lambda: WithParameters(lambda x, g: (x.permute(0, 2, 3, 1) * g).permute(0, 3, 1, 2), (8,)),
    "a bias": lambda: WithParameters(torch.add, (8, 1, 1)),
    "a matrix": lambda: WithParameters(lambda x, weight: torch.einsum("bchw,dc->bdhw", x, weight), (8, 8)),
    "a subclass with another forward": lambda: Shifted(8, 8, 1),
    "weight standardisation": lambda: Standardised(8, 8, 1),
    "squeeze and excitation": SqueezeExcitation,
    "attention": Attention,
    "multi-head attention": lambda: Tokens(nn.MultiheadAttention(8, 2, batch_first=True)),
    "a linear layer on tokens": lambda: Tokens(nn.Linear(8, 8)),
    "a layer norm on tokens": lambda: Tokens(nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 8))),
    "a convolution of one axis": lambda: nn.Sequential(nn.Flatten(2), nn.Conv1d(8, 8, 3, padding=1), nn.Unflatten(2, (6, 6))),
    "global response": GlobalResponse,
    "group norm": lambda: nn.GroupNorm(4, 8),
    "group norm of single channels": lambda: nn.GroupNorm(8, 8),
    "instance norm": lambda: nn.InstanceNorm2d(8, affine=True),
    "instance norm with statistics": lambda: nn.InstanceNorm2d(8, affine=True, track_running_stats=True),
    "local response": lambda: nn.LocalResponseNorm(3),
    "batch norm as a function": FunctionalNorm,
    "batch norm without statistics": lambda: nn.BatchNorm2d(8, track_running_stats=False),
    "batch norm without weights": lambda: nn.BatchNorm2d(8, affine=False),
    "a gate over channels": lambda: nn.Sequential(nn.Conv2d(8, 16, 1), nn.GLU(1)),
    "softmax over channels": nn.Softmax2d,
    "transposed convolution": lambda: nn.ConvTranspose2d(8, 8, 3, padding=1),
    "groups of two sizes": lambda: nn.Sequential(nn.Conv2d(8, 8, 3, padding=1, groups=2), nn.Conv2d(8, 8, 1, groups=4)),
    "depthwise": lambda: nn.Sequential(nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.BatchNorm2d(8), nn.ReLU6(inplace=True)),
    "depthwise with more filters": lambda: nn.Sequential(nn.Conv2d(8, 16, 3, padding=1, groups=8), nn.Conv2d(16, 8, 1)),
    "PReLU": lambda: nn.PReLU(8),
    "one weight twice": lambda: Tied(transposed=False),
    "one weight twice, transposed": lambda: Tied(transposed=True),
    "blur": Blur,
    "unfold and fold": lambda: nn.Sequential(nn.Unfold(1), nn.Fold((6, 6), 1)),
    "a hook": hooked,
    "a hook of an activation": hooked_activation,
    "a hook before": hooked_before,
}
FUNCTIONS = {
    "padding to a number of channels": lambda x: F.pad(x, (0, 0, 0, 0, 0, 8 - x.shape[1])) * x.shape[1],
    "pixel shuffle": lambda x: F.pixel_unshuffle(F.pixel_shuffle(x, 2), 2),
    "normalised over channels": lambda x: F.normalize(x, dim=1),
    "normalised over space": lambda x: x / (x.norm(dim=(2, 3), keepdim=True) + 1),
    "softmax as a gate": lambda x: x * F.softmax(x, 1),
    "sums of the channels before": lambda x: x.cumsum(1),
    "rolled": lambda x: torch.roll(x, 1, 1) + torch.roll(x, (1, 1), (2, 3)),
    "a choice": lambda x: torch.where(x > 0, x, torch.full_like(x, -0.3)),
    "filled": lambda x: x.masked_fill(x == 0, 0.5),
    "a new axis": lambda x: x[:, None].sum(1) + x[:, :, None].mean(2),
    "channels in two groups, swapped": lambda x: in_groups(x).transpose(1, 2).reshape(x.shape),
    "channels in two groups, summed": lambda x: in_groups(x).sum(1).repeat(1, 2, 1, 1),
    "half of the channels": lambda x: torch.cat((x[:, : x.size(1) // 2] * 2, x[:, x.size(1) // 2 :]), 1),
    "the last channels": lambda x: torch.cat((x[:, -3:], x[:, :-3]), 1),
    "concatenated with the negative": lambda x: torch.cat((F.relu(x), F.relu(-x)), 1)[:, 4:12],
    "channels behind the pixels": lambda x: x.flatten(2).permute(0, 2, 1).reshape(x.shape[0], 6, 6, 8).permute(0, 3, 1, 2),
    "a matrix of the pixels": lambda x: torch.matmul(x, x.transpose(2, 3)),
    "a matrix of the channels": lambda x: (x.flatten(2) @ x.flatten(2).transpose(1, 2) @ x.flatten(2)).view(x.shape),
    "a power": lambda x: x**0,
    "a quotient of itself": lambda x: x / (x + 1),
    "a maximum with a number": lambda x: torch.clamp(x, min=0.1),
    "a comparison": lambda x: (x > 0.5).float() + x,
    "its mean": lambda x: x - x.mean(),
    "its size": lambda x: x * (x.numel() / x.shape[0]),
}


FOLLOWED = {  # what lets channels that are gone stay gone
    "a scale that all channels share": lambda: WithParameters(lambda x, alpha: x + alpha * x, (1,)),
    "a scale of no axes": lambda: WithParameters(lambda x, alpha: alpha * x, ()),
    "a quotient by a number for each channel": lambda: WithParameters(torch.div, (8, 1, 1)),
    "hard swish, written out": lambda: WithParameters(lambda x: x * F.relu6(x + 3) / 6),
    "hard swish, in another order": lambda: WithParameters(lambda x: (F.relu6(3 + x) / 6.0) * x),
    "Mish, written out": lambda: WithParameters(lambda x: x * torch.tanh(F.softplus(x))),
    "a mean with NumPy's names": lambda: WithParameters(lambda x: x * x.mean(axis=2, keepdims=True)),
    "concatenated along axis": lambda: WithParameters(lambda x: torch.concatenate([x[:, :4], x[:, 4:]], axis=1)),
    "split by sizes": lambda: WithParameters(lambda x: torch.cat([piece * 2 for piece in split_in_two(x)], 1)),
    "every second channel": lambda: WithParameters(lambda x: torch.cat((x[:, ::2], x[:, 1::2, ...]), dim=1)),
    "squeezed": lambda: WithParameters(lambda x: x + x.mean((2, 3), keepdim=True).squeeze(3)[..., None]),
    "a view of the pixels": lambda: WithParameters(lambda x: x.view(x.size(0), 8, -1).view(-1, 8, 6, 6)),
    "flattened pixels": lambda: WithParameters(lambda x: x.flatten(2).reshape(x.shape[0], 8, 6, 6)),
}
HEADS = {  # (B, 8, 6, 6) to what a linear layer reads
    "squeeze twice": lambda x: x.mean((2, 3), keepdim=True).squeeze(-1).squeeze(-1),
    "squeeze": lambda x: F.adaptive_avg_pool2d(x, 1).squeeze(),
    "the first pixel": lambda x: F.adaptive_avg_pool2d(x, 1)[:, :, 0, 0],
    "mean of flattened pixels": lambda x: x.flatten(2).mean(-1),
    "mean of a view": lambda x: x.view(x.shape[0], x.shape[1], -1).mean(2),
    "view by the number of channels": lambda x: F.adaptive_avg_pool2d(x, 1).view(-1, 8),
    "view by the number of all": lambda x: x.contiguous().view(-1, 8 * 6 * 6),
    "reshape by the number of all": lambda x: x.reshape(-1, 8 * 6 * 6),
    "view by the size of the batch": lambda x: x.reshape(x.size(0), 8 * 6 * 6),
    "view by what Python counts": lambda x: x.reshape(-1, x.size(1) * x.size(2) * x.size(3)),
    "NumPy's names": lambda x: x.mean(axis=(2, 3)),
}


def split_in_two(x: Tensor) -> tuple[Tensor, Tensor]:
    first, second = torch.split(x, [3, 5], dim=1)
    return second, first


def proved(model: nn.Module) -> PhysicalPruning:
    images = torch.randn(4, 3, 6, 6, generator=torch.Generator().manual_seed(0))
    layers = prunable_layers(model, example=images)
    kept = choose_filters(layers, keep_ratios(layers, [0.5]), criterion="filter-a")
    schedule = physical_pruning(model, kept, example=images)
    schedule.prove(images)
    return schedule


@pytest.mark.parametrize("name", CONSTRUCTS)
def test_modules(name):
    proved(Between(CONSTRUCTS[name]()))


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions(name):
    proved(Between(WithParameters(FUNCTIONS[name])))


@pytest.mark.parametrize("name", FOLLOWED)
def test_channels_that_are_gone_stay_gone(name):
    small = proved(Between(FOLLOWED[name]())).trained_network()
    assert small.restored == [] and small.get_submodule("conv_b").in_channels == 4


@pytest.mark.parametrize("name", HEADS)
def test_heads(name):
    class Headed(Between):
        def forward(self, x: Tensor) -> Tensor:
            return self.head(HEADS[name](F.relu(self.norm_b(self.conv_b(F.relu(self.norm_a(self.conv_a(x))))))))

    model = Headed(nn.Identity())
    pixels = HEADS[name](torch.zeros(2, 8, 6, 6)).shape[1] // 8
    model.head = nn.Linear(8 * pixels, 4)
    small = proved(model).trained_network()
    assert small.restored == [] and small.get_submodule("head").in_features == 4 * pixels
