"""Networks compressed by the second codec: folding, errors against steps, archives bit for bit."""

import copy

import numpy as np
import pytest
import torch
from archives import IMAGES, KEPT, TEST_MODELS, network_of
from torch import nn

from models import MODELS
from quantize.archive import differing_tensors, pack_archive, read_archive, save_archive
from quantize.compression import Compressor, power
from quantize.folding import fold_norms
from quantize.search import Search
from utils.errors import UserError


@pytest.fixture(autouse=True)
def _test_models(monkeypatch):
    for name, build in TEST_MODELS.items():
        monkeypatch.setitem(MODELS, name, build)


class Depthwise(nn.Module):
    """A convolution without a norm, a depthwise one, and one in two groups."""

    def __init__(self, *, num_classes):
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.depthwise = nn.Conv2d(8, 8, 3, groups=8, bias=False)
        self.bn = nn.BatchNorm2d(8)
        self.grouped = nn.Conv2d(8, 6, 1, groups=2, bias=False)
        self.fc = nn.Linear(6, num_classes)

    def forward(self, x):
        x = self.bn(self.depthwise(self.first(x).relu())).relu()
        return self.fc(self.grouped(x).mean((2, 3)))


def images(seed=0, count=24):
    return [torch.randn(count // 2, 3, 12, 12, generator=torch.Generator().manual_seed(seed + half)) for half in (0, 1)]


def error(network, other):
    with torch.no_grad():
        wanted = torch.cat([network.eval()(batch) for batch in images(7)])
        return float((torch.cat([other.eval()(batch) for batch in images(7)]) - wanted).norm() / wanted.norm())


@pytest.mark.parametrize("kept", [None, KEPT])
def test_folding_leaves_the_function(kept):
    network = network_of("small", kept=kept)
    folded = copy.deepcopy(network)
    pairs = fold_norms(folded)
    assert pairs["conv_1_3x3"] == "bn_1" and error(network, folded) < 1e-5
    assert bool((folded.get_submodule("bn_1").weight == 1).all()) and not folded.get_submodule("bn_1").running_mean.any()


@pytest.mark.parametrize("kept", [None, KEPT])
def test_smaller_steps_make_smaller_errors_and_larger_files(kept):
    network = network_of("small", kept=kept)
    before = copy.deepcopy(network.state_dict())
    compressor = Compressor(network, images())
    found = [compressor.compress(step) for step in (0.03, 0.0003)]
    errors = [error(network, each.network) for each in found]
    magnitudes = [sum(int(np.abs(coded.levels).sum()) for coded in each.weights.values()) for each in found]
    assert errors[1] < 0.3 * errors[0] and magnitudes[0] < magnitudes[1]
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())


@pytest.mark.parametrize(("kept", "known"), [(None, IMAGES), (KEPT, None)])
def test_archives_hold_the_compressed_network_bit_for_bit(kept, known, tmp_path):
    network = network_of("small", kept=kept)
    compressed = Compressor(network, images()).compress(0.01)
    path = tmp_path / "model.huff"
    report = save_archive(path, compressed.network, model="small", num_classes=4, images=known, weights=compressed.weights)
    decoded, read_report = read_archive(path)
    assert differing_tensors(compressed.network, decoded) == []
    assert read_report == report and report.file_bytes == path.stat().st_size
    assert 0 < report.overhead_bytes < 1500 and report.images == known
    save_archive(tmp_path / "plain.huff", network, model="small", num_classes=4, images=known)
    assert path.stat().st_size < (tmp_path / "plain.huff").stat().st_size


def test_groups_and_layers_without_norms(tmp_path, monkeypatch):
    monkeypatch.setitem(MODELS, "depthwise", Depthwise)
    torch.manual_seed(0)
    network = Depthwise(num_classes=4).eval()
    compressed = Compressor(network, images()).compress(0.003)
    assert set(compressed.weights) == {"first.weight", "depthwise.weight", "grouped.weight", "fc.weight"}
    assert compressed.weights["depthwise.weight"].shift == "bn.bias" and compressed.weights["grouped.weight"].shift is None
    assert error(network, compressed.network) < 0.05
    save_archive(tmp_path / "model.huff", compressed.network, model="depthwise", num_classes=4, weights=compressed.weights)
    assert differing_tensors(compressed.network, read_archive(tmp_path / "model.huff")[0]) == []


def test_the_compression_repeats_itself():
    network = network_of("tiny")
    first, second = (Compressor(network, images()).compress(0.01).network for _ in range(2))
    assert differing_tensors(first, second) == []


def test_weights_that_are_not_finite():
    network = network_of("tiny")
    network.fc.weight.data[0, 0] = float("nan")
    with pytest.raises(UserError, match=r"fc\.weight cannot be compressed"):
        Compressor(network, images())


def test_powers_of_the_fourth_root_of_two():
    exponents = np.arange(-40, 41)
    assert power(exponents) == pytest.approx(2.0 ** (exponents / 4), rel=1e-15)


def search_of(network, batches):
    """The drop is a hundred times the error of the logits."""

    def drop_of(found):
        return 100 * error(network, found.network)

    def pack(found):
        return pack_archive(found.network, model="tiny", num_classes=4, weights=found.weights)

    return Search(Compressor(network, batches), pack=pack, drop_of=drop_of)


def test_bounds_on_bytes():
    search = search_of(network_of("tiny"), images(count=48))
    seen = []
    search.on_candidate = seen.append
    best = search.within_bytes(700)
    fitting = [candidate for candidate in seen if len(candidate.data) <= 700]
    assert len(best.data) == best.report.file_bytes <= 700 and best.step == min(candidate.step for candidate in fitting)
    assert any(len(candidate.data) > 700 for candidate in seen)
    with pytest.raises(UserError, match=r"max_bytes 200: the least that an archive of this network takes is \d+"):
        search.within_bytes(200)


def test_bounds_on_what_is_lost():
    search = search_of(network_of("tiny"), images(count=48))
    loose, strict = search.within_drop(30.0), search.within_drop(10.0)
    assert strict.drop <= 10 and loose.drop <= 30 and loose.step > strict.step
    search.drop_of = lambda found: 12.5
    with pytest.raises(UserError, match=r"max_drop 1: the least that this network loses is 12\.50 points"):
        search.within_drop(1.0)
