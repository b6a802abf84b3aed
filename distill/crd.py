"""CRD: Tian, Krishnan, Isola, "Contrastive Representation Distillation", ICLR 2020.

Both embeddings are projected to a sphere, z = normalize(W e + b). For every training image a bank remembers the last z of the
student and one the teacher's. Of an anchor z_t, the image's own z_s in the bank is the positive and K of other classes are
the negatives; with scores h = exp(z . bank / T) / Z, Z set at the first batch so that the mean of h is 1 / n:

    L = -mean over images of (log(h_pos / (h_pos + K / n)) + sum over negatives of log((K / n) / (h + K / n)))

and the same with z_s as the anchor in the bank of the teacher; L is the sum of both. What the bank remembers of the batch is
then moved half-way to the new z and normalised again.

Deviations: negatives are drawn with replacement, as the estimator assumes, where the official code draws without; scores are
taken of the whole bank and then picked, which needs less memory than picking K rows for each image first.
"""

import math

import torch
import torch.distributed as dist
from torch import Tensor, nn

from distill.base import Distiller, full_precision
from models.outputs import Outputs
from utils.errors import ParameterError

EPSILON = 1e-7  # beside probabilities, as in the official code
MANY = 2**48


class Negatives(nn.Module):
    """Draws training images of other classes than an image's own. `train_labels` (n,) int64 are the classes of all."""

    def __init__(self, train_labels: Tensor):
        super().__init__()
        counts = torch.bincount(train_labels)
        if (counts > 0).sum() < 2:
            raise ParameterError("loss", "crd", "needs training images of two classes or more, to tell an image from others")
        starts = counts.cumsum(0) - counts
        # what the data say needs no place in a checkpoint
        self.register_buffer("by_class", train_labels.argsort(stable=True), persistent=False)
        self.register_buffer("first", starts[train_labels], persistent=False)
        self.register_buffer("count", counts[train_labels], persistent=False)

    def forward(self, indices: Tensor, *, count: int) -> Tensor:
        """(b,) rows -> (b, count) rows of other classes, with replacement, from the device's random stream."""
        own, first = self.count[indices].unsqueeze(1), self.first[indices].unsqueeze(1)
        draws = torch.randint(MANY, (len(indices), count), device=indices.device) % (len(self.by_class) - own)
        return self.by_class[draws + own * (draws >= first)]


def contrastive_loss(scores: Tensor, *, train_images: int) -> Tensor:
    """(b, 1 + K) scores h, the positive first -> 0-dim loss, of one anchor."""
    noise = (scores.shape[1] - 1) / train_images
    positive, negatives = scores[:, :1], scores[:, 1:]
    hits = (positive / (positive + noise + EPSILON)).log().sum()
    misses = (noise / (negatives + noise + EPSILON)).log().sum()
    return -(hits + misses) / len(scores)


class Bank(nn.Module):
    """The last projection (n, d) of every training image, and the constant Z of the scores against it."""

    def __init__(self, train_images: int, width: int):
        super().__init__()
        bound = math.sqrt(3 / width)  # rows of length 1 in the mean
        self.register_buffer("rows", torch.empty(train_images, width).uniform_(-bound, bound))
        self.register_buffer("normaliser", torch.tensor(0.0))

    def scores(self, anchors: Tensor, picked: Tensor, *, temperature: float) -> Tensor:
        """(b, d) anchors against the rows `picked` (b, 1 + K) -> (b, 1 + K)."""
        products = anchors @ self.rows.clone().T  # a copy: the rows change before the backward pass
        scores = (products.gather(1, picked) / temperature).exp()
        first = scores.detach().mean() * len(self.rows)
        normaliser = torch.where(self.normaliser > 0, self.normaliser, first)
        if self.training:
            self.normaliser.copy_(normaliser)
        return scores / normaliser

    @torch.no_grad()
    def remember(self, indices: Tensor, projections: Tensor, *, momentum: float) -> None:
        """Moves the rows of a batch towards its projections (b, d), by the share `1 - momentum`."""
        rows = momentum * self.rows[indices] + (1 - momentum) * projections
        self.rows.index_copy_(0, indices, rows / torch.linalg.vector_norm(rows, dim=1, keepdim=True))


class CRD(Distiller):
    """Contrast of each image with others, between the two networks. Projections train with the student; the bank is state."""

    def __init__(
        self,
        student: Outputs,
        teacher: Outputs,
        *,
        train_labels: Tensor,
        crd_negatives: int,
        crd_width: int,
        crd_t: float,
        crd_momentum: float,
    ):
        super().__init__()
        if not 0 <= crd_momentum < 1:
            raise ParameterError("crd_momentum", crd_momentum, "must be from 0 to below 1")
        if dist.is_initialized() and dist.get_world_size() > 1:
            raise ParameterError("loss", "crd", "for one process, its bank of projections is not shared by several")
        self.negatives, self.temperature, self.momentum = crd_negatives, crd_t, crd_momentum
        self.student_projection = nn.Linear(student.embedding.shape[1], crd_width)
        self.teacher_projection = nn.Linear(teacher.embedding.shape[1], crd_width)
        self.draw = Negatives(train_labels)
        self.student_bank, self.teacher_bank = (Bank(len(train_labels), crd_width) for _ in range(2))

    def setting(self) -> str:
        width = self.student_projection.out_features
        return f"T {self.temperature:g}, {self.negatives} negatives, width {width}, momentum {self.momentum:g}"

    def loss(self, student: Outputs, teacher: Outputs, *, indices: Tensor) -> Tensor:
        own = self.project(self.student_projection, student)
        other = self.project(self.teacher_projection, teacher)
        picked = torch.cat([indices.unsqueeze(1), self.draw(indices, count=self.negatives)], dim=1)
        return self.contrast(own, other, indices, picked)

    def project(self, projection: nn.Linear, outputs: Outputs) -> Tensor:
        """(b, width), of length 1."""
        z = projection(full_precision(outputs.embedding))
        return z / torch.linalg.vector_norm(z, dim=1, keepdim=True)

    def contrast(self, student: Tensor, teacher: Tensor, indices: Tensor, picked: Tensor) -> Tensor:
        """Projections (b, d) of both and the rows they meet, (b, 1 + K) -> 0-dim loss; the banks then remember the batch."""
        loss = sum(
            contrastive_loss(bank.scores(anchor, picked, temperature=self.temperature), train_images=len(bank.rows))
            for bank, anchor in ((self.student_bank, teacher), (self.teacher_bank, student))
        )
        if self.training:
            self.student_bank.remember(indices, student, momentum=self.momentum)
            self.teacher_bank.remember(indices, teacher, momentum=self.momentum)
        return loss
