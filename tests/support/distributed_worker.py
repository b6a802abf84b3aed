"""What test_distributed.py starts with torchrun: many checks in one launch, for starting processes is what takes long.

torchrun ... distributed_worker.py FOLDER all      scenarios one after the other; each process leaves FOLDER/rank<n>.pt
torchrun ... distributed_worker.py FOLDER die      process 1 ends in the middle of a training without a word
"""

import os
import signal
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

import pruning
from distill import build_distiller
from distill.objective import DistillationObjective, FrozenTeacher, sample_outputs
from models import MODELS, build_model
from models.cifar_resnet import CifarResNet
from models.graph import ChannelGraph
from models.network_file import describe_network
from models.outputs import Outputs
from prune.feature_maps import mean_of_maps
from prune.gradients import importances, mean_gradients
from prune.map_scores import channel_independence
from prune.masks import choose_filters, keep_ratios
from utils import cli, profile
from utils.checkpoints import save_checkpoint
from utils.distributed import from_main, join, leave, sum_over_processes
from utils.errors import Interrupted
from utils.images.batches import Batch, ImageData
from utils.images.dataset import Dataset, SmallImages
from utils.runs.folder import LAST
from utils.seed import generator
from utils.training import trainer
from utils.training.evaluation import evaluate_each
from utils.training.objective import CrossEntropyObjective
from utils.training.recalibration import recalibrated_batch_norm
from utils.training.step import prepare_step, sgd, train_step
from utils.world import World, world_from_environment

CPU = torch.device("cpu")
EPOCHS = 2


