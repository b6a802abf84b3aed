"""A narrow network is a module like any other: copied, pickled, sent to workers, compiled, exported, with any layer names."""

import copy
import io
import pickle

import pytest
import torch
import torch.nn.functional as F
from selections import narrow
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from models.cifar_resnet import CifarResNet
from utils.errors import UserError

KEPT = {"conv": [0, 3, 4], "norm": [0, 3, 4]}


class Named(nn.Module):
    """conv - norm - relu - head, with the layers under the given names."""

    def __init__(self, **names: str):
        super().__init__()
        self.names = {"conv": "conv", "norm": "norm", "head": "head"} | names
        layers = {"conv": nn.Conv2d(3, 6, 3), "norm": nn.BatchNorm2d(6), "head": nn.Conv2d(6, 2, 1)}
        for role, layer in layers.items():
            setattr(self, self.names[role], layer)

    def forward(self, x: Tensor) -> Tensor:
        conv, norm, head = (getattr(self, self.names[role]) for role in ("conv", "norm", "head"))
        return F.dropout(head(F.max_pool2d(F.relu(norm(conv(x))), 2)), training=self.training)

    def masked(self, kept: dict[str, list[int]] = KEPT) -> "Named":
        """Itself with zeros where `kept`, named by roles, keeps nothing."""
        with torch.no_grad():
            for role, channels in kept.items():
                layer = getattr(self, self.names[role])
                for tensor in (layer.weight, layer.bias):
                    tensor[[channel for channel in range(6) if channel not in channels]] = 0
        return self


def images(count: int = 2) -> Tensor:
    return torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def narrowed() -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    model = Named().masked().eval()
    return model, narrow(model, KEPT)


def same_function(network: nn.Module, other: nn.Module) -> bool:
    return torch.equal(network(images()), other(images()))


# ---- copies ------------------------------------------------------------------------------------------------------------


def test_a_deep_copy_shares_nothing():
    _, small = narrowed()
    twin = copy.deepcopy(small)
    assert same_function(small, twin)
    tensors = [*twin.state_dict(keep_vars=True).values(), *twin.buffers()]
    assert not {id(t) for t in tensors} & {id(t) for t in (*small.parameters(), *small.buffers())}
    for parameter in twin.parameters():
        nn.init.zeros_(parameter)
    assert not twin(images()).any() and small(images()).any()
    twin.train()
    assert not small.training and not torch.equal(small.double()(images().double()), twin(images()).double())


def test_pickled_and_saved():
    model, small = narrowed()
    for rebuilt in (pickle.loads(pickle.dumps(small)), pickle.loads(pickle.dumps(copy.deepcopy(small)))):
        assert same_function(small, rebuilt) and rebuilt.kept == small.kept
        torch.testing.assert_close(rebuilt.dense_state_dict(), small.dense_state_dict(), rtol=0, atol=0)
        assert rebuilt.train()(images()).eq(0).any()  # dropout follows the mode
    stream = io.BytesIO()
    torch.save(small.state_dict(), stream)
    stream.seek(0)
    fresh = narrow(Named().eval(), KEPT)
    fresh.load_state_dict(torch.load(stream, weights_only=True))
    torch.testing.assert_close(fresh(images()), model(images()))


def test_pickled_with_feature_maps_and_sums_of_different_channels():
    torch.manual_seed(0)
    model = CifarResNet(depth=8, num_classes=5).eval()
    kept = {"bn_1": [0, 2], "stage_1.0.bn_b": [2, 3], "stage_2.0.bn_b": [1]}
    small = narrow(model, kept)
    rebuilt = pickle.loads(pickle.dumps(small))
    torch.testing.assert_close(rebuilt.outputs(images()), small.outputs(images()), rtol=0, atol=0)
    with torch.no_grad():
        assert same_function(rebuilt, small)


class Predictions(Dataset):
    """A data set that runs a network, as one that adds a teacher's answers to its images."""

    def __init__(self, network: nn.Module):
        self.network = network

    def __len__(self) -> int:
        return 2

    def __getitem__(self, index: int) -> Tensor:
        with torch.no_grad():
            return self.network(images())[index]


def test_it_reaches_the_workers_of_a_loader():
    _, small = narrowed()
    loader = DataLoader(Predictions(small), batch_size=2, num_workers=1, multiprocessing_context="spawn")
    torch.testing.assert_close(next(iter(loader)), small(images()))


def test_exported_and_compiled():
    model, small = narrowed()
    program = torch.export.export(small, (images(),))
    torch.testing.assert_close(program.module()(images()), model(images()))
    assert {key for key in program.state_dict if "relayouts" not in key} == set(small.state_dict())
    compiled = torch.compile(small, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(images()), model(images()))


def test_parameters_can_be_given_for_one_call():
    _, small = narrowed()
    zeros = {name: torch.zeros_like(value) for name, value in small.named_parameters()}
    assert not torch.func.functional_call(small, zeros, (images(),)).any() and small(images()).any()


# ---- names -------------------------------------------------------------------------------------------------------------

TAKEN = ("outputs", "kept", "relayouts", "owner", "training_", "_functions", "_origin")


