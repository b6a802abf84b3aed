"""What an ONNX file of this project may consist of, and how onnxruntime runs it; for a process that needs no torch."""

from collections.abc import Iterator
from typing import Any

# Of the standard operations those that networks of images are written with: no control flow, no sequences, no random numbers
_NAMES = """
Abs Add And AveragePool BatchNormalization Cast Ceil Clip Concat Constant ConstantOfShape Conv ConvTranspose
CumSum DepthToSpace DequantizeLinear Div Einsum Elu Equal Erf Exp Expand Flatten Floor Gather GatherElements
GatherND Gelu Gemm GlobalAveragePool GlobalMaxPool Greater GreaterOrEqual GroupNormalization HardSigmoid
HardSwish Identity InstanceNormalization LayerNormalization LeakyRelu Less LessOrEqual Log LogSoftmax
LpNormalization MatMul Max MaxPool Mean Min Mish Mod Mul Neg Not Or PRelu Pad Pow QuantizeLinear Range
Reciprocal ReduceL1 ReduceL2 ReduceLogSumExp ReduceMax ReduceMean ReduceMin ReduceProd ReduceSum
ReduceSumSquare Relu Reshape Resize Round ScatterElements ScatterND Selu Shape Sigmoid Sign Size Slice Softmax
Softplus Softsign SpaceToDepth Split Sqrt Squeeze Sub Sum Tanh ThresholdedRelu Tile Transpose Trilu Unsqueeze
Where
"""
OPERATIONS = frozenset(_NAMES.split())
DOMAINS = ("", "ai.onnx")


def problems(model: Any) -> Iterator[str]:
    """What an onnx.ModelProto has that no file of this project does: other operations, graphs in graphs, data in other files."""
    if model.functions:
        yield "functions of its own"
    yield from (f"numbers of an opset {entry.domain!r}" for entry in model.opset_import if entry.domain not in DOMAINS)
    graph = model.graph
    if graph.sparse_initializer:
        yield "sparse tensors"
    tensors = list(graph.initializer)
    for node in graph.node:
        if node.op_type not in OPERATIONS or node.domain not in DOMAINS:
            yield f"the operation {node.domain + '.' if node.domain else ''}{node.op_type}"
        for attribute in node.attribute:
            if attribute.HasField("g") or attribute.graphs:
                yield f"a graph in an operation {node.op_type}"
            if attribute.HasField("sparse_tensor") or attribute.sparse_tensors:
                yield f"a sparse tensor in an operation {node.op_type}"
            tensors += [*([attribute.t] if attribute.HasField("t") else []), *attribute.tensors]
    yield from (f"a tensor whose data lie in another file, {each.name}" for each in tensors if is_external(each))


def is_external(tensor: Any) -> bool:
    return bool(tensor.external_data) or tensor.data_location == tensor.EXTERNAL


def inference_session(content: bytes, *, threads: int) -> Any:
    """The ONNX file `content` as an onnxruntime.InferenceSession on the CPU. Raises ImportError where onnxruntime is missing.

    Processors without VNNI add pairs of products of uint8 and int8 in 16 bits, which overflow for weights of 8 bits; there
    onnxruntime is told to take the slower kernels that do not (`session.x64quantprecision`).
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.add_session_config_entry("session.x64quantprecision", "1")
    return onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
