"""A rule is one decorated function: after it, an operation that was unknown lets channels go."""

import torch
from torch import fx, nn

from models.graph import call
from prune.compact import compact


@fx.wrap
def triple(x):
    return x * 3


class Network(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 4, 1)
        with torch.no_grad():
            self.first.weight[:3], self.first.bias[:3] = 0, 0

    def forward(self, x):
        return self.second(triple(self.first(x)))


def test_a_new_rule_is_one_decorated_function(monkeypatch):
    monkeypatch.setattr(call, "_FUNCTIONS", dict(call._FUNCTIONS))
    images = torch.randn(2, 3, 4, 4)
    assert compact(Network(), images).second.weight.shape[1] == 8

    @call.rule(triple)
    def keeps_zero(step_of):
        return call.through(step_of)

    assert compact(Network(), images).second.weight.shape[1] == 5
