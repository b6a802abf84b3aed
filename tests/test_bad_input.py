"""Bad command lines and files: one line on stderr that names flag and value, exit status 2, and nothing written."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from forked import run_forked

from models import build_model
from models.network_file import describe_network
from utils.checkpoints import load_checkpoint, save_checkpoint
from utils.training.trainer import Trainer

NO_CUDA = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")


class Malicious:
    """Unpickling it makes a folder."""

    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self):
        return (os.mkdir, (str(self.marker),))


@pytest.fixture(scope="module")
def places(tmp_path_factory, trained_run, image_writer, mixed_size_images) -> dict[str, Path]:
    """Good and bad files and folders, by the name that the table below calls them."""
    folder = tmp_path_factory.mktemp("places")
    places = {name: folder / name for name in (*CHECKPOINTS, "gone", "text", "truncated", "malicious", "marker", "flipped")}
    places |= {"teacher": trained_run / "model_best.pt", "run": trained_run, "trained": trained_run.parent, "folder": folder}
    write_checkpoints(places)
    write_damaged(places)
    return places | write_image_folders(folder, image_writer) | {"mixed": mixed_size_images}


CHECKPOINTS = ("resnet32", "seven_classes", "newer", "bare", "regrown", "nothing_pruned", "nan")


def write_checkpoints(places: dict[str, Path]) -> None:
    trained = load_checkpoint(places["teacher"])
    describe = {"model": "resnet8", "num_classes": 10, "config": {}}
    others = {
        "resnet32": describe_network(build_model("resnet32", num_classes=10).state_dict(), **{**describe, "model": "resnet32"}),
        "seven_classes": describe_network(build_model("resnet8", num_classes=7).state_dict(), **{**describe, "num_classes": 7}),
        "newer": {**trained, "format": 99},
        "regrown": describe_network(trained["state_dict"], **describe, kept={"stage_1.0.conv_a": [0, 1]}),
        "nan": describe_network(
            {
                name: torch.full_like(value, torch.nan) if value.ndim == 4 else value
                for name, value in trained["state_dict"].items()
            },
            **describe,
        ),
    }
    for name, checkpoint in others.items():
        save_checkpoint(places[name], checkpoint)
    torch.save(trained["state_dict"], places["bare"])


def write_damaged(places: dict[str, Path]) -> None:
    whole = places["teacher"].read_bytes()
    places["truncated"].write_bytes(whole[: len(whole) // 2])
    places["text"].write_text("version https://git-lfs.github.com/spec/v1\n")
    places["flipped"].write_bytes(whole[:100_000] + bytes([whole[100_000] ^ 4]) + whole[100_001:])
    torch.save({"state_dict": Malicious(places["marker"])}, places["malicious"])


def write_image_folders(folder: Path, image_writer) -> dict[str, Path]:
    """Sets of 8x8 images: a whole one, and one for each thing that can be wrong."""
    names = ("tiny", "no_test", "empty_class", "unreadable", "other_classes", "single")
    places = {name: folder / name for name in names}
    for name, path in places.items():
        count = 1 if name == "single" else 3
        labels = ("cat",) if name == "single" else ("cat", "dog")
        for split in ("train", "test"):
            for label in labels:
                image_writer(path / split / label, sizes=(8,) * count)
    shutil.rmtree(places["no_test"] / "test")
    for image in (places["empty_class"] / "train" / "dog").iterdir():
        image.unlink()
    (places["unreadable"] / "test" / "dog" / "1.png").write_bytes(b"no image")
    (places["other_classes"] / "test" / "dog").rename(places["other_classes"] / "test" / "wolf")
    return places


TRAIN, PRUNE, QUANTIZE = "initial_train", "pruning", "quantize_encode"
COPY = "--t-model resnet8 --t-path {teacher} --s-copy-t --prune-rates 0.6"

LONG_INT, LONG_NAME = "9" * 5000, "n" * 300

# script, command line, and what its error must say
COMMANDS = [
    (TRAIN, f"--model resnet8 --n-epochs {LONG_INT}", ["--n-epochs", "999...999", "whole number"]),
    (TRAIN, f"--model resnet8 --seed {10**400}", ["--seed", "2**63 - 1"]),
    (TRAIN, "--model resnet8 --limit-batches 99999999999999999999", ["--limit-batches", "too large"]),
    (TRAIN, "--model resnet8 --batch-size 99999999999999999999", ["--batch-size", "too large"]),
    (TRAIN, "--model resnet8 --workers 1000000", ["--workers", "'1000000'", "0 to 1024"]),
    (TRAIN, "--model resnet8 --lr 1e300", ["--lr", "'1e300' is too large"]),
    (TRAIN, "--model resnet8 --lr 1e-300", ["--lr", "'1e-300' is not a number above 0"]),
    (TRAIN, f"--model resnet8 --schedule 1 2 3 --lr-drops {'1e18 ' * 3}", ["--lr-drops", "too large a learning rate"]),
    (TRAIN, f"--model resnet8 --run-name {LONG_NAME}", ["--run-name", "too long for a file system"]),
    (TRAIN, f"--model resnet8 --save-dir /tmp/{LONG_NAME}", ["--save-dir", "too long for a file system"]),
    (TRAIN, f"--model resnet8 --dataset folder --data-dir {'d/' * 3000}", ["--data-dir", "too long for a file system"]),
    (TRAIN, f"--resume {LONG_NAME}", ["--resume", "too long for a file system"]),
    (TRAIN, f"--evaluate --load-path={LONG_NAME}", ["--load-path", "too long for a file system"]),
    (TRAIN, "--model resnet8 --run-name \udcff", ["--run-name '\\udcff'", "no text in UTF-8"]),
    (TRAIN, "--model resnet8 --save-dir=/tmp/\udcff", ["--save-dir '/tmp/\\udcff'", "no text in UTF-8"]),
    (TRAIN, "--model resnet8 --run-name .partial-run-x", ["--run-name '.partial-run-x'", "no dot"]),
    (TRAIN, "--model resnet8 --run-name a\x1b[2J", ["--run-name", "can be printed"]),
    (TRAIN, "--model resnet8 --log-name .profile", ["--log-name '.profile'", "no dot"]),
    (PRUNE, f"{COPY} --distill kd --kd-t 1e300", ["--kd-t", "'1e300' is too large"]),
    (PRUNE, f"{COPY} --distill kd --kd-t 1e-300", ["--kd-t", "'1e-300'"]),
    (PRUNE, f"{COPY} --samp-batches 1e20", ["--samp-batches", "'1e20'"]),
    (PRUNE, f"{COPY} --samp-batches {10**20}", ["--samp-batches", "too large"]),
    (PRUNE, f"{COPY} --channel-multiple {10**20}", ["--channel-multiple", "too large"]),
    (QUANTIZE, f"--load-path {{teacher}} --quan-bits conv_1_3x3={LONG_INT[:200]}", ["--quan-bits"]),
    (TRAIN, "", ["--model is required"]),
    (TRAIN, "--model resnet21", ["--model", "resnet21", "resnet20"]),
    (TRAIN, "--model resnet8 --dataset mnist", ["--dataset", "mnist", "cifar10"]),
    (TRAIN, "--model resnet8 --frobnicate 3", ["--frobnicate"]),
    (TRAIN, "--model resnet8 --mod", ["--mod"]),
    (TRAIN, "--model resnet8 --lr 0", ["--lr", "'0'", "above 0"]),
    (TRAIN, "--model resnet8 --lr nan", ["--lr", "'nan'"]),
    (TRAIN, "--model resnet8 --lr fast", ["--lr", "'fast'"]),
    (TRAIN, "--model resnet8 --lr", ["--lr"]),
    (TRAIN, "--model resnet8 --momentum 1", ["--momentum", "'1'"]),
    (TRAIN, "--model resnet8 --weight-decay -0.1", ["--weight-decay", "'-0.1'"]),
    (TRAIN, "--model resnet8 --schedule 1 60 --lr-drops 0.1", ["--lr-drops", "1 factors for the 2 epochs of --schedule"]),
    (TRAIN, "--model resnet8 --schedule 60", ["--lr-drops", "--schedule"]),
    (TRAIN, "--model resnet8 --lr-schedule exponential", ["--lr-schedule", "'exponential'", "steps", "linear", "cosine"]),
    (TRAIN, "--model resnet8 --lr-schedule linear --schedule 6 --lr-drops 1", ["--schedule 6", "--lr-schedule steps"]),
    (PRUNE, f"{COPY} --distill at --dkd-beta 2", ["--dkd-beta 2", "--distill dkd", "no effect"]),
    (PRUNE, f"{COPY} --distill dkd --alpha 0 --kd-standardize --hap-ts 2", ["--hap-ts 2", "--distill hap"]),
    (PRUNE, "--t-path {teacher} --s-model resnet18 --distill reviewkd", ["stages", "--distill reviewkd", "same number"]),
    (TRAIN, "--model resnet8 --n-epochs 5 --warmup-epochs 5", ["--warmup-epochs 5", "fewer than the 5 of --n-epochs"]),
    (TRAIN, "--model resnet8 --label-smoothing 1", ["--label-smoothing", "'1'", "below 1"]),
    (TRAIN, "--model resnet8 --schedule 60 1 --lr-drops 1 1", ["--schedule 60 1", "rise"]),
    (TRAIN, "--model resnet8 --schedule 1.5 --lr-drops 1", ["--schedule", "'1.5'"]),
    (TRAIN, "--model resnet8 --lr-drops 0 --schedule 1", ["--lr-drops", "'0'"]),
    (TRAIN, "--model resnet8 --batch-size 0", ["--batch-size", "'0'"]),
    (TRAIN, "--model resnet8 --batch-size 1", ["--batch-size 1", "batch normalisation"]),
    (TRAIN, "--model resnet8 --n-epochs 0", ["--n-epochs", "'0'"]),
    (TRAIN, "--model resnet8 --limit-batches 0", ["--limit-batches", "'0'"]),
    (TRAIN, "--model resnet8 --seed -1", ["--seed", "'-1'"]),
    (TRAIN, "--model resnet8 --seed 9223372036854775808", ["--seed"]),
    (TRAIN, "--model resnet8 --workers -1", ["--workers", "'-1'"]),
    (TRAIN, "--model resnet8 --checkpoint-interval 0", ["--checkpoint-interval", "'0'"]),
    (TRAIN, "--model resnet8 --checkpoint-minutes -1", ["--checkpoint-minutes", "'-1'"]),
    (TRAIN, "--model resnet8 --device tpu", ["--device", "tpu", "cuda"]),
    pytest.param(TRAIN, "--model resnet8 --device cuda", ["--device cuda", "no CUDA device"], marks=NO_CUDA),
    pytest.param(TRAIN, "--model resnet8 --dev-idx 7", ["--dev-idx 7", "no CUDA device"], marks=NO_CUDA),
    (TRAIN, "--model resnet8 --device cpu --sync-bn", ["--sync-bn", "CUDA"]),
    (TRAIN, "--model resnet8 --pretrained", ["--pretrained", "resnet8", "resnet50"]),
    (TRAIN, "--model resnet8 --run-name a/b", ["--run-name", "a/b"]),
    (TRAIN, "--model resnet8 --run-name ..", ["--run-name", ".."]),
    (TRAIN, "--model resnet8 --log-name ../log.txt", ["--log-name", "../log.txt"]),
    (TRAIN, "--model resnet8 --save-dir {text}", ["--save-dir", "{text}"]),
    (TRAIN, "--model resnet8 --save-dir {trained} --run-name teacher", ["--run-name teacher", "exists", "--resume"]),
    (TRAIN, "--model resnet8 --dataset folder --data-dir {gone}", ["--data-dir {gone}", "no such folder"]),
    (TRAIN, "--model resnet8 --dataset folder --data-dir {text}", ["--data-dir {text}"]),
    (TRAIN, "--model resnet8 --dataset folder --data-dir {no_test}", ["--data-dir {no_test}", "test"]),
    (TRAIN, "--model resnet8 --dataset folder --data-dir {empty_class}", ["{empty_class}/train/dog", "holds no image"]),
    (TRAIN, "--model resnet8 --dataset folder --data-dir {unreadable}", ["{unreadable}/test/dog/1.png", "cannot be read"]),
    (TRAIN, "--model resnet8 --dataset folder --data-dir {other_classes}", ["{other_classes}", "different class folders"]),
    (TRAIN, "--model resnet8 --dataset folder --data-dir {single}", ["--data-dir {single}", "1 training images are too few"]),
    (TRAIN, "--model alexnet --dataset folder --data-dir {tiny}", ["--model alexnet", "8x8"]),
    (TRAIN, "--model resnet8 --dataset cifar10 --data-dir {gone} --dry-run", ["{gone}/cifar-10-python.tar.gz", "--data-dir"]),
    (TRAIN, "--evaluate", ["--load-path is required"]),
    (TRAIN, "--evaluate --load-path {gone}", ["--load-path {gone}", "no such file"]),
    (TRAIN, "--evaluate --load-path {folder}", ["--load-path {folder}", "cannot be read"]),
    (TRAIN, "--evaluate --load-path {text}", ["--load-path {text}", "not a checkpoint file"]),
    (TRAIN, "--evaluate --load-path {truncated}", ["--load-path {truncated}", "damaged or truncated"]),
    (TRAIN, "--evaluate --load-path {flipped}", ["--load-path {flipped}", "damaged"]),
    (TRAIN, "--evaluate --load-path {malicious}", ["--load-path {malicious}", "refused"]),
    (TRAIN, "--evaluate --load-path {newer}", ["--load-path {newer}", "format 99", "newer"]),
    (TRAIN, "--evaluate --load-path {bare}", ["--load-path {bare}", "--model"]),
    (TRAIN, "--evaluate --load-path {bare} --model resnet32", ["--load-path {bare}", "does not fit resnet32", "is missing"]),
    (TRAIN, "--evaluate --load-path {teacher} --model resnet32", ["{teacher}", "holds a resnet8", "resnet32 of --model"]),
    (TRAIN, "--evaluate --load-path {seven_classes}", ["{seven_classes}", "7 classes", "digits has 10"]),
    (TRAIN, "--resume {gone}", ["--resume {gone}", "config.json"]),
    (TRAIN, "--resume {folder}", ["--resume {folder}", "config.json"]),
    (TRAIN, "--resume {run} --lr 0.2", ["--lr 0.2", "contradicts 0.05"]),
    (TRAIN, "--resume {run} --n-epochs 1", ["--n-epochs 1", "may only be raised"]),
    (TRAIN, "--resume {run} --model resnet32", ["--model resnet32", "contradicts resnet8"]),
    (TRAIN, "--resume {run} --evaluate", ["--evaluate", "contradicts"]),
    (PRUNE, "--resume {run}", ["--resume {run}", "a run of initial_train.py"]),
    (PRUNE, "", ["--s-model"]),
    (PRUNE, "--s-copy-t", ["--s-copy-t", "--t-path"]),
    (PRUNE, f"{COPY} --s-model resnet32", ["--s-copy-t", "resnet32", "resnet8"]),
    (PRUNE, f"{COPY} --s-path {{teacher}}", ["--s-path", "--s-copy-t"]),
    (PRUNE, f"{COPY} --prune-rates 0", ["--prune-rates", "'0'"]),
    (PRUNE, f"{COPY} --prune-rates 1.2", ["--prune-rates", "'1.2'"]),
    (PRUNE, f"{COPY} --prune-rates 0.5 0.5", ["--prune-rates", "2 values for 7 layers"]),
    (PRUNE, f"{COPY} --prune-mode filter-x", ["--prune-mode", "filter-x", "nggm"]),
    (PRUNE, f"{COPY} --exclude-layers conv1", ["--exclude-layers conv1", "conv_1_3x3"]),
    (PRUNE, f"{COPY} --channel-multiple 0", ["--channel-multiple", "'0'"]),
    (PRUNE, f"{COPY} --samp-batches 0", ["--samp-batches", "'0'"]),
    (PRUNE, f"{COPY} --gamma 1.5", ["--gamma", "'1.5'"]),
    (PRUNE, f"{COPY} --prune-mode filter-a --prune-interval 2", ["--prune-interval 2", "--soft-prune"]),
    (PRUNE, f"{COPY} --prune-mode filter-l2 --soft-prune --ema 0.9", ["--ema 0.9", "--soft-prune"]),
    (PRUNE, "--s-model resnet8 --ema 1", ["--ema", "'1'", "above 0 and below 1"]),
    (PRUNE, "--s-model resnet8 --ships trained", ["--ships trained", "only with --ema"]),
    (PRUNE, "--s-model resnet8 --budget macs=0", ["--budget", "'macs=0'", "above 0 and below 1"]),
    (PRUNE, "--s-model resnet8 --budget macs=1.5", ["--budget", "'macs=1.5'", "above 0 and below 1"]),
    (PRUNE, "--s-model resnet8 --budget joules=0.5", ["--budget", "'joules=0.5'", "macs=SHARE, params=SHARE, latency=SHARE"]),
    (PRUNE, "--s-model resnet8 --budget latency=1", ["--budget", "'latency=1'", "above 0 and below 1"]),
    (PRUNE, "--s-model resnet8 --budget latency=0.5 --budget-runtime tvm", ["--budget-runtime", "'tvm'", "torch"]),
    (
        PRUNE,
        "--s-model resnet8 --budget macs=0.5 --budget-threads 1",
        ["--budget-threads 1", "only with --budget latency=SHARE"],
    ),
    (
        PRUNE,
        "--s-model resnet8 --budget latency=0.5 --budget-table a --budget-batch-size 8",
        ["--budget-batch-size 8", "only without --budget-table"],
    ),
    (
        PRUNE,
        "--s-model resnet8 --budget latency=0.5 --budget-table nowhere.json",
        ["--budget-table nowhere.json", "No such file"],
    ),
    (
        PRUNE,
        "--s-model resnet8 --budget macs=0.5 --channel-multiple auto",
        ["--channel-multiple auto", "needs --budget latency=SHARE"],
    ),
    (PRUNE, "--s-model resnet8 --prune-rates 0.6 --reconstruct 0", ["--reconstruct", "'0'", "1 or more"]),
    (PRUNE, "--s-model resnet8 --prune-rates 0.6 --reconstruct 9999", ["--reconstruct 9999", "1437 training images"]),
    (
        PRUNE,
        "--s-model resnet8 --prune-rates 0.6 --soft-prune --prune-mode filter-l2 --reconstruct 8",
        ["--reconstruct 8", "grow"],
    ),
    (PRUNE, "--s-model resnet8 --prune-rates 0.6 --prune-steps 3 --n-epochs 2", ["--prune-steps 3", "--n-epochs 2 are fewer"]),
    (PRUNE, "--s-model resnet8 --prune-rates 0.6 --prune-steps 2 --train-form compact --ema 0.9", ["--ema 0.9", "--prune-st"]),
    (PRUNE, "--s-model resnet8 --prune-steps 3", ["--prune-steps 3", "only with --prune-rates below 1"]),
    (PRUNE, "--s-model resnet8 --sensitivity layers.txt", ["--sensitivity layers.txt", "must end in .json"]),
    (PRUNE, "--s-model resnet8 --sensitivity nowhere/layers.json", ["--sensitivity nowhere/layers.json", "cannot be written"]),
    (PRUNE, "--s-model resnet8 --sensitivity a.json --n-epochs 3", ["--n-epochs 3", "only without --sensitivity"]),
    *(
        (PRUNE, f"--s-model resnet8 --sensitivity a.json {flags}", [flags, "only without --sensitivity"])
        for flags in ("--recalibrate-bn 2", "--ema 0.9", "--momentum 0.5", "--warmup-epochs 1", "--checkpoint-minutes 2")
    ),
    (PRUNE, "--s-model resnet8 --sensitivity a.json --t-path {teacher}", ["--t-path {teacher}", "or with --s-copy-t"]),
    (
        PRUNE,
        "--s-model resnet8 --sensitivity a.json --prune-mode filter-a --crop-padding 2",
        ["--crop-padding 2", "or with --prune-mode filter-nggm or"],
    ),
    (
        PRUNE,
        "--s-model resnet8 --prune-rates 0.6 --sensitivity-drop 2",
        ["--sensitivity-drop 2", "with the file of --sensitivity"],
    ),
    (PRUNE, "--s-model resnet8 --prune-rates layers.json", ["layers.json", "No such file"]),
    (PRUNE, "--s-model resnet8 --prune-rates layers.json 0.5", ["--prune-rates layers.json", "stands alone"]),
    (PRUNE, "--s-model resnet8 --budget macs=0.5 --channel-multiple wide", ["--channel-multiple", "'wide'"]),
    (PRUNE, "--s-model resnet8 --budget macs=half", ["--budget", "'macs=half'"]),
    (PRUNE, "--s-model resnet8 --budget macs=0.01", ["--budget macs=0.01", "is the least"]),
    (PRUNE, "--s-model resnet8 --budget macs=0.5 --prune-rates 0.6", ["--prune-rates 0.6", "only without --budget"]),
    (PRUNE, "--s-model resnet8 --prune-rates 0.6 --allocation global", ["--allocation global", "only with --budget"]),
    (
        PRUNE,
        f"--s-model resnet8 --couple-channels --prune-rates {' 0.5' * 6} 0.6",
        ["conv_1_3x3", "the same channels", "one value"],
    ),
    (PRUNE, "--s-model resnet8 --couple-channels", ["--couple-channels", "where filters are pruned"]),
    (PRUNE, "--s-model resnet8 --prune-mode filter-a", ["--prune-mode filter-a", "only with --prune-rates below 1"]),
    (PRUNE, "--s-model resnet8 --prune-rates 1 1 1 --channel-multiple 8", ["--channel-multiple 8", "--prune-rates below 1"]),
    (PRUNE, f"{COPY} --prune-mode filter-r --soft-prune", ["--soft-prune", "filter-r", "filter-l2"]),
    (PRUNE, f"{COPY} --recalibrate-bn 0", ["--recalibrate-bn", "0"]),
    (PRUNE, f"{COPY} --prune-mode filter-a --soft-prune --train-form compact", ["--train-form compact", "--soft-prune"]),
    (PRUNE, f"{COPY} --prune-mode filter-a --gamma 0.5", ["--gamma 0.5", "no effect", "--prune-mode filter-nggm"]),
    (PRUNE, f"{COPY} --prune-mode filter-r --gm-distance euclidean", ["--gm-distance euclidean", "filter-gm or filter-nggm"]),
    (PRUNE, f"{COPY} --prune-mode filter-gm --samp-batches 3", ["--samp-batches 3", "--prune-mode filter-nggm"]),
    (PRUNE, f"{COPY} --distill at --hap-ts 3", ["--hap-ts 3", "with --distill hap"]),
    (PRUNE, f"{COPY} --kd-t 4", ["--kd-t 4", "with --distill"]),
    (PRUNE, f"{COPY} --distill at --alpha 0 --kd-t 4", ["--kd-t 4", "an --alpha above 0"]),
    (PRUNE, f"{COPY} --alpha 0.9", ["--alpha 0.9", "with --distill"]),
    (PRUNE, f"{COPY} --betas 50 3", ["--betas 50 3", "with --distill and one of"]),
    (PRUNE, f"{COPY} --sync-bn", ["--sync-bn", "several processes"]),
    (PRUNE, f"{COPY} --device cpu --dev-idx 0", ["--dev-idx 0", "without --device cpu"]),
    (PRUNE, "--s-model resnet8 --t-model resnet32", ["--t-model resnet32", "with --t-path"]),
    (PRUNE, f"{COPY} --evaluate", ["--s-copy-t", "without --evaluate"]),
    (PRUNE, "--t-path {teacher} --evaluate --s-model resnet8", ["--s-model resnet8", "with --s-path"]),
    (PRUNE, "--t-path {teacher} --evaluate --s-path {teacher}", ["--t-path {teacher}", "--s-path"]),
    (PRUNE, "--s-path {teacher} --evaluate --prune-rates 0.5", ["--prune-rates 0.5", "without --evaluate"]),
    (TRAIN, "--load-path {teacher} --evaluate --lr 0.01", ["--lr 0.01", "without --evaluate"]),
    (TRAIN, "--load-path {teacher} --evaluate --momentum 0.9", ["--momentum 0.9", "without --evaluate"]),
    (TRAIN, "--load-path {teacher} --evaluate --checkpoint-minutes 3", ["--checkpoint-minutes 3", "without --evaluate"]),
    (TRAIN, "--load-path {teacher} --evaluate --pretrained", ["--pretrained", "without --evaluate"]),
    (TRAIN, "--load-path {teacher} --pretrained", ["--pretrained", "without --load-path"]),
    (TRAIN, "--load-path {teacher} --model resnet32", ["{teacher}", "holds a resnet8", "resnet32 of --model"]),
    (TRAIN, "--load-path {teacher} --evaluate --dry-run", ["--dry-run", "without --evaluate"]),
    (QUANTIZE, "--inspect {text} --quan-bits 5", ["--quan-bits 5", "without --inspect"]),
    (QUANTIZE, "--decode {text} --output {gone} --lr 0.1", ["--lr 0.1", "without --decode"]),
    (QUANTIZE, "--load-path {teacher} --force", ["--force", "with --decode"]),
    (QUANTIZE, "--load-path {teacher} --evaluate --quan-mode all", ["--quan-mode all", "without --evaluate"]),
    (PRUNE, f"{COPY} --distill mse", ["--distill", "mse", "hap"]),
    (PRUNE, f"{COPY} --distill at at", ["--distill at at"]),
    (PRUNE, f"{COPY} --distill none at", ["--distill none at"]),
    (PRUNE, f"{COPY} --distill at --betas 1 2", ["--betas", "2 values for the 1 losses"]),
    (PRUNE, f"{COPY} --distill kd --betas 1", ["--betas"]),
    (PRUNE, f"{COPY} --distill kd --alpha 0", ["--alpha 0", "--distill none"]),
    (PRUNE, f"{COPY} --distill dkd kd --alpha 0", ["--alpha 0", "--distill dkd kd", "leave kd out"]),
    (PRUNE, f"{COPY} --distill dkd --betas 0", ["--betas 0", "leaves dkd of --distill dkd"]),
    (PRUNE, f"{COPY} --distill hap at --betas 700 0", ["--betas 700 0", "leaves at of --distill hap at"]),
    (PRUNE, f"{COPY} --distill dkd --dkd-alpha 0 --dkd-beta 0", ["--dkd-alpha 0 --dkd-beta 0", "one of them above 0"]),
    (PRUNE, f"{COPY} --distill dist --dist-beta -1", ["--dist-beta", "'-1'", "0 or more"]),
    (QUANTIZE, "--load-path {teacher} --quan-mode int8 --t-path {teacher} --distill sp kd --alpha 0", ["--alpha 0", "leaves kd"]),
    (PRUNE, f"{COPY} --distill kd --kd-t 0", ["--kd-t", "'0'"]),
    (PRUNE, f"{COPY} --distill hap --hap-ts 0", ["--hap-ts", "'0'"]),
    (PRUNE, f"{COPY} --distill hap --hap-ts 99", ["--hap-ts 99"]),
    (PRUNE, "--s-model resnet8 --distill at", ["--distill at", "--t-path"]),
    (PRUNE, "--t-model resnet32 --t-path {teacher} --s-copy-t", ["{teacher}", "resnet8", "resnet32 of --t-model"]),
    (PRUNE, "--t-path {truncated} --s-copy-t", ["--t-path {truncated}", "damaged or truncated"]),
    (PRUNE, "--t-path {malicious} --s-copy-t --t-model resnet8", ["--t-path {malicious}", "refused"]),
    (PRUNE, "--t-path {teacher} --s-path {resnet32} --s-model resnet8", ["--s-path {resnet32}", "--s-model"]),
    (PRUNE, "--s-path {regrown}", ["--s-path {regrown}", "stage_1.0.conv_a"]),
    (PRUNE, "--s-path {nan}", ["--s-path {nan}", "conv_1_3x3.weight", "NaN"]),
    (PRUNE, "--evaluate", ["--t-path"]),
    (QUANTIZE, "", ["--load-path is required"]),
    (QUANTIZE, "--load-path {gone}", ["--load-path {gone}", "no such file"]),
    (QUANTIZE, "--load-path {teacher} --quan-bits 0", ["--quan-bits"]),
    (QUANTIZE, "--load-path {teacher} --quan-bits 17", ["--quan-bits", "17"]),
    (QUANTIZE, "--load-path {teacher} --quan-bits no_such_layer=4", ["--quan-bits", "no_such_layer"]),
    (QUANTIZE, "--load-path {teacher} --quan-mode most", ["--quan-mode", "most"]),
    (QUANTIZE, "--load-path {malicious} --model resnet8", ["--load-path {malicious}", "refused"]),
]


def contents(folder: Path) -> dict[Path, bytes | None]:
    return {path: path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


def check_line(errors: str, script: str, parts: list[str], places: dict[str, Path]) -> None:
    lines = errors.splitlines()
    assert len(lines) == 1, errors
    assert lines[0].startswith(f"{script}.py: error: ")
    for part in parts:
        assert part.format(**places) in lines[0]


@pytest.mark.parametrize(("script", "command", "parts"), COMMANDS)
def test_is_refused(script, command, parts, places, tmp_path, run_script, monkeypatch):
    monkeypatch.chdir(tmp_path)  # where ./saves and ./data would be
    monkeypatch.setattr(Trainer, "fit", lambda self: pytest.fail("the training began"))
    before = contents(places["trained"])
    ended = run_script(script, *command.format(**places).split())
    assert ended.status == 2
    check_line(ended.errors, script, parts, places)
    assert ended.output == ""
    assert list(tmp_path.iterdir()) == []
    assert contents(places["trained"]) == before
    assert not places["marker"].exists()


@pytest.mark.parametrize(
    ("script", "command", "parts"),
    [
        (TRAIN, "--model resnet8 --schedule 3 --lr-drops", ["--lr-drops", "--schedule"]),
        (PRUNE, "--t-path {malicious} --t-model resnet8 --s-copy-t", ["--t-path {malicious}", "refused"]),
        (TRAIN, "--resume {run} --seed 3", ["--seed 3", "contradicts 1"]),
    ],
)
def test_is_refused_from_a_shell(script, command, parts, places, tmp_path):
    ended = run_forked(f"{script}.py", *command.format(**places).split(), folder=tmp_path)
    assert ended.status == 2
    check_line(ended.errors, script, parts, places)
    assert ended.output == ""
    assert list(tmp_path.iterdir()) == []
    assert not places["marker"].exists()


def test_unknown_flags_in_config_are_refused(places, tmp_path, run_script):
    shutil.copytree(places["run"], tmp_path / "run")
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    config["flags"]["turbo"] = 3
    (tmp_path / "run" / "config.json").write_text(json.dumps(config))
    ended = run_script(TRAIN, "--resume", str(tmp_path / "run"))
    assert ended.status == 2
    assert "config.json does not fit this script: unrecognized arguments: --turbo=3" in ended.errors


def test_the_table_is_long_enough():
    assert len(COMMANDS) >= 100


@pytest.fixture
def exploding(places, tmp_path) -> Path:
    """A checkpoint whose numbers are finite and whose logits are not."""
    checkpoint = load_checkpoint(places["teacher"])
    state = checkpoint["state_dict"]
    for name in [name for name in state if name.endswith("weight") and state[name].dim() == 4]:
        state[name] = torch.full_like(state[name], 1e30)
    save_checkpoint(tmp_path / "exploding.pt", checkpoint)
    return tmp_path / "exploding.pt"


@pytest.mark.parametrize(
    ("script", "command"),
    [
        ("initial_train", "--evaluate --load-path FILE"),
        ("initial_train", "--load-path FILE --save-dir SAVES"),
        ("quantize_encode", "--evaluate --load-path FILE"),
        ("pruning", "--t-path FILE --s-copy-t --prune-rates 0.5 --save-dir SAVES"),
        ("export", "--load-path FILE --output SAVES.onnx"),
        ("predict", "--load-path FILE IMAGES"),
    ],
)
def test_logits_that_are_no_numbers_are_an_error(script, command, exploding, tmp_path, run_script, image_writer):
    image_writer(tmp_path / "images", sizes=(32,))
    places = {"FILE": exploding, "SAVES.onnx": tmp_path / "a.onnx", "SAVES": tmp_path / "saves", "IMAGES": tmp_path / "images"}
    ended = run_script(script, *(str(places.get(word, word)) for word in command.split()))
    assert ended.status == 2 and "gives logits that are NaN or infinite" in ended.errors, ended.errors
    assert ended.errors.count("\n") == 1 and not (tmp_path / "saves").exists() and not (tmp_path / "a.onnx").exists()
