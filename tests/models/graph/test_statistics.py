"""What layers read, as rows: every kind of layer is a product of them with its weight."""

import pytest
import torch
from torch import Tensor, nn

from models.graph import statistics
from models.graph.statistics import Moments, input_rows, is_linear_map, output_rows, set_weight_matrix, weight_matrix

LAYERS = {
    "plain": (lambda: nn.Conv2d(4, 6, 3), (5, 4, 7, 8)),
    "strided and dilated": (lambda: nn.Conv2d(4, 6, (3, 2), stride=(2, 1), dilation=(1, 2), padding=(2, 1)), (3, 4, 9, 8)),
    "grouped": (lambda: nn.Conv2d(4, 6, 3, groups=2, padding=1, bias=False), (3, 4, 5, 5)),
    "depthwise": (lambda: nn.Conv2d(4, 8, 3, groups=4, padding=1), (3, 4, 5, 5)),
    "same": (lambda: nn.Conv2d(4, 6, 4, padding="same", dilation=2), (3, 4, 9, 9)),
    "valid": (lambda: nn.Conv2d(4, 6, 2, padding="valid"), (3, 4, 5, 5)),
    "reflecting": (lambda: nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect"), (3, 4, 5, 6)),
    "of sequences": (lambda: nn.Conv1d(4, 6, 3, groups=2, stride=2, padding=1), (3, 4, 9)),
    "of volumes": (lambda: nn.Conv3d(2, 3, (1, 2, 3), padding=(0, 1, 1)), (2, 2, 3, 4, 5)),
    "transposed": (lambda: nn.ConvTranspose2d(4, 6, (3, 2), stride=2, padding=1, output_padding=1), (3, 4, 5, 4)),
    "transposed in groups": (lambda: nn.ConvTranspose2d(4, 6, 3, groups=2, dilation=2, padding=5), (3, 4, 8, 8)),
    "transposed sequences": (lambda: nn.ConvTranspose1d(4, 2, 4, stride=3, bias=False), (3, 4, 5)),
    "transposed volumes": (lambda: nn.ConvTranspose3d(2, 3, 2, stride=2), (2, 2, 3, 2, 2)),
    "linear": (lambda: nn.Linear(4, 3), (5, 4)),
    "linear over tokens": (lambda: nn.Linear(4, 3, bias=False), (2, 5, 4)),
}


@pytest.fixture(params=LAYERS)
def layer_and_input(request: pytest.FixtureRequest) -> tuple[nn.Module, Tensor]:
    build, shape = LAYERS[request.param]
    torch.manual_seed(0)
    return build().double(), torch.randn(shape, dtype=torch.float64)


def test_rows_times_the_weight_are_the_output(layer_and_input):
    layer, x = layer_and_input
    outputs = input_rows(layer, x) @ weight_matrix(layer).mT
    if layer.bias is not None:
        outputs += layer.bias.view(len(outputs), 1, -1)
    torch.testing.assert_close(outputs, output_rows(layer, layer(x)))


def test_the_matrix_is_written_as_it_is_read(layer_and_input):
    layer, _ = layer_and_input
    before = layer.weight.detach().clone()
    matrix = weight_matrix(layer).detach().clone()
    set_weight_matrix(layer, torch.zeros_like(matrix))
    assert not layer.weight.any()
    set_weight_matrix(layer, matrix)
    assert torch.equal(layer.weight, before)


def test_the_sums_are_those_of_the_rows_in_pieces_or_at_once(layer_and_input, monkeypatch):
    layer, x = layer_and_input
    y = torch.randn_like(layer(x))
    rows, wanted = input_rows(layer, x), output_rows(layer, y)
    if layer.bias is not None:
        rows = torch.cat([rows, rows.new_ones(*rows.shape[:2], 1)], 2)
    monkeypatch.setattr(statistics, "CHUNK_BYTES", 1)  # an image at a time
    moments = Moments(layer)
    moments.add(x, y)
    torch.testing.assert_close(moments.gram, rows.mT @ rows)
    torch.testing.assert_close(moments.cross, rows.mT @ wanted)
    assert moments.count == rows.shape[1]
    matrix = torch.randn(len(rows), wanted.shape[2], rows.shape[2], dtype=torch.float64)
    torch.testing.assert_close(moments.errors(matrix), (rows @ matrix.mT - wanted).square().sum(1))


def test_a_layer_that_does_something_else_is_no_linear_map():
    class Scaled(nn.Conv2d):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    hooked = nn.Linear(2, 2)
    hooked.register_forward_hook(lambda layer, given, result: result + 1)
    computed = nn.utils.parametrizations.weight_norm(nn.Linear(2, 2))
    assert is_linear_map(nn.Conv2d(2, 2, 1))
    for layer in (Scaled(2, 2, 1), hooked, computed, nn.BatchNorm2d(2), nn.Identity()):
        assert not is_linear_map(layer)
