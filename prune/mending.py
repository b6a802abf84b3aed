"""Reconstruction within a pruning run: by which images, in which form of the network, and what the run says of it."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field

import torch
from torch import Tensor, nn
from tqdm import tqdm

from models.graph.cost import positions_of_layers
from models.graph.kinds import WEIGHED
from models.graph.statistics import weight_matrix
from models.narrow import NarrowNetwork
from prune.reconstruction import LayerFit, reconstruct
from prune.schedule import PruningSchedule
from utils.distributed import broadcast_from_main
from utils.errors import ParameterError, UserError
from utils.images.batches import ImageData
from utils.runs.folder import RECONSTRUCTION
from utils.runs.run import Run
from utils.training.evaluation import evaluate

ROWS_PER_UNKNOWN = 4  # positions of an output for each weight of a filter: more of them mend hardly more
FEWEST_IMAGES, MOST_IMAGES = 64, 256  # of auto; a classifier has one position an image, and is carried by the ridge


def images_needed(network: nn.Module, image: Tensor) -> int:
    """How many images give the largest layer of `network` `ROWS_PER_UNKNOWN` rows for each weight of a filter, within bounds.

    `image` (1, C, H, W) says at how many positions each layer works.
    """
    layers = dict(network.named_modules())
    rows = [
        ROWS_PER_UNKNOWN * weight_matrix(layers[name]).shape[2] / positions
        for name, positions in positions_of_layers(network, image).items()
        if isinstance(layers[name], WEIGHED)
    ]
    return min(max(FEWEST_IMAGES, *map(round, rows)), MOST_IMAGES)


def mend_pruned(
    schedule: PruningSchedule,
    unpruned: nn.Module,
    batches: Sequence[Tensor],
    *,
    on_layer: Callable[[LayerFit], object] | None = None,
) -> list[LayerFit]:
    """Mends the network that `schedule` keeps pruned, in the form that it trains and in the dense one; see `reconstruct`.

    It is worked out in the small form where the network has one: the result is the same, for less. All processes take the main
    one's.
    """
    model = schedule.model
    small = _small_form(schedule, batches[0])
    fits = reconstruct(small or model, unpruned, batches, on_layer=on_layer)
    keys = [f"{fit.name}.{kind}" for fit in fits for kind in ("weight", "bias")]
    if small is not None:
        found, own = small.state_dict(), model.state_dict()
        with torch.no_grad():
            for key in (key for key in keys if key in found):
                own[key].copy_(small.widened(key, found[key]))
    schedule.clear_pruned()
    broadcast_from_main(tensor for network in (model, small) if network is not None for tensor in network.parameters())
    return fits


def _small_form(schedule: PruningSchedule, images: Tensor) -> NarrowNetwork | None:
    network = schedule.trained_network()
    if isinstance(network, NarrowNetwork):
        return network
    try:
        return schedule.selection.shrink()
    except UserError:
        return None


@dataclass
class Reconstruction:
    """`--reconstruct`: called with what keeps a network pruned and the unpruned network, it mends the one by the other.

    `images` is how many training images, without labels or augmentation, 0 for as many as the largest layer needs. What came of
    it goes to the log and into files of the `run`. Nothing of it depends on how many processes there are.
    """

    images: int
    data: ImageData
    run: Run
    before: dict[str, float] | None = field(default=None, init=False)  # what the network scored that it was given last

    def __call__(self, schedule: PruningSchedule, unpruned: nn.Module) -> None:
        count, self.before = self._count(unpruned), evaluate(schedule.model, self.data)
        self.run.log(f"pruned, before reconstruction: top1 {self.before['top1']:.2f}, loss {self.before['loss']:.4f}")
        batches = self.data.plain_batches(count)
        layers = sum(isinstance(module, WEIGHED) for module in schedule.model.modules())
        disable = None if self.run.world.is_main else True
        with tqdm(total=layers, desc="reconstruction", unit="layer", disable=disable, leave=False) as bar:
            fits = mend_pruned(schedule, unpruned, batches, on_layer=lambda fit: bar.update())
        self._say(fits, count=count)
        self.run.save_json(RECONSTRUCTION, {"images": count, "layers": [asdict(fit) for fit in fits]})

    def _count(self, unpruned: nn.Module) -> int:
        available = len(self.data.dataset.train.labels)
        if not self.images:
            return min(images_needed(unpruned, self.data.example[:1]), available)
        return self.images

    def _say(self, fits: Sequence[LayerFit], *, count: int) -> None:
        before, after = (sum(getattr(fit, when) for fit in fits) / len(fits) for when in ("before", "after"))
        self.run.log(
            f"reconstructed {len(fits)} layers from {count} training images without labels: "
            f"error of their outputs {100 * before:.2f} -> {100 * after:.2f} % of their squares"
        )
        if scarce := [fit for fit in fits if fit.is_scarce]:
            fewest = min(scarce, key=lambda fit: fit.positions / fit.unknowns)
            self.run.warn(
                f"{count} images are few for {len(scarce)} of {len(fits)} layers, such as {fewest.name} with {fewest.unknowns} "
                f"unknowns and {fewest.positions} rows: there the ridge decides"
            )
        if left := [fit for fit in fits if fit.left]:
            named = ", ".join(f"{fit.name} ({fit.left} of {fit.filters} filters)" for fit in left)
            self.run.log(f"left as they were, for their error would have grown: {named}")


def check_images(images: int | None, data: ImageData) -> None:
    """Raises UserError for more images than there are to reconstruct by."""
    available = len(data.dataset.train.labels)
    if images is not None and images > available:
        raise ParameterError("images", images, f"there are {available} training images; give at most that, or auto")
