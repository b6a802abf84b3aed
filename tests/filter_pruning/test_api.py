"""What another project calls: any structure of inputs and results, any loop, and one exception for what cannot be done."""

from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import filter_pruning as fp
from models.cifar_resnet import CifarResNet


class Result(NamedTuple):
    map: torch.Tensor
    score: torch.Tensor


class TwoInputs(nn.Module):
    """Two images in, a named tuple out."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.left, self.right, self.both = nn.Conv2d(1, 16, 3), nn.Conv2d(1, 16, 3), nn.Conv2d(16, 16, 1)
        self.map, self.score = nn.Conv2d(16, 2, 1), nn.Linear(16, 3)

    def forward(self, left, right):
        x = F.relu(self.both(F.relu(self.left(left) + self.right(right))))
        return Result(self.map(x), self.score(x.mean((2, 3))))


def pair(count=4, seed=0):
    random = torch.Generator().manual_seed(seed)
    return torch.rand(count, 1, 6, 6, generator=random), torch.rand(count, 1, 6, 6, generator=random)


@pytest.fixture(scope="module")
def resnet():
    torch.manual_seed(0)
    return CifarResNet(depth=8, num_classes=4).eval()


IMAGES = torch.rand(4, 3, 8, 8, generator=torch.Generator().manual_seed(1))
LABELS = torch.arange(4)


@pytest.mark.parametrize("example", [pair(), dict(zip(("left", "right"), pair(), strict=True))])
def test_several_inputs_and_results_keep_their_structure(example):
    network = TwoInputs().eval()
    selection = fp.select(network, example, keep=0.5)
    small, masked = selection.shrink(network), selection.mask(network)
    found, expected = small(*pair(seed=2)), masked(*pair(seed=2))
    assert type(found) is Result and {len(kept) for kept in selection.kept.values()} == {8}
    torch.testing.assert_close(found, expected)


def test_gradients_are_those_of_the_loss_that_is_given():
    """Of a loss of the map alone, the filters that the map does not read have none."""
    network = TwoInputs().eval()
    with torch.no_grad():
        network.map.weight[:, :8] = 0
    selection = fp.select(
        network,
        pair(),
        criterion="taylor",
        keep=0.5,
        batches=iter([(pair(), None)]),
        loss=lambda result, _: result.map.square().mean(),
    )
    assert selection.kept["both"] == tuple(range(8, 16))


def test_a_budget_is_kept_and_widths_are_multiples(resnet):
    selection = fp.select(resnet, IMAGES, budget="macs=0.5")
    small = fp.prune(resnet, IMAGES, budget="macs=0.5")
    assert selection.parameters == sum(each.numel() for each in small.parameters())
    assert selection.macs <= 0.5 * fp.select(resnet, IMAGES, keep=1.0).macs
    assert all(module.out_channels % 8 == 0 for module in small.modules() if isinstance(module, nn.Conv2d))


def test_it_trains_in_any_loop_without_a_hook(resnet):
    small = fp.prune(resnet, IMAGES, keep=0.5)
    optimizer = torch.optim.SGD(small.train().parameters(), lr=0.1)
    losses = []
    for _ in range(8):
        optimizer.zero_grad()
        loss = F.cross_entropy(small(IMAGES), LABELS)
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0] and fp.select(resnet, IMAGES, keep=0.5).shrink()(IMAGES).shape == (4, 4)


def test_least_squares_bring_back_what_channels_gave(resnet):
    small, images = fp.prune(resnet, IMAGES, keep=0.5), torch.rand(64, 3, 8, 8, generator=torch.Generator().manual_seed(3))
    before = F.mse_loss(small(IMAGES), resnet(IMAGES))
    fp.reconstruct(small, resnet, [images])
    assert F.mse_loss(small(IMAGES), resnet(IMAGES)) < before


@pytest.mark.parametrize("losses, layers", [("kd", None), ("hap", None), (["at"], ["stage_2.0", "stage_3.0"])])
def test_it_learns_from_its_unpruned_self(resnet, losses, layers):
    small = fp.prune(resnet, IMAGES, keep=0.5)
    objective = fp.distil(small, resnet, losses, example=IMAGES, layers=layers)
    loss, logits, terms = objective(IMAGES, LABELS)
    loss.backward()
    assert logits.shape == (4, 4) and {"ce", "kd"} <= terms.keys()
    assert all(each.grad is not None for each in small.parameters())


def test_the_teacher_may_see_its_images_in_another_way(resnet):
    small = fp.prune(resnet, IMAGES, keep=1.0)
    own = fp.distil(small, resnet, "at", example=IMAGES, alpha=0.0)(IMAGES, LABELS)[2]["at"]
    shifted = fp.distil(small, resnet, "at", example=IMAGES, alpha=0.0, teacher_input=lambda x: 3 * x - 1)
    assert float(own) < 1e-6 < float(shifted(IMAGES, LABELS)[2]["at"])


def test_a_file_gives_the_network_back_and_runs_no_code(resnet, tmp_path):
    small = fp.prune(resnet, IMAGES, keep=0.5)
    fp.save(small, tmp_path / "small.pt")
    torch.load(tmp_path / "small.pt", weights_only=True)
    for network in (resnet, lambda: CifarResNet(depth=8, num_classes=4)):
        assert torch.equal(fp.load(tmp_path / "small.pt", network).eval()(IMAGES), small.eval()(IMAGES))
    with pytest.raises(fp.PruningError, match=r"small\.pt"):
        fp.load(tmp_path / "small.pt", CifarResNet(depth=8, num_classes=5))
    (tmp_path / "small.pt").write_bytes(b"no network")
    with pytest.raises(fp.PruningError, match=r"small\.pt"):
        fp.load(tmp_path / "small.pt", resnet)


@pytest.mark.parametrize("ending", [".py", ".pt2"])
def test_exports_are_checked_before_they_are_written(resnet, tmp_path, ending):
    files = fp.export(fp.prune(resnet, IMAGES, keep=0.5), tmp_path / f"small{ending}", IMAGES)
    assert all(path.stat().st_size for path in files) and tmp_path / f"small{ending}" in files


@pytest.mark.parametrize(
    "how, said",
    [
        ({}, "give one of the two"),
        ({"keep": 0.5, "budget": "macs=0.5"}, "give one of the two"),
        ({"keep": 1.5}, "1.5"),
        ({"keep": 0.5, "criterion": "fpgn"}, "choose from random"),
        ({"keep": 0.5, "criterion": "nggm"}, "give batches"),
        ({"budget": "macs=0.001"}, "is the least"),
        ({"budget": "volts=0.5"}, "volts"),
        ({"keep": 0.5, "exclude": ("nothing.*",)}, "nothing"),
        ({"keep": 0.5, "criterion": "nggm", "batches": [IMAGES]}, "pairs of inputs"),
    ],
)
def test_what_cannot_be_done_is_one_line(resnet, how, said):
    with pytest.raises(fp.PruningError, match=said) as raised:
        fp.select(resnet, IMAGES, **how)
    assert "\n" not in str(raised.value)
