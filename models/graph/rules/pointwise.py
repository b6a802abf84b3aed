"""Functions of single entries, and what passes values on as they are."""

import operator

import torch
import torch.nn.functional as F
from torch import fx, nn
from torchvision.ops import StochasticDepth

from models.graph.call import Call, entrywise, is_entrywise, numbered, opaque, rule, through
from models.graph.channels import Channels, Step
from models.graph.tracing import is_mode

PRODUCTS = (operator.mul, torch.mul, "mul")


@rule(
    *(nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.RReLU, nn.ELU, nn.CELU, nn.SELU, nn.GELU, nn.SiLU, nn.Mish),
    *(nn.Hardswish, nn.Hardtanh, nn.Hardshrink, nn.Softshrink, nn.Tanhshrink, nn.Tanh, nn.Softsign),
    *(nn.Sigmoid, nn.Hardsigmoid, nn.LogSigmoid, nn.Softplus, nn.Threshold),
    *(operator.neg, operator.pow, torch.pow, torch.clamp, torch.square, torch.sqrt),
    *(torch.relu, torch.tanh, torch.sigmoid, torch.abs, torch.neg, torch.exp, F.sigmoid, F.tanh, F.logsigmoid),
    *(F.relu, F.relu6, F.leaky_relu, F.elu, F.celu, F.selu, F.gelu, F.silu, F.mish, F.hardswish, F.hardsigmoid),
    *(F.hardtanh, F.hardshrink, F.softshrink, F.tanhshrink, F.softsign, F.softplus, F.threshold),
    *("relu", "tanh", "sigmoid", "abs", "neg", "clamp", "square", "sqrt", "pow", "exp"),
)
@entrywise
def pointwise(call: Call) -> Step:
    """A function of single entries: it keeps the layout where f(0) = 0 or only zeros read f(0), else it needs the full width."""
    inputs = call.channelled_inputs()
    if len(inputs) != 1 or len([node for node in call.node.all_input_nodes if not is_mode(node)]) != 1:
        return opaque(call)
    given = call.channels(inputs[0])
    if _maps_zero_to_zero(call) or _scales_zeros(call, given):
        return call.step(given)
    return call.step(given.whole(), wants={inputs[0]: given.whole()})


def _scales_zeros(call: Call, given: Channels) -> bool:
    """Whether channels that are not stored are only multiplied with others that are not.

    So are the gates of a squeeze-excitation, and those of x * relu6(x + 3) / 6, with functions of single entries before the
    product.
    """

    def ends_in_zeros(node: fx.Node) -> bool:
        return bool(node.users) and all(is_product_with_as_few(user, node) or is_on_its_way(user) for user in node.users)

    def is_product_with_as_few(user: fx.Node, node: fx.Node) -> bool:
        factors = [other for other in user.all_input_nodes if other is not node]
        other = call.channels(factors[0]) if len(factors) == 1 and factors[0] in call.steps else None
        return user.target in PRODUCTS and given.fits(other) and set(other.stored) <= set(given.stored)

    def is_on_its_way(user: fx.Node) -> bool:
        return is_entrywise(user, call.modules) and ends_in_zeros(user)

    return ends_in_zeros(call.node)


def _maps_zero_to_zero(call: Call) -> bool:
    args, kwargs = fx.map_arg((call.node.args, dict(call.node.kwargs)), lambda node: False if is_mode(node) else torch.zeros(1))
    function = {
        "call_module": lambda: call.module,
        "call_method": lambda: getattr(torch.Tensor, call.node.target),
        "call_function": lambda: call.node.target,
    }[call.node.op]()
    with torch.no_grad():
        return torch.equal(function(*args, **kwargs), torch.zeros(1))  # not what went in, which may be overwritten


rule(
    *(nn.Identity, nn.Dropout, *numbered("Dropout"), StochasticDepth),
    *(F.dropout, F.dropout1d, F.dropout2d, F.dropout3d, torch.dropout),
    *("contiguous", "clone", "detach", "float", "double", "half", "bfloat16"),
)(through)
