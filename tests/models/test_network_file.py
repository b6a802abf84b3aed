"""Checkpoint files to networks and back, and what is refused with a message that says what differs."""

import argparse
import copy

import numpy as np
import pytest
import torch
from classes_elsewhere import FILE
from safetensors.torch import save_file
from selections import narrow

from models import build_model
from models.network_file import describe_network, load_network
from utils.checkpoints import load_checkpoint, save_checkpoint
from utils.errors import UserError
from utils.images.spec import ImageSpec

IMAGES = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
KEPT = {"stage_1.0.conv_a": [0, 3, 7], "stage_1.0.bn_a": [0, 3, 7]}

ONE = torch.ones(1)


def named(prefix: str, state) -> dict:
    return {prefix + name: value for name, value in state.items()}


@pytest.fixture(scope="module")
def network() -> torch.nn.Module:
    torch.manual_seed(0)
    network = build_model("resnet8", num_classes=7)
    network(IMAGES)  # so that the running statistics are none that a new network has
    return network.eval()


def write(path, network, **changes) -> str:
    description = describe_network(network.state_dict(), model="resnet8", num_classes=7, config={"lr": 0.1}, kept=None)
    save_checkpoint(path, {**description, "epoch": 3, "metrics": {"top1": 88.5}, **changes})
    return str(path)


def refuse(path, *parts: str, **options) -> None:
    with pytest.raises(UserError) as raised:
        load_network(path, flag="--t-path", **options)
    message = str(raised.value)
    assert message.startswith(f"--t-path {path}: ")
    assert "\n" not in message
    for part in parts:
        assert part in message


class TestRoundTrip:
    def test_what_is_known_of_the_images(self, network, tmp_path):
        images = ImageSpec(tuple("abcdefg"), (32, 48), (0.1, 0.2, 1 / 3), (0.25, 0.5, 1.0))
        description = describe_network(network.state_dict(), model="resnet8", num_classes=7, config={}, images=images)
        save_checkpoint(tmp_path / "a.pt", description)
        stored = load_checkpoint(tmp_path / "a.pt")
        assert (stored["class_names"], stored["image_size"], stored["std"]) == (list("abcdefg"), [32, 48], [0.25, 0.5, 1.0])
        assert load_network(tmp_path / "a.pt", flag="--t-path").images == images

    def test_a_file_of_an_older_version_says_nothing_of_them(self, network, tmp_path):
        assert load_network(write(tmp_path / "a.pt", network), flag="--t-path").images is None

    def test_versions_of_layers(self, network, tmp_path):
        path = write(tmp_path / "a.pt", network)
        assert load_checkpoint(path)["state_dict"]._metadata == network.state_dict()._metadata
        old = network.state_dict()
        for versions in (None, {"": {"version": 1}}, ["no mapping"]):
            old._metadata = versions
            torch.save(old, tmp_path / "old.pt")
            loaded = load_network(tmp_path / "old.pt", flag="--t-path", model="resnet8").network
            assert torch.equal(loaded(IMAGES), network(IMAGES))

    def test_dense(self, network, tmp_path):
        file = load_network(write(tmp_path / "a.pt", network), flag="--t-path", model="resnet8")
        assert (file.model, file.num_classes, file.kept, file.compact) == ("resnet8", 7, {}, False)
        assert file.metrics == {"top1": 88.5}
        assert not file.network.training
        assert torch.equal(file.network(IMAGES), network(IMAGES))

    def test_compact(self, network, tmp_path):
        small = narrow(copy.deepcopy(network), KEPT).eval()
        description = describe_network(
            small.state_dict(), model="resnet8", num_classes=7, config={}, kept=small.kept, compact=True
        )
        save_checkpoint(tmp_path / "a.pt", {**description, "epoch": 0, "metrics": {}})
        file = load_network(tmp_path / "a.pt", flag="--t-path")
        assert file.compact
        assert file.network.get_submodule("stage_1.0.conv_a").out_channels == 3
        assert torch.equal(file.network(IMAGES), small(IMAGES))

    def test_description_is_a_copy_in_plain_layout(self, network):
        trained = copy.deepcopy(network).to(memory_format=torch.channels_last)
        described = describe_network(trained.state_dict(), model="resnet8", num_classes=7, config={})["state_dict"]
        with torch.no_grad():
            trained.conv_1_3x3.weight.zero_()
        assert torch.equal(described["conv_1_3x3.weight"], network.conv_1_3x3.weight)
        assert described["conv_1_3x3.weight"].is_contiguous()

    def test_holds_nothing_but_tensors_and_plain_values(self, network, tmp_path):
        checkpoint = load_checkpoint(write(tmp_path / "a.pt", network))
        assert set(checkpoint) == {"format", "model", "num_classes", "state_dict", "config", "epoch", "metrics"}