class NoNorm(nn.Module):
    """A network without batch norm: shared out among processes or not, its gradients are the same."""

    def __init__(self, *, num_classes: int):
        super().__init__()
        self.conv_1 = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.conv_2 = nn.Conv2d(8, 12, 3, stride=2, padding=1)
        self.conv_3 = nn.Conv2d(12, 16, 3, stride=2, padding=1)
        self.classifier = nn.Linear(16, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.outputs(x).logits

    def outputs(self, x: Tensor) -> Outputs:
        first = F.relu(self.conv_1(x))
        second = F.relu(self.conv_2(first))
        third = F.relu(self.conv_3(second))
        embedding = third.mean((2, 3))
        maps = (first, second, third)
        return Outputs(self.classifier(embedding), maps, maps, embedding)


NETWORKS = {"no-norm": NoNorm, "resnet8": partial(CifarResNet, depth=8)}  # which the entry script is to know in here


def write_teacher(path: Path, model: str) -> None:
    torch.manual_seed(5)
    network = build_model(model, num_classes=10)
    save_checkpoint(path, describe_network(network.state_dict(), model=model, num_classes=10, config={}))


def train(folder: Path, *flags: str) -> None:
    """`pruning.py` with these flags, in this process."""
    meet_anew()
    common = ("--dataset", "digits", "--device", "cpu", "--batch-size", "32", "--limit-batches", "3", "--workers", "0")
    pruning.main(cli.parse_flags(pruning.get_args_parser(), [*common, "--save-dir", str(folder / "saves"), *flags]))


def meet_anew() -> None:
    """A training leaves its group of processes; the next one needs another place to meet, as if torchrun had started it."""
    if "MASTER_PORT" in os.environ and not dist.is_initialized():
        os.environ |= {"TORCHELASTIC_USE_AGENT_STORE": "False", "MASTER_PORT": str(int(os.environ["MASTER_PORT"]) + 1)}


def new_run(folder: Path, name: str, model: str, *flags: str) -> None:
    rates = ("--n-epochs", str(EPOCHS), "--schedule", "--lr-drops")
    train(folder, "--t-model", model, "--t-path", str(folder / f"{model}.pt"), "--s-copy-t", "--run-name", name, *rates, *flags)


# ---- scenarios: each gives what every process, and a single one, should agree on -----------------------------------------


def gradients_of_a_step(world: World) -> dict[str, Tensor]:
    """Gradients over a batch of 23 images, which no number of processes but 1 and 23 shares out evenly."""
    data = numbered_data(world, train_images=23, batch_size=24)
    network = fresh()
    objective = CrossEntropyObjective(network)
    step = prepare_step(objective, device=CPU, world=world, compiled=False)
    optimizer = sgd(network.parameters(), lr=1e-9, momentum=0, weight_decay=0)
    (batch,) = data.train_batches(0)
    train_step(step, batch, optimizer=optimizer)
    return {name: parameter.grad for name, parameter in network.named_parameters()}


def scores_and_choices(world: World) -> dict[str, Tensor]:
    """Gradients and feature maps over uneven shares, the filters that criteria keep by them, and those that chance keeps."""
    data = numbered_data(world, train_images=23, batch_size=8)
    network = fresh()
    graph = ChannelGraph(network, data.example)
    layers = graph.prunable_layers()
    batches = [(batch.images, batch.labels) for batch in data.train_batches("scoring")]
    passed = {"layers": layers, "all_reduce": sum_over_processes}
    sampled = {
        "gradients": mean_gradients(network, batches, **passed),
        "importance": importances(network, batches, of="gates", **passed),
        "feature_maps": mean_of_maps(graph, batches, of_maps=channel_independence, **passed),
    }
    ratios = keep_ratios(layers, [0.5])
    found = {f"{kind} of {name}": tensor for kind, tensors in sampled.items() for name, tensor in tensors.items()}
    for criterion in ("filter-nggm", "filter-taylor", "filter-chip", "filter-r"):
        kept = choose_filters(layers, ratios, criterion=criterion, generator=generator(1, "filters"), **sampled)
        found |= {f"{criterion} keeps of {name}": channels for name, channels in kept.items()}
    return found


def parameters_after_afd(world: World) -> dict[str, Tensor]:
    """Every parameter of student and loss after two steps; only AFD's own make this differ from a single process."""
    torch.manual_seed(world.rank)  # the wrapper has to make them equal
    network = NoNorm(num_classes=10)
    teacher = FrozenTeacher(fresh())
    images = torch.zeros(2, 3, 32, 32)
    afd = build_distiller("afd", student=sample_outputs(network, images), teacher=teacher(images))
    objective = DistillationObjective(network, teacher=teacher, losses=[("afd", afd, 200.0)])
    step = prepare_step(objective, device=CPU, world=world, compiled=False)
    optimizer = sgd(objective.parameters(), lr=0.01, momentum=0.9, weight_decay=5e-4)
    for batch in numbered_data(world, train_images=16, batch_size=8).train_batches(0):
        train_step(step, batch, optimizer=optimizer)
    return {name: parameter.detach() for name, parameter in objective.named_parameters()}


def recalibrated_statistics(world: World) -> dict[str, Tensor]:
    """Statistics of batch norm over two batches of which each process sees a part, and those of before once it is over."""
    torch.manual_seed(3)
    network = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))
    data = numbered_data(world, train_images=16, batch_size=8)
    with recalibrated_batch_norm(network, data, batches=2):
        within = {f"within {name}": buffer.clone() for name, buffer in network.named_buffers()}
    return within | {f"after {name}": buffer for name, buffer in network.named_buffers()}


def tested_images(world: World) -> dict[str, Tensor]:
    """Which images this process tests: 21 in batches of 4, so that the last is a single one."""
    data = numbered_data(world, test_images=21, batch_size=4)
    scores, hits, _ = evaluate_each(fresh(num_classes=21), data)
    found = {"scores": torch.tensor(list(scores.values())), "hits": torch.from_numpy(hits.hits)}
    found["digest"] = torch.tensor(list(hits.labels.encode()))
    return {"seen": torch.cat([batch.labels for batch in data.test_batches()]), **found}


def fresh(*, num_classes: int = 10) -> NoNorm:
    torch.manual_seed(3)
    return NoNorm(num_classes=num_classes)


def numbered_data(world: World, *, train_images: int = 8, test_images: int = 8, batch_size: int) -> ImageData:
    """Noise; the label of each test image is its number."""
    stream = torch.Generator().manual_seed(0)

    def split(count: int, classes: int) -> SmallImages:
        images = torch.randint(256, (count, 3, 32, 32), dtype=torch.uint8, generator=stream)
        return SmallImages(images, torch.arange(count) % classes)

    dataset = Dataset(
        "noise", tuple(map(str, range(10))), split(train_images, 10), split(test_images, 1000), (0.5,) * 3, (0.3,) * 3
    )
    return ImageData(dataset, batch_size=batch_size, seed=1, device=CPU, world=world)


