"""Networks whose last matrix is not that of the classes."""

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

FILE = str(Path(__file__).resolve())


def block() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 16, 3, 4, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU())


def gate() -> nn.Module:
    return nn.Sequential(nn.Linear(16, 4), nn.ReLU(), nn.Linear(4, 16), nn.Sigmoid())


class HeadFirst(nn.Module):
    """Squeeze-excitation of linear layers behind the classifier, which may be a convolution."""

    def __init__(self, num_classes: int, *, convolution: bool):
        super().__init__()
        self.head = nn.Conv2d(16, num_classes, 1) if convolution else nn.Linear(16, num_classes)
        self.body, self.gate = block(), gate()

    def forward(self, x: Tensor) -> Tensor:
        x = self.body(x)
        x = (x * self.gate(x.mean((2, 3)))[:, :, None, None]).mean((2, 3), keepdim=True)
        return self.head(x).flatten(1) if isinstance(self.head, nn.Conv2d) else self.head(x.flatten(1))


class Recurrent(nn.Module):
    def __init__(self, num_classes: int):
        super().__init__()
        self.body, self.head, self.rnn = block(), nn.Linear(16, num_classes), nn.LSTM(16, 16, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rnn(self.body(x).flatten(2).transpose(1, 2))[0].mean(1))


class Projected(nn.Module):
    """A projection for metric learning beside the classifier."""

    def __init__(self, num_classes: int):
        super().__init__()
        self.body, self.head, self.projection = block(), nn.Linear(16, num_classes), nn.Linear(16, 24)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x).mean((2, 3)))


class Cosine(nn.Module):
    def __init__(self, num_classes: int):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(num_classes, 16))
        self.body, self.embedding = block(), nn.Linear(16, 16, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return 10 * F.linear(F.normalize(self.embedding(self.body(x).mean((2, 3)))), F.normalize(self.weight))


class Wrapped(nn.Module):
    """Its own names begin as those of a wrapper do."""

    def __init__(self, num_classes: int):
        super().__init__()
        self.model = Projected(num_classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x)


def conv_head(num_classes: int) -> nn.Module:
    return HeadFirst(num_classes, convolution=True)


def head_first(num_classes: int) -> nn.Module:
    return HeadFirst(num_classes, convolution=False)


recurrent, projected, cosine, wrapped = Recurrent, Projected, Cosine, Wrapped