class TestBareStateDict:
    """Files that people already have."""

    @pytest.mark.parametrize("wrap", [lambda state: state, lambda state: {"state_dict": state}], ids=["bare", "wrapped"])
    @pytest.mark.parametrize("prefix", ["", "module."])
    def test_loads(self, wrap, prefix, network, tmp_path):
        state = {prefix + name: value for name, value in network.state_dict().items()}
        torch.save(wrap(state), tmp_path / "a.pt")
        file = load_network(tmp_path / "a.pt", flag="--t-path", model="resnet8")
        assert file.num_classes == 7
        assert torch.equal(file.network(IMAGES), network(IMAGES))

    def test_without_batch_counters(self, network, tmp_path):
        state = {name: value for name, value in network.state_dict().items() if "num_batches" not in name}
        torch.save(state, tmp_path / "a.pt")
        assert torch.equal(load_network(tmp_path / "a.pt", flag="--t-path", model="resnet8").network(IMAGES), network(IMAGES))

    @pytest.mark.parametrize(
        ("wrap", "remark"),
        [
            (lambda state: {"epoch": 3, "model": state}, "model"),
            (lambda state: {"net": named("module.", state), "acc": np.float64(91.2)}, "net, names without module."),
            (lambda state: {"params": state, "params_ema": state}, "params, not params_ema"),
            (lambda state: {"model_state_dict": state, "args": argparse.Namespace(lr=0.1)}, "model_state_dict"),
            (lambda state: {"state_dict_ema": state}, "state_dict_ema"),
            (lambda state: {"model": {"state_dict": state}}, "state_dict of model"),
            (
                lambda state: {"state_dict": {**named("model.", state), "loss.weight": ONE}},
                "names without model., not loss.weight",
            ),
            (lambda state: named("_orig_mod.module.", state), "names without _orig_mod.module."),
            (lambda state: named("backbone.", state), "names without backbone."),
            (lambda state: {**named("module.", state), "n_averaged": ONE}, "names without module., not n_averaged"),
            (lambda state: {**state, "total_ops": ONE, "bn_1.total_params": ONE}, "not total_ops, bn_1.total_params"),
            (
                lambda state: {**named("module.teacher.", state), **named("module.student.", state)},
                "names without module.student.",
            ),
            (lambda state: {key.replace("stage_1.", "stage_1._orig_mod."): value for key, value in state.items()}, "inside"),
        ],
    )
    def test_as_others_trainers_write_it(self, wrap, remark, network, tmp_path):
        torch.save(wrap(network.state_dict()), tmp_path / "a.pt")
        file = load_network(tmp_path / "a.pt", flag="--t-path", model="resnet8")
        assert file.num_classes == 7
        assert torch.equal(file.network(IMAGES), network(IMAGES))
        assert remark in file.remark and "\n" not in file.remark and file.remark.startswith("took ")

    def test_nothing_is_said_of_a_plain_one(self, network, tmp_path):
        torch.save(network.state_dict(), tmp_path / "a.pt")
        assert load_network(tmp_path / "a.pt", flag="--t-path", model="resnet8").remark is None

    def test_safetensors(self, network, tmp_path):
        save_file(network.state_dict(), tmp_path / "a.safetensors")
        file = load_network(tmp_path / "a.safetensors", flag="--t-path", model="resnet8")
        assert torch.equal(file.network(IMAGES), network(IMAGES))

    @pytest.mark.parametrize("name", ["conv_head", "head_first", "recurrent", "projected", "cosine", "wrapped"])
    def test_classes_are_counted_by_fitting(self, name, tmp_path):
        """The last matrix of these networks is none of the classifier's, or their own names begin as wrappers do."""
        model = f"{FILE}:{name}"
        network = build_model(model, num_classes=10).eval()
        torch.save(named("module.", network.state_dict()), tmp_path / "a.pt")
        file = load_network(tmp_path / "a.pt", flag="--t-path", model=model)
        assert file.num_classes == 10
        assert torch.equal(file.network(IMAGES), network(IMAGES))

    def test_needs_the_name_of_its_network(self, network, tmp_path):
        torch.save(network.state_dict(), tmp_path / "a.pt")
        refuse(tmp_path / "a.pt", "name it with --t-model", model_flag="--t-model")

    def test_of_another_network(self, network, tmp_path):
        torch.save(network.state_dict(), tmp_path / "a.pt")
        refuse(tmp_path / "a.pt", "does not fit resnet32", "stage_1.1.conv_a.weight is missing", "more", model="resnet32")

    def test_without_a_classifier(self, tmp_path):
        torch.save({"weight": torch.zeros(3)}, tmp_path / "a.pt")
        refuse(tmp_path / "a.pt", "holds no linear layer", model="resnet8")

    def test_no_tensors(self, tmp_path):
        torch.save({"lr": 0.1}, tmp_path / "a.pt")
        refuse(tmp_path / "a.pt", "holds no state_dict", model="resnet8")


