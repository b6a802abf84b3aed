"""RKD: Park et al., "Relational Knowledge Distillation", CVPR 2019.

Of the embeddings of a batch, with distances d_ij = norm(e_i - e_j) over their mean, and angles
a_ijk = (e_i - e_j) / norm(e_i - e_j) . (e_k - e_j) / norm(e_k - e_j):

    L = 25 * mean over pairs of huber(d^s - d^t) + 50 * mean over triples of huber(a^s - a^t)

The weights of distance and angle are those of the official code; pairs and triples of one image with itself are in the means
with the value 0, as there.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from distill.base import Distiller, check_weights, full_precision
from models.outputs import Outputs

SMALLEST_SQUARE = 1e-12  # of a distance, as in the official code


def rkd_loss(student: Tensor, teacher: Tensor, *, distance_weight: float, angle_weight: float) -> Tensor:
    """Embeddings (b, c) of both, channels free to differ -> 0-dim loss."""
    distance = F.smooth_l1_loss(relative_distances(student), relative_distances(teacher))
    angle = F.smooth_l1_loss(angles(student), angles(teacher))
    return distance_weight * distance + angle_weight * angle


def relative_distances(embedding: Tensor) -> Tensor:
    """(b, c) -> (b, b) Euclidean distances over the mean of those between two images."""
    squares = embedding.square().sum(1)
    squares = squares.unsqueeze(1) + squares.unsqueeze(0) - 2 * embedding @ embedding.T
    distances = squares.clamp_min(SMALLEST_SQUARE).sqrt()
    distances = distances.masked_fill(torch.eye(len(embedding), dtype=torch.bool, device=embedding.device), 0)
    pairs = max(len(embedding) * (len(embedding) - 1), 1)
    return distances * (pairs / distances.sum().clamp_min(SMALLEST_SQUARE))


def angles(embedding: Tensor) -> Tensor:
    """(b, c) -> (b, b, b): the cosine of the angle at image i between images j and k."""
    directions = F.normalize(embedding.unsqueeze(0) - embedding.unsqueeze(1), dim=2)
    return directions @ directions.mT


class RKD(Distiller):
    """Distances and angles between the images of a batch, in the embedding."""

    def __init__(self, student: Outputs, teacher: Outputs, *, rkd_distance: float, rkd_angle: float):
        super().__init__()
        check_weights({"rkd_distance": rkd_distance, "rkd_angle": rkd_angle})
        self.distance_weight, self.angle_weight = rkd_distance, rkd_angle

    def setting(self) -> str:
        return f"distance {self.distance_weight:g}, angle {self.angle_weight:g}"

    def loss(self, student: Outputs, teacher: Outputs) -> Tensor:
        embeddings = (full_precision(outputs.embedding) for outputs in (student, teacher))
        return rkd_loss(*embeddings, distance_weight=self.distance_weight, angle_weight=self.angle_weight)
