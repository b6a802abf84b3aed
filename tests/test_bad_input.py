"""Bad command lines and files: each ends with status 2 and one line that names the flag and the value, and writes nothing."""

import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from utils.files import load_checkpoint, save_checkpoint

REPOSITORY = Path(__file__).resolve().parent.parent


class _Malicious:
    """Makes a file when it is unpickled."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@pytest.fixture(scope="module")
def files(tmp_path_factory, trained_run) -> dict[str, str]:
    """Damaged, foreign and malicious files by name, and the whole checkpoint that they come from."""
    folder = tmp_path_factory.mktemp("files")
    good = trained_run / "model_best.pt"
    content = good.read_bytes()
    checkpoint = load_checkpoint(good)
    state = checkpoint["state_dict"]
    paths = {name: folder / name for name in ("truncated", "flipped", "text", "empty", "malicious", "list")}
    paths["truncated"].write_bytes(content[: len(content) // 2])
    middle = len(content) // 2
    paths["flipped"].write_bytes(content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :])
    paths["text"].write_text("no network")
    paths["empty"].write_bytes(b"")
    with open(paths["malicious"], "wb") as file:
        pickle.dump(_Malicious(folder / "owned"), file)
    torch.save([1, 2], paths["list"])
    five_classes = {"classifier.weight": torch.ones(5, 64), "classifier.bias": torch.ones(5)}
    variants = {
        "newer": {**checkpoint, "format": 99},
        "unknown_model": {**checkpoint, "model": "resnet999"},
        "missing_layer": {**checkpoint, "state_dict": {key: value for key, value in state.items() if "classifier" not in key}},
        "wrong_shape": {**checkpoint, "state_dict": {**state, "bn_1.weight": torch.ones(3)}},
        "five_classes": {**checkpoint, "num_classes": 5, "state_dict": {**state, **five_classes}},
        "half_pruned": {**checkpoint, "kept": {"conv_1_3x3": [0, 1]}},
        "kept_too_far": {**checkpoint, "kept": {"conv_1_3x3": [0, 99]}, "compact": True},
    }
    for name, variant in variants.items():
        paths[name] = folder / name
        save_checkpoint(paths[name], variant)
    paths["bare"] = folder / "bare"
    torch.save(state, paths["bare"])
    return {"good": str(good), "folder": str(folder), **{name: str(path) for name, path in paths.items()}}


@pytest.fixture(scope="module")
def images(tmp_path_factory, image_writer) -> dict[str, str]:
    """Folders of images that each have one thing wrong."""
    root = tmp_path_factory.mktemp("images")

    def build(name: str, **sizes: tuple[int, ...]) -> Path:
        for place in ("train/cat", "train/dog", "test/cat", "test/dog"):
            image_writer(root / name / place, sizes=sizes.get(place.replace("/", "_"), (8, 8)))
        return root / name

    build("empty_class", train_dog=())
    (build("unreadable") / "train/cat/0.png").write_bytes(b"no image")
    (build("other_classes") / "test/dog").rename(root / "other_classes/test/horse")
    (root / "no_test/train/cat").mkdir(parents=True)
    (root / "no_classes/train").mkdir(parents=True)
    (root / "no_classes/test").mkdir()
    return {path.name: str(path) for path in root.iterdir()}


TRAIN = "initial_train.py --model resnet20"
PRUNE = "pruning.py --t-model resnet20 --t-path {good} --s-copy-t"
QUANTIZE = "quantize_encode.py --load-path {good}"

# command line (words in braces are files of the fixtures), and what its message must name
BAD_COMMANDS = [
    ("initial_train.py", "--model"),
    ("initial_train.py --model resnet21", "resnet21"),
    (f"{TRAIN} --dataset mnist", "mnist"),
    (f"{TRAIN} --no-such-flag", "--no-such-flag"),
    (f"{TRAIN} --lr 0", "--lr"),
    (f"{TRAIN} --lr nan", "--lr"),
    (f"{TRAIN} --lr fast", "fast"),
    (f"{TRAIN} --momentum 1", "--momentum"),
    (f"{TRAIN} --weight-decay -1", "--weight-decay"),
    (f"{TRAIN} --n-epochs 0", "--n-epochs"),
    (f"{TRAIN} --batch-size 0", "--batch-size"),
    (f"{TRAIN} --seed -1", "--seed"),
    (f"{TRAIN} --schedule 1 2 --lr-drops 0.1", "--lr-drops"),
    (f"{TRAIN} --schedule 1 2", "--lr-drops"),
    (f"{TRAIN} --schedule 2 1 --lr-drops 0.1 0.1", "--schedule"),
    (f"{TRAIN} --schedule 1 --lr-drops 0", "--lr-drops"),
    (f"{TRAIN} --pretrained", "--pretrained"),
    (f"{TRAIN} --run-name a/b", "a/b"),
    (f"{TRAIN} --log-name ..", "--log-name"),
    (f"{TRAIN} --resume {{folder}}", "--resume"),
    (f"{TRAIN} --sync-bn", "--sync-bn"),
    (f"{TRAIN} --dataset cifar10 --data-dir {{folder}} --dry-run", "cifar-10-python.tar.gz"),
    (f"{TRAIN} --dataset folder --data-dir /no/such/folder", "/no/such/folder"),
    (f"{TRAIN} --dataset folder --data-dir {{empty_class}}", "empty_class/train/dog"),
    (f"{TRAIN} --dataset folder --data-dir {{unreadable}}", "0.png"),
    (f"{TRAIN} --dataset folder --data-dir {{other_classes}}", "class folders"),
    (f"{TRAIN} --dataset folder --data-dir {{no_test}}", "test"),
    (f"{TRAIN} --dataset folder --data-dir {{no_classes}}", "no_classes/train"),
    ("initial_train.py --evaluate", "--load-path"),
    ("initial_train.py --evaluate --load-path {five_classes}", "5 classes"),
    ("pruning.py", "--s-model"),
    ("pruning.py --t-model resnet20 --s-copy-t", "--t-path"),
    ("pruning.py --t-model resnet20 --t-path {good} --s-model resnet32 --s-copy-t", "resnet32"),
    (f"{PRUNE} --s-path {{good}}", "--s-path"),
    (f"{PRUNE} --prune-mode filter-x", "filter-x"),
    (f"{PRUNE} --prune-rates 0", "--prune-rates"),
    (f"{PRUNE} --prune-rates 1.5", "1.5"),
    (f"{PRUNE} --prune-rates 0.5 0.6", "19 conv layers"),
    (f"{PRUNE} --exclude-layers stem", "stem"),
    (f"{PRUNE} --channel-multiple 0", "--channel-multiple"),
    (f"{PRUNE} --prune-interval 2", "--prune-interval"),
    (f"{PRUNE} --soft-prune", "--soft-prune"),
    (f"{PRUNE} --soft-prune --prune-mode filter-r", "filter-r"),
    (f"{PRUNE} --soft-prune --prune-mode filter-a --train-form compact", "--train-form"),
    (f"{PRUNE} --gamma 2", "--gamma"),
    (f"{PRUNE} --samp-batches 0", "--samp-batches"),
    (f"{PRUNE} --distill fitnet", "fitnet"),
    (f"{PRUNE} --distill none kd", "--distill"),
    (f"{PRUNE} --distill at at", "--distill"),
    (f"{PRUNE} --distill kd --alpha 0", "--alpha"),
    (f"{PRUNE} --distill at --betas 1 2", "--betas"),
    (f"{PRUNE} --betas 100", "--betas"),
    (f"{PRUNE} --distill hap --hap-ts 100", "--hap-ts 100"),
    ("pruning.py --s-model resnet20 --distill at", "--t-path"),
    ("pruning.py --t-model resnet32 --t-path {good} --s-copy-t", "resnet32"),
    *[
        (f"pruning.py --t-model resnet20 --t-path {{{name}}} --s-copy-t", what)
        for name, what in {
            "truncated": "truncated",
            "flipped": "flipped",
            "text": "text",
            "empty": "empty",
            "malicious": "refused",
            "list": "list",
            "newer": "99",
            "unknown_model": "resnet999",
            "missing_layer": "classifier.weight is missing",
            "wrong_shape": "bn_1.weight is (3,)",
            "five_classes": "5 classes",
            "half_pruned": "conv_1_3x3",
            "kept_too_far": "99",
        }.items()
    ],
    ("pruning.py --t-path {bare} --s-copy-t", "--t-model"),
    ("pruning.py --t-model resnet32 --t-path {bare} --s-copy-t", "does not fit resnet32"),
    ("pruning.py --t-path /no/such/file --s-copy-t", "/no/such/file"),
    ("pruning.py --evaluate", "--t-path"),
    ("quantize_encode.py", "--load-path"),
    (f"{QUANTIZE} --quan-bits 0", "--quan-bits"),
    (f"{QUANTIZE} --quan-bits 17", "17"),
    (f"{QUANTIZE} --quan-bits stem=4", "stem"),
    (f"{QUANTIZE} --quan-mode half-quan", "half-quan"),
    (f"{QUANTIZE} --model resnet32", "resnet32"),
    ("quantize_encode.py --inspect {text}", "text"),
    ("quantize_encode.py --decode {text}", "--output"),
    ("quantize_encode.py --decode {text} --output {good}", "exists"),
    ("export.py --load-path {good}", "--output"),
    ("export.py --load-path {good} --output {good}", "exists"),
    ("export.py --load-path {good} --output /no/such/folder/net.onnx", "/no/such/folder"),
]


@pytest.mark.parametrize(("command", "named"), BAD_COMMANDS)
def test_one_line_and_nothing_written(command: str, named: str, files, images, tmp_path, run_script: Callable):
    script, *words = command.format(**files, **images).split()
    run_flags = [] if script == "export.py" else ["--save-dir", str(tmp_path / "saves"), "--device", "cpu"]
    before = sorted(Path(files["folder"]).iterdir())
    ended = run_script(script.removesuffix(".py"), *words, *run_flags)
    assert ended.status == 2
    assert named in ended.errors
    assert ended.errors.startswith(f"{script}: error: ")
    assert ended.errors.count("\n") == 1 and ended.errors.endswith("\n")
    assert list(tmp_path.iterdir()) == []
    assert sorted(Path(files["folder"]).iterdir()) == before  # and no code of a file has run


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA device")
@pytest.mark.parametrize("flags", [("--device", "cuda"), ("--dev-idx", "3")])
def test_a_cuda_device_that_is_not_there(flags, tmp_path, run_script: Callable):
    ended = run_script("initial_train", "--model", "resnet20", *flags, "--save-dir", str(tmp_path / "saves"))
    assert ended.status == 2
    assert " ".join(flags) in ended.errors and ended.errors.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_the_real_command_prints_no_traceback(tmp_path):
    command = [
        sys.executable,
        "pruning.py",
        "--t-path",
        str(tmp_path / "missing.pt"),
        "--s-copy-t",
        "--save-dir",
        str(tmp_path / "saves"),
    ]
    ended = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert ended.returncode == 2
    assert ended.stdout == ""
    assert ended.stderr == f"pruning.py: error: --t-path {tmp_path / 'missing.pt'}: no such file\n"
    assert list(tmp_path.iterdir()) == []
