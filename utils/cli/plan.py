"""What a run would do, for --dry-run: sizes, steps, learning rates, where it would write; writes nothing itself."""

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import nn

from utils.images.batches import ImageData
from utils.images.dataset import sized
from utils.profile import profile_network
from utils.runs.settings import RunSettings
from utils.training.trainer import TrainingPlan

STATE_COPIES = 6  # float32 copies of the parameters on disk: three checkpoints, of which two hold weights and momentum too


def print_plan(
    run: RunSettings,
    *,
    plan: TrainingPlan,
    data: ImageData,
    networks: Mapping[str, nn.Module],
    lines: Sequence[str] = (),
) -> None:
    """Prints the plan of a run over `networks`, by role, from the main process; `lines` come after remarks on the images."""
    remarks = [f"WARNING: {remark}" for remark in (*data.remarks, *plan.learning_rate.remarks())]
    if data.world.is_main:
        print(
            "\n".join(
                [
                    *remarks,
                    *lines,
                    *_sizes(networks, data),
                    *_training(plan, data),
                    *_place(run, networks),
                    "dry run: nothing was written",
                ]
            )
        )


def _sizes(networks: Mapping[str, nn.Module], data: ImageData) -> list[str]:
    profiles = {role: profile_network(network, data.example[:1]) for role, network in networks.items()}
    return [
        f"{role}: {profile['parameters']:,} parameters, {profile['macs']:,} MACs an image, "
        f"{4 * profile['parameters']:,} bytes of weights"
        for role, profile in profiles.items()
    ]


def _training(plan: TrainingPlan, data: ImageData) -> list[str]:
    images = f"{len(data.dataset.train.labels)} training and {len(data.dataset.test.labels)} test images"
    lines = [
        f"data: {data.dataset.name}, {len(data.dataset.classes)} classes, {images}",
        f"image size: {sized(data.dataset.image_size)}, {data.dataset.size_reason}",
        f"training: {plan.n_epochs} epochs of {data.train_steps} steps of {data.batch_size} images on {data.device}, "
        f"{plan.n_epochs * data.train_steps} steps in all",
        f"learning rate: {plan.learning_rate.describe()}",
    ]
    if plan.ema_decay is not None:
        shipped = "average" if plan.ships_average else "trained network"
        lines.append(f"weights: averaged over the steps, decay {plan.ema_decay:g}; the {shipped} is shipped")
    return lines


def _place(run: RunSettings, networks: Mapping[str, nn.Module]) -> list[str]:
    folder = Path(run.resume) if run.resume else Path(run.save_dir) / (run.run_name or "<Unix time>")
    parameters = max(sum(parameter.numel() for parameter in network.parameters()) for network in networks.values())
    needed = 4 * STATE_COPIES * parameters
    existing = next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())
    free = shutil.disk_usage(existing).free
    verdict = "enough" if free > needed else "NOT ENOUGH"
    space = f"disk: about {needed / 2**20:.0f} MiB needed, {free / 2**20:.0f} MiB free, {verdict}"
    return [f"would write to {folder} and {folder.parent / run.log_name}", space]
