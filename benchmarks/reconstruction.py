"""What pruned networks are worth before any training: as they are, recalibrated, reconstructed, and both.

    python -m benchmarks.reconstruction --teachers saves/a/model_best.pt saves/b/model_best.pt --dataset cifar10 \
        --sizes 0.9 0.7 0.5 macs=0.5 macs=0.3 --output reconstruction.jsonl
    python -m benchmarks.reconstruction --report reconstruction.jsonl --page docs/pruning_without_training.md

Every teacher is pruned by every criterion, to every size, in every layout, and scored on the test images. A line is written for
each as soon as it is measured, and what the output has already is not measured again. Sizes are proportions of filters, or a
budget. torch_pruning (`pip install torch-pruning`) prunes coupled channels by L1 norm; its networks are scored as they come and
with batch norm estimated anew.
"""

import argparse
import copy
import json
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from benchmarks.budgets import OTHER, pruned_by_another
from benchmarks.common import machine
from models.graph import ChannelGraph
from models.network_file import NetworkFile, load_network
from prune.choice import FilterChoice
from prune.criteria import CRITERIA
from prune.flags import AUTO, image_count
from prune.masks import keep_ratios
from prune.mending import images_needed
from prune.reconstruction import reconstruct
from prune.settings import ALLOCATIONS, parse_budget
from reporting.without_training import read_rows, write_page
from utils import cli
from utils.checkpoints import digest
from utils.device import choose_device, to_device
from utils.errors import UserError
from utils.files import append_line
from utils.images.batches import ImageData
from utils.images.class_folders import SPLIT_SEED
from utils.images.dataset import Dataset, ImageFiles, Wanted
from utils.images.datasets import DATASETS, load_dataset
from utils.profile import profile_network
from utils.seed import generator
from utils.training.evaluation import evaluate
from utils.training.recalibration import recalibrated_batch_norm
from utils.world import World

LAYOUTS = {"by layer": (False, 1), "by layer, by 8": (False, 8), "coupled": (True, 1), "coupled, by 8": (True, 8)}
BATCH_SIZE = 100


@dataclass(frozen=True)
class Setting:
    """One way of pruning: `size` is a proportion of the filters, or a budget."""

    criterion: str
    size: str
    layout: str
    allocation: str = "uniform"

    @property
    def is_budget(self) -> bool:
        return "=" in self.size


def get_args_parser() -> cli.Parser:
    parser = cli.Parser(prog="reconstruction.py", description="Accuracy of pruned networks before any training.")
    parser.add_argument("--teachers", nargs="+", default=[], metavar="FILE", help="trained networks, of one dataset")
    parser.add_argument("--dataset", default="digits", choices=DATASETS, help="what they were trained on")
    parser.add_argument("--data-dir", default="./data", help="where it is")
    parser.add_argument("--criteria", nargs="+", default=list(CRITERIA), choices=CRITERIA, help="which filters go")
    parser.add_argument("--sizes", nargs="+", default=["0.9", "0.7", "0.5", "0.3", "macs=0.7", "macs=0.5", "macs=0.3"],
                        type=cli.checked(check_size), help="proportions of filters retained, and budgets")  # fmt: skip
    parser.add_argument("--layouts", nargs="+", default=list(LAYOUTS), choices=LAYOUTS, help="what filters are chosen by")
    parser.add_argument("--allocations", nargs="+", default=["uniform"], choices=ALLOCATIONS, help="how budgets are spent")
    parser.add_argument("--images", type=image_count, default=AUTO, help="training images of the reconstruction")
    parser.add_argument("--batches", type=cli.positive_int, default=10, metavar="N",
                        help=f"training batches of {BATCH_SIZE} for scores and batch norms")  # fmt: skip
    parser.add_argument("--test-images", type=cli.positive_int, metavar="N", help="score on so many of the test images")
    parser.add_argument("--torch-pruning", action="store_true", help="prune by torch_pruning too, where it is installed")
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"), help="auto: CUDA where there is a device")
    parser.add_argument("--output", type=Path, default=Path("reconstruction.jsonl"), help="a line for each result")
    parser.add_argument("--report", type=Path, nargs="+", metavar="FILE", help="only write the page of what is in these files")
    parser.add_argument("--page", type=Path, default=Path("docs/pruning_without_training.md"),
                        help="with --report, the page; its picture lies in figures beside it")  # fmt: skip
    return parser


def check_size(text: str) -> None:
    parse_budget(text) if "=" in text else cli.keep_proportion(text)


def main(args: argparse.Namespace) -> None:
    if args.report:
        return write_page(args.page, read_rows(args.report))
    device = choose_device(args.device, None, World())
    done = {key_of(row) for row in read_rows([args.output])} if args.output.exists() else set()
    settings = list(settings_of(args))
    for path in args.teachers:
        study = Study.of(path, args, device=device)
        for setting in tqdm(settings, desc=path, unit="setting", disable=None):
            head = {**study.head, **asdict(setting)}
            if key_of(head) not in done:
                append_line(args.output, json.dumps({**head, **study.measure(setting)}), durable=True)