def computed_by_the_main_process(world: World) -> dict[str, Tensor]:
    return {"rank": torch.tensor(from_main(lambda: world.rank))}


SCENARIOS: dict[str, Callable[[World], dict[str, Tensor]]] = {
    scenario.__name__: scenario
    for scenario in (
        gradients_of_a_step,
        scores_and_choices,
        parameters_after_afd,
        recalibrated_statistics,
        tested_images,
        computed_by_the_main_process,
    )
}


# ---- the entry script ----------------------------------------------------------------------------------------------------


def run_no_norm(folder: Path) -> None:
    nggm = ("--prune-rates", "0.6", "--prune-mode", "filter-nggm", "--samp-batches", "2")
    new_run(folder, "nggm-at", "no-norm", *nggm, "--distill", "at", "--betas", "10")
    new_run(folder, "soft", "no-norm", "--prune-rates", "0.6", "--prune-mode", "filter-a", "--soft-prune")


def run_resumed(folder: Path, world: World) -> None:
    """The same training twice, once without a break."""
    flags = ("--prune-rates", "0.6", "--prune-mode", "filter-gm", "--distill", "afd")
    new_run(folder, "whole", "resnet8", *flags)
    stopped(world, folder, lambda: new_run(folder, "resumed", "resnet8", *flags))
    train(folder, "--resume", str(folder / "saves" / "resumed"))


def stopped(world: World, folder: Path, run: Callable[[], None]) -> None:
    """Sends a signal to the last process alone, within the second epoch: all stop together."""
    ordinary = trainer.train_step
    steps = 0

    def interrupted(*args: Any, **options: Any) -> Any:
        nonlocal steps
        steps += 1
        if steps == 5 and world.rank == world.size - 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return ordinary(*args, **options)

    trainer.train_step = interrupted
    try:
        run()
    except Interrupted as error:
        assert error.signal_number == signal.SIGTERM and "--resume" in str(error)
        dist.barrier()  # until the main process has written
        state = torch.load(folder / "saves" / "resumed" / LAST)["resume"]
        assert (state["epoch"], state["batch"]) == (1, 3)
    else:
        raise AssertionError("the signal was not heard")
    finally:
        trainer.train_step = ordinary
        leave()


def die_in_training(world: World) -> None:
    network = fresh()
    objective = CrossEntropyObjective(network)
    step = prepare_step(objective, device=CPU, world=world, compiled=False)
    optimizer = sgd(network.parameters(), lr=0.01, momentum=0, weight_decay=0)
    for number in range(10_000):
        if number == 5 and world.rank == 1:
            os._exit(7)
        train_step(step, Batch(torch.zeros(2, 3, 32, 32), torch.zeros(2, dtype=torch.long), 1), optimizer=optimizer)


def record_writes(folder: Path) -> list[str]:
    """From now on the paths below `folder` that this process opens for writing, creates or renames."""
    written: list[str] = []

    def hook(event: str, arguments: tuple) -> None:
        changes = event in ("os.mkdir", "os.rename", "os.remove", "os.link")
        if event == "open" and isinstance(arguments[2], int):
            changes = bool(arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))
        if changes and str(arguments[0]).startswith(str(folder)):
            written.append(f"{event} {arguments[0]}")

    sys.addaudithook(hook)
    return written


def main(folder: Path, what: str) -> None:
    torch.set_num_threads(1)
    MODELS.update(NETWORKS)
    profile.MIN_RUN_SECONDS = 0.001  # no test reads the latencies that a run ends with
    world = world_from_environment()
    if what == "die":
        join(world, CPU)
        return die_in_training(world)
    if world.is_main:
        for model in NETWORKS:
            write_teacher(folder / f"{model}.pt", model)
    written = record_writes(folder / "saves")
    join(world, CPU)
    results = {name: scenario(world) for name, scenario in SCENARIOS.items()}
    run_no_norm(folder)
    run_resumed(folder, world)
    torch.save({**results, "written": list(written)}, folder / f"rank{world.rank}.pt")


if __name__ == "__main__":
    cli.execute(lambda: main(Path(sys.argv[1]), sys.argv[2]))