@pytest.mark.parametrize("taken", TAKEN)
def test_a_layer_may_have_any_name(taken):
    torch.manual_seed(0)
    model = Named(conv=taken).masked().eval()
    small = narrow(model, {taken: KEPT["conv"], "norm": KEPT["norm"]})
    torch.testing.assert_close(small(images()), model(images()))
    assert list(small.state_dict()) == list(model.state_dict())
    assert small.get_submodule(taken).out_channels == 3 and small.kept[taken] == [0, 3, 4]
    for twin in (copy.deepcopy(small), pickle.loads(pickle.dumps(small))):
        torch.testing.assert_close(twin(images()), model(images()))
    program = torch.export.export(small.bare(), (images(),))
    torch.testing.assert_close(program.module()(images()), model(images()))
    dense = Named(conv=taken).eval()
    dense.load_state_dict(small.dense_state_dict())
    torch.testing.assert_close(dense(images()), model(images()))


# ---- state -------------------------------------------------------------------------------------------------------------


class Aliased(Named):
    """Every layer has a second name, and the head's weight is also that of a head which nothing calls."""

    def __init__(self):
        super().__init__()
        self.stem, self.last = self.conv, self.norm
        self.unused, self.spare = nn.Conv2d(6, 2, 1), nn.Conv2d(6, 2, 1)
        self.unused.weight = self.head.weight


def test_layers_with_two_names_survive_in_a_dense_state():
    torch.manual_seed(0)
    model = Aliased().masked().eval()
    small = narrow(model, KEPT)
    dense = Aliased().eval()
    dense.load_state_dict(small.dense_state_dict())
    torch.testing.assert_close(dense(images()), model(images()))
    assert torch.equal(dense.stem.weight[KEPT["conv"]], model.conv.weight[KEPT["conv"]])
    assert torch.equal(dense.unused.weight[:, KEPT["conv"]], model.head.weight[:, KEPT["conv"]])


def test_layers_that_nothing_reads_can_come_from_the_dense_network():
    torch.manual_seed(0)
    model = Aliased().masked()
    state = narrow(model, KEPT).dense_state_dict(idle=model.state_dict())
    for key in ("spare.weight", "spare.bias", "unused.bias"):
        assert torch.equal(state[key], model.state_dict()[key])
    assert not narrow(model, KEPT).dense_state_dict()["spare.weight"].any()


def test_a_parameter_that_is_also_read_by_itself_stays_one():
    class Tied(Named):
        def __init__(self):
            super().__init__()
            self.scale = self.norm.weight

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * self.scale.sum()

    kept = {"conv": KEPT["conv"]}
    model = Tied().masked(kept).double()
    small = narrow(model, kept)
    dense = Tied().double()
    for _ in range(2):
        for network in (model, small):
            network.eval()(images().double()).square().mean().backward()
            with torch.no_grad():
                for parameter in network.parameters():
                    parameter -= 0.1 * parameter.grad
                    parameter.grad = None
        model.masked(kept)
        dense.load_state_dict(small.dense_state_dict())
        torch.testing.assert_close(small(images().double()), model(images().double()))
        torch.testing.assert_close(dense.eval()(images().double()), model(images().double()))


class Versioned(nn.Conv2d):
    """A layer whose second version has weights of twice the size."""

    _version = 2

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, *args):
        if local_metadata.get("version", 1) < 2:
            state_dict[prefix + "weight"] = 2 * state_dict[prefix + "weight"]
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *args)


def test_versions_of_layers_are_kept():
    torch.manual_seed(0)
    model = Named().masked().eval()
    model.head = Versioned(6, 2, 1)
    small = narrow(model, KEPT)
    assert small.dense_state_dict()._metadata == model.state_dict()._metadata
    dense = copy.deepcopy(model)
    dense.load_state_dict(small.dense_state_dict())
    torch.testing.assert_close(dense(images()), model(images()))
    small.load_dense_state_dict(dense.state_dict())
    torch.testing.assert_close(small(images()), model(images()))


# ---- modes -------------------------------------------------------------------------------------------------------------


class Frozen(Named):
    """Its batch norm stays in evaluation, and does not learn."""

    def train(self, mode: bool = True) -> "Frozen":
        super().train(mode)
        self.norm.eval()
        self.norm.requires_grad_(False)
        return self


def test_frozen_batch_norms_stay_frozen():
    torch.manual_seed(0)
    model = Frozen().masked()
    small = narrow(model, KEPT)
    assert model.norm.weight.requires_grad and model.norm.training  # asking changes nothing
    small.train()
    assert small.training and small.head.training and not small.norm.training
    before = small.norm.running_mean.clone()
    small(images())
    assert torch.equal(small.norm.running_mean, before)
    assert copy.deepcopy(small).train().norm.training is False
    assert not small.eval().head.training


def test_a_network_that_only_evaluates_says_so_after_pickling():
    class TwoFaced(Named):
        def forward(self, x: Tensor) -> Tensor:
            x = super().forward(x)
            return 2 * x if self.training else x

    small = copy.deepcopy(narrow(TwoFaced(), KEPT))
    with pytest.raises(UserError, match="TwoFaced runs other operations in training"):
        small.train()