def key_of(row: dict[str, Any]) -> tuple[Any, ...]:
    """What a result is known again by."""
    return tuple(row[name] for name in ("weights", "test_images", "images", "criterion", "size", "layout", "allocation"))


def settings_of(args: argparse.Namespace) -> Iterator[Setting]:
    """Coarse before fine: all criteria of a layout and size before the next."""
    for layout in args.layouts:
        for size in args.sizes:
            for allocation in args.allocations if "=" in size else ["uniform"]:
                for criterion in args.criteria:
                    yield Setting(criterion, size, layout, allocation)
            if args.torch_pruning and layout == "coupled" and size.startswith("macs="):
                yield Setting(OTHER, size, layout)


def fewer_tests(dataset: Dataset, count: int | None) -> Dataset:
    """The dataset with `count` of its test images, the same ones for everybody."""
    test = dataset.test
    if count is None or count >= len(test.labels):
        return dataset
    rows = torch.randperm(len(test.labels), generator=generator(SPLIT_SEED, "study"))[:count]
    if isinstance(test, ImageFiles):
        return replace(dataset, test=ImageFiles(tuple(test.paths[row] for row in rows.tolist()), test.labels[rows]))
    return replace(dataset, test=type(test)(test.images[rows], test.labels[rows]))


@dataclass
class Study:
    """One teacher, its data, and what all of its results have in common."""

    teacher: nn.Module
    data: ImageData
    batches: int
    head: dict[str, Any]

    @classmethod
    def of(cls, path: str, args: argparse.Namespace, *, device: torch.device) -> "Study":
        file = load_network(path, flag="--teachers")
        wanted = Wanted(network=file.images, normalisation=file.images.normalisation if file.images is not None else None)
        dataset = fewer_tests(load_dataset(args.dataset, data_dir=args.data_dir, wanted=wanted), args.test_images)
        data = ImageData(dataset, batch_size=BATCH_SIZE, seed=0, device=device)
        teacher = to_device(file.network, device).eval()
        images = images_needed(teacher, data.example[:1]) if args.images == AUTO else args.images
        head = {"teacher": path, "weights": digest(teacher.state_dict()), "model": file.model, "data": data_name(args, file)}
        head |= {"teacher_top1": evaluate(teacher, data)["top1"], "test_images": len(dataset.test.labels), "images": images}
        return cls(teacher, data, args.batches, head)

    def measure(self, setting: Setting) -> dict[str, Any]:
        """Top-1 of each form, the share of multiply-accumulates and parameters, and the seconds; or why there is none."""
        try:
            small = self._by_another(setting) if setting.criterion == OTHER else self._pruned(setting)
        except (UserError, ImportError) as error:
            return {"fails": str(error)}
        sizes = {name: profile_network(net, self.data.example[:1]) for name, net in (("dense", self.teacher), ("small", small))}
        shares = {name: sizes["small"][name] / sizes["dense"][name] for name in ("macs", "parameters")}
        top1 = {"plain": self._top1(small), "recalibrated": self._top1(small, recalibrated=True)}
        began = time.monotonic()
        if setting.criterion != OTHER:
            reconstruct(small, self.teacher, self.data.plain_batches(self.head["images"]))
            top1 |= {"reconstructed": self._top1(small), "both": self._top1(small, recalibrated=True)}
        seconds = time.monotonic() - began
        return {"top1": top1, **shares, "seconds": round(seconds, 3), "machine": machine(self.data.device)}

    def _top1(self, network: nn.Module, *, recalibrated: bool = False) -> float:
        with recalibrated_batch_norm(network, self.data, batches=self.batches if recalibrated else None):
            return evaluate(network, self.data)["top1"]

    def _pruned(self, setting: Setting) -> nn.Module:
        coupled, multiple = LAYOUTS[setting.layout]
        graph = ChannelGraph(self.teacher, self.data.example)
        layers = graph.prunable_layers()
        choose = FilterChoice(
            graph,
            layers,
            keep_ratios(layers, None if setting.is_budget else [float(setting.size)]),
            criterion=setting.criterion,
            data=self.data,
            seed=0,
            samp_batches=self.batches,
            multiple=multiple,
            coupled=coupled,
            budget=parse_budget(setting.size) if setting.is_budget else None,
            allocation=setting.allocation,
        )
        choose.check()
        return choose().shrink()

    def _by_another(self, setting: Setting) -> nn.Module:
        dense = profile_network(self.teacher, self.data.example[:1])["macs"]
        budget = parse_budget(setting.size)
        return pruned_by_another(
            lambda: copy.deepcopy(self.teacher),
            self.data.example,
            macs=budget.share * dense,
            num_classes=len(self.data.dataset.classes),
        ).eval()


def data_name(args: argparse.Namespace, file: NetworkFile) -> str:
    """The dataset as tables call it: a folder by its own name."""
    return Path(args.data_dir).name if args.dataset == "folder" else args.dataset


if __name__ == "__main__":
    cli.execute(lambda: main(get_args_parser().parse_args()))
