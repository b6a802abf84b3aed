"""PKT: Passalis & Tefas, "Learning Deep Representations with Probabilistic Knowledge Transfer", ECCV 2018.

    p_ij = k_ij / sum_j k_ij,  k_ij = (cos(e_i, e_j) + 1) / 2;  L = mean over pairs of p^t_ij log(p^t_ij / p^s_ij)

over the embeddings e of a batch. As in the official code this is a mean over pairs and not the paper's sum.
"""

from torch import Tensor
from torch.linalg import vector_norm

from distill.base import Distiller, full_precision
from models.outputs import Outputs

EPSILON = 1e-7  # beside lengths and probabilities, as in the official code


def pkt_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Embeddings (b, c) of both, channels free to differ -> 0-dim loss."""
    student, teacher = neighbour_probabilities(student), neighbour_probabilities(teacher)
    return (teacher * ((teacher + EPSILON) / (student + EPSILON)).log()).mean()


def neighbour_probabilities(embedding: Tensor) -> Tensor:
    """(b, c) -> (b, b): how likely image i picks image j as its neighbour; rows sum to 1."""
    rows = embedding / (vector_norm(embedding, dim=1, keepdim=True) + EPSILON)
    kernel = (rows @ rows.T + 1) / 2
    return kernel / kernel.sum(1, keepdim=True)


class PKT(Distiller):
    """Which images of a batch are neighbours in the embedding."""

    def __init__(self, student: Outputs, teacher: Outputs):
        super().__init__()

    def loss(self, student: Outputs, teacher: Outputs) -> Tensor:
        return pkt_loss(full_precision(student.embedding), full_precision(teacher.embedding))