class TestRefused:
    def test_another_model(self, network, tmp_path):
        path = write(tmp_path / "a.pt", network)
        refuse(path, "holds a resnet8, not the resnet56 of --t-model", model="resnet56", model_flag="--t-model")

    @pytest.mark.parametrize(
        ("changes", "part"),
        [
            ({"format": 2}, "checkpoint format 2 is newer than what this version reads (1)"),
            ({"format": "one"}, "checkpoint format 'one' is none that this version reads (1)"),
            ({"model": "resnet21"}, "unknown network 'resnet21': the nearest are resnet"),
            ({"model": ["resnet8"]}, "holds a network ['resnet8']"),
            ({"num_classes": 0}, "num_classes is 0, expected the number of rows of its linear layer"),
            ({"num_classes": "7"}, "num_classes is '7'"),
            ({"num_classes": 10**12}, "num_classes is 1000000000000"),
            ({"num_classes": 10}, "classifier.weight is (7, 64), not (10, 64)"),
            ({"state_dict": {}}, "holds no state_dict"),
            ({"state_dict": {"a": 1}}, "holds no state_dict"),
            ({"state_dict": {"a": torch.tensor(1)}}, "num_classes is 7"),
            ({"kept": [1, 2]}, "kept is no mapping"),
            ({"kept": {"conv_1_3x3": 3}}, "kept is no mapping"),
            ({"kept": {"conv_1_3x3": [True]}}, "kept is no mapping"),
            ({"kept": {3: [0]}}, "kept is no mapping"),
            ({"kept": {"conv_9": [0]}}, "keeps channels of conv_9, which resnet8 has not"),
            ({"format": True}, "checkpoint format True is none that this version reads (1)"),
            ({"num_classes": True}, "num_classes is True"),
            ({"compact": 1}, "its compact is 1, expected True or False"),
            ({"epoch": [3]}, "its epoch is [3], expected a whole number"),
            ({"metrics": [1]}, "its metrics is [1], expected a mapping"),
            ({"config": "lr"}, "its config is 'lr', expected a mapping"),
            ({"state_dict": {1: torch.zeros(7)}}, "holds no state_dict"),
        ],
    )
    def test_fields(self, changes, part, network, tmp_path):
        refuse(write(tmp_path / "a.pt", network, **changes), part)

    @pytest.mark.parametrize(
        ("kept", "part"),
        [
            ({"no_such_layer": [0]}, "no_such_layer"),
            ({"conv_1_3x3": [0, 99]}, "99"),
            ({"conv_1_3x3": [-1]}, "-1"),
            ({"conv_1_3x3": [2, 1]}, "conv_1_3x3"),
            ({"conv_1_3x3": [1, 1]}, "conv_1_3x3"),
            ({"conv_1_3x3": ["a"]}, "kept is no mapping"),
        ],
    )
    def test_channels_of_a_compact_network(self, kept, part, network, tmp_path):
        refuse(write(tmp_path / "a.pt", network, kept=kept, compact=True), part)

    def test_names_and_shapes(self, network, tmp_path):
        state = dict(network.state_dict())
        del state["conv_1_3x3.weight"]
        state["conv_one.weight"] = torch.zeros(1)
        state["bn_1.weight"] = torch.zeros(17)
        path = write(tmp_path / "a.pt", network, state_dict=state)
        refuse(path, "conv_1_3x3.weight is missing", "conv_one.weight is unknown", "bn_1.weight is (17,), not (16,)")

    @pytest.mark.parametrize("value", [float("nan"), float("inf")])
    def test_numbers_that_are_none(self, value, network, tmp_path):
        state = {**network.state_dict(), "bn_1.running_var": torch.full((16,), value)}
        refuse(write(tmp_path / "a.pt", network, state_dict=state), "bn_1.running_var holds NaN or infinite numbers")

    @pytest.mark.parametrize("dtype", [torch.bool, torch.int8])
    def test_numbers_of_another_kind(self, dtype, network, tmp_path):
        state = {**network.state_dict(), "bn_1.weight": torch.ones(16, dtype=dtype)}
        refuse(
            write(tmp_path / "a.pt", network, state_dict=state), f"bn_1.weight holds numbers of {dtype}, expected torch.float32"
        )

    def test_numbers_that_are_too_large_for_the_network(self, network, tmp_path):
        state = {**network.state_dict(), "bn_1.weight": torch.full((16,), 1e300, dtype=torch.float64)}
        refuse(write(tmp_path / "a.pt", network, state_dict=state), "bn_1.weight holds NaN or infinite numbers")

    def test_negative_variances(self, network, tmp_path):
        state = {**network.state_dict(), "bn_1.running_var": torch.full((16,), -0.5)}
        refuse(write(tmp_path / "a.pt", network, state_dict=state), "bn_1.running_var holds a negative variance, -0.5")

    @pytest.mark.parametrize("versions", [3, {1: {}}, {"": 3}, {"": {"version": "x"}}])
    def test_versions_of_modules_that_are_none_do_not_count(self, versions, network, tmp_path):
        state = network.state_dict()
        state._metadata = versions
        torch.save(state, tmp_path / "a.pt")
        assert load_network(tmp_path / "a.pt", flag="--t-path", model="resnet8").num_classes == 7

    def test_methods_of_a_mapping_that_are_none(self, network, tmp_path):
        state = network.state_dict()
        state.values = 3
        torch.save(state, tmp_path / "a.pt")
        refuse(tmp_path / "a.pt", "refused, a mapping has attributes of its own", model="resnet8")

    @pytest.mark.parametrize("name", ["q" * 10**5, "a\nb", "\x1b[2J", "\ud800"])
    def test_long_and_unprintable_names(self, name, network, tmp_path):
        with pytest.raises(UserError) as raised:
            load_network(write(tmp_path / "a.pt", network, model=name), flag="")
        known = str(raised.value).index(": choose")
        assert known < len(str(tmp_path)) + 250
        assert str(raised.value).isprintable()
        state = {name + str(number): torch.zeros(7) for number in range(9)}
        with pytest.raises(UserError) as raised:
            load_network(write(tmp_path / "a.pt", network, state_dict=state), flag="")
        assert len(str(raised.value)) < len(str(tmp_path)) + 300
        assert str(raised.value).isprintable()

    def test_a_small_file_of_a_network_with_very_many_classes(self, network, tmp_path):
        state = {"fc3.bias": torch.zeros(300_000)}
        path = write(tmp_path / "a.pt", network, model="alexnet", state_dict=state, num_classes=300_000)
        refuse(path, "its alexnet with 300000 classes would take ")

    def test_says_how_many_more_differ(self, network, tmp_path):
        refuse(write(tmp_path / "a.pt", network, state_dict={"a": torch.zeros(7)}), "and ", " more")
