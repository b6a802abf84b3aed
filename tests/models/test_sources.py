"""Networks of timm, of torchvision and of people's own files, by name."""

import builtins
import sys
from pathlib import Path
from urllib.error import URLError

import pytest
import torch
import torchvision
from networks_of_others import FILE

from models import build_model, check_model, trusted_model
from utils.errors import UserError

needs_timm = pytest.mark.skipif("timm" not in sys.modules and not __import__("importlib.util").util.find_spec("timm"),
                                reason="timm is not installed")  # fmt: skip


@pytest.mark.parametrize(
    "name",
    [
        "torchvision/mobilenet_v3_small",
        "torchvision/squeezenet1_1",
        "torchvision/googlenet",
        f"{FILE}:small",
        pytest.param("timm/mobilenetv3_small_050", marks=needs_timm),
        pytest.param("timm/resnet10t", marks=needs_timm),
    ],
)
def test_a_name_gives_the_network_for_so_many_classes(name):
    check_model(name)
    network = build_model(name, num_classes=7)
    assert network.training
    assert network.eval()(torch.randn(2, 3, 64, 64)).shape == (2, 7)


@needs_timm
def test_the_keys_are_the_networks_own():
    import timm

    assert list(build_model("timm/resnet10t", num_classes=3).state_dict()) == list(timm.create_model("resnet10t").state_dict())


def test_the_same_seed_gives_the_same_network():
    def state():
        torch.manual_seed(5)
        return build_model("torchvision/squeezenet1_1", num_classes=3).state_dict()

    first, second = state(), state()
    assert all(torch.equal(first[key], second[key]) for key in first)


class TestUnknown:
    @pytest.mark.parametrize(
        ("name", "nearest"),
        [
            ("resnet21", "resnet20"),
            ("mobilenet_v2", "torchvision/mobilenet_v2"),
            ("torchvision/resnet19", "torchvision/resnet18"),
            pytest.param("timm/resnet10", "timm/resnet10t", marks=needs_timm),
            pytest.param("timm/resnet10t.no_such_tag", "timm/resnet10t", marks=needs_timm),
            pytest.param("timm/hf-hub:someone/resnet10t", "unknown network", marks=needs_timm),
        ],
    )
    def test_lists_the_nearest(self, name, nearest):
        with pytest.raises(UserError, match=nearest):
            check_model(name)

    def test_detection_networks_of_torchvision_are_none(self):
        with pytest.raises(UserError, match="unknown network"):
            check_model("torchvision/fasterrcnn_resnet50_fpn")

    def test_a_long_name_is_cut(self):
        with pytest.raises(UserError) as raised:
            check_model("resnet" * 100_000)
        assert len(str(raised.value)) < 500


def test_without_timm_the_command_that_installs_it_is_named(monkeypatch):
    imports = builtins.__import__

    def without_timm(name, *arguments, **options):
        if name == "timm":
            raise ImportError("No module named 'timm'")
        return imports(name, *arguments, **options)

    monkeypatch.setattr(builtins, "__import__", without_timm)
    with pytest.raises(UserError, match=r"timm is not installed, pip install timm$"):
        build_model("timm/resnet10t", num_classes=10)


@pytest.mark.parametrize(
    ("function", "message"),
    [
        ("no_network", "must return an nn.Module, not str"),
        ("broken", r"networks_of_others\.py line \d+: IndexError: no such width"),
        ("without_classes", "unexpected keyword argument 'num_classes'"),
    ],
)
def test_a_function_that_gives_no_network_is_named(function, message):
    with pytest.raises(UserError, match=message):
        build_model(f"{FILE}:{function}", num_classes=3)


class TestPretrained:
    def test_torchvisions_weights_are_found_on_the_disk(self, tmp_path, monkeypatch):
        monkeypatch.setenv("TORCH_HOME", str(tmp_path))
        published = torchvision.models.squeezenet1_1().state_dict()
        url = torchvision.models.get_model_weights("squeezenet1_1").DEFAULT.url
        path = Path(torch.hub.get_dir()) / "checkpoints" / url.rpartition("/")[2]
        path.parent.mkdir(parents=True)
        torch.save(published, path)
        network = build_model("torchvision/squeezenet1_1", num_classes=7, pretrained=True)
        state = network.state_dict()
        new = {key for key in state if state[key].shape != published[key].shape or not torch.equal(state[key], published[key])}
        assert new == {"classifier.1.weight", "classifier.1.bias"}
        assert len(state["classifier.1.weight"]) == 7

    def test_weights_that_cannot_be_had_are_one_line(self, tmp_path, monkeypatch):
        monkeypatch.setenv("TORCH_HOME", str(tmp_path))

        def fail(*_, **__):
            raise URLError("no network")

        monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", fail)
        with pytest.raises(
            UserError, match=r"torchvision/squeezenet1_1 could not be downloaded from http.*TORCH_HOME.*no network"
        ):
            build_model("torchvision/squeezenet1_1", num_classes=7, pretrained=True)

    @needs_timm
    def test_timms_weights_that_cannot_be_had_are_one_line(self, tmp_path, monkeypatch):
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
        with pytest.raises(UserError, match=r"timm/resnet10t are not in HF_HOME and could not be downloaded") as raised:
            build_model("timm/resnet10t", num_classes=7, pretrained=True)
        assert "\n" not in str(raised.value)

    @needs_timm
    def test_timms_weights_are_found_on_the_disk(self, tmp_path, monkeypatch):
        import timm
        from safetensors.torch import save_file

        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
        published = timm.create_model("resnet10t")
        folder = tmp_path / f"models--{published.pretrained_cfg['hf_hub_id'].replace('/', '--')}"
        snapshot = folder / "snapshots" / ("0" * 40)
        for place in (snapshot, folder / "refs"):
            place.mkdir(parents=True)
        (folder / "refs" / "main").write_text(snapshot.name)
        save_file(published.state_dict(), snapshot / "model.safetensors")
        network = build_model("timm/resnet10t", num_classes=7, pretrained=True)
        assert torch.equal(network.layer1[0].conv1.weight, published.layer1[0].conv1.weight)
        assert network.fc.weight.shape == (7, 512)

    @needs_timm
    def test_of_a_network_without_weights_is_refused(self):
        with pytest.raises(UserError, match="no published weights for 'timm/efficientnet_b8'"):
            build_model("timm/efficientnet_b8", num_classes=7, pretrained=True)

    def test_of_a_file_is_refused(self):
        with pytest.raises(UserError, match="no published weights"):
            build_model(f"{FILE}:small", num_classes=7, pretrained=True)


class TestTrusted:
    def test_a_file_name_needs_the_users_word(self):
        with pytest.raises(UserError, match=r"never runs because a file names it; say where yours is, --t-model FILE\.py:small"):
            trusted_model("nets.py:small", None, model_flag="--t-model")

    def test_the_users_file_may_lie_elsewhere(self):
        assert trusted_model("nets.py:small", "lib/nets.py:small") == "lib/nets.py:small"

    @pytest.mark.parametrize(("named", "given"), [("nets.py:small", "nets.py:large"), ("nets.py:small", "resnet20"),
                                                  ("resnet20", "nets.py:small"), ("resnet20", "resnet32")])  # fmt: skip
    def test_another_network_is_refused(self, named, given):
        with pytest.raises(UserError, match=f"holds a {named}, not the {given} of --model"):
            trusted_model(named, given)
