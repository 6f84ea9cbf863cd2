"""Write a MosaicBERT as ONNX files with dynamic batch size and length, under the names that engines look for."""

import collections
import contextlib
import logging
import sys
import warnings
from pathlib import Path

import numpy
import onnx
import onnx.inliner
import onnxruntime
import onnxscript
import torch
from onnxruntime.transformers.float16 import convert_float_to_float16
from onnxscript import opset20 as op
from packaging.version import Version

# Older releases write files for one batch size and length.
OLDEST_TORCH = Version("2.7")
INPUTS = ("input_ids", "attention_mask", "token_type_ids")
# The outputs of each model class, as optimum and transformers.js call them.
OUTPUTS = {
    "BertModel": ("last_hidden_state",),
    "BertForMaskedLM": ("logits",),
    "BertForSequenceClassification": ("logits",),
    "BertForTokenClassification": ("logits",),
    "BertForQuestionAnswering": ("start_logits", "end_logits"),
}
# The file of each type, which transformers.js asks for as fp32, fp16 and q8.
FILES = {"float32": "model.onnx", "float16": "model_fp16.onnx", "int8": "model_quantized.onnx"}
# Matrices of fewer values, such as the token types, stay float32: they take little space, and all tokens read them.
FEWEST_QUANTIZED = 16_384
LARGEST_FLOAT16 = 65_504.0
# The scores of all heads and rows in one step of chunked attention: 16 MiB in float32.
CHUNK_SCORES = 2**22
DOMAIN = "mosaicbert"


class Traced(torch.nn.Module):
    """A model with exactly the inputs and outputs of the file."""

    def __init__(self, model):
        super().__init__()
        self.model = model
        self.num_outputs = len(OUTPUTS[type(model).__name__])

    def forward(self, input_ids, attention_mask, token_type_ids):
        """Map three int64 [B, S] tensors to the tensors that `OUTPUTS` names."""
        return self.model(input_ids, attention_mask, token_type_ids, return_dict=False)[: self.num_outputs]


@onnxscript.script(onnxscript.values.Opset(DOMAIN, 1), default_opset=op)
def attend_in_chunks(query, key, value, mask, slopes, budget):
    """Compute attention with ALiBi in a loop over chunks of queries, without a tensor of [S, S].

    Args:
        query: float [B, H, S, D], times the scale.
        key: float [B, H, D, S].
        value: float [B, H, S, D].
        mask: float [B, 1, 1, S], 0 at tokens and the lowest number at padding.
        slopes: float [H, 1, 1], negative.
        budget: int64 scalar, the scores of one step.

    Returns:
        float [B, H, S, D].
    """
    zero = op.Constant(value_int=0)
    one = op.Constant(value_int=1)
    shape = op.Shape(query)
    length = op.Gather(shape, op.Constant(value_int=2))
    row = op.Max(op.Gather(shape, zero) * op.Gather(shape, one) * length, one)
    chunk = op.Max(op.Min(budget / row, length), one)
    positions = op.Range(zero, length, one)
    keys = op.Unsqueeze(positions, op.Constant(value_ints=[0]))
    first, second, third = op.Constant(value_ints=[0]), op.Constant(value_ints=[1]), op.Constant(value_ints=[2])
    context = op.Slice(value, first, first, third)  # nothing yet: [B, H, 0, D]
    for step in range((length + chunk - one) / chunk):
        start = op.Reshape(step * chunk, second)
        end = op.Reshape(step * chunk + chunk, second)
        queries = op.Unsqueeze(op.Slice(positions, start, end, first), second)
        bias = slopes * op.Cast(op.Abs(queries - keys), to=onnx.TensorProto.FLOAT) + mask
        weights = op.Softmax(op.MatMul(op.Slice(query, start, end, third), key) + bias, axis=-1)
        context = op.Concat(context, op.MatMul(weights, value), axis=2)
    return context


def chunked_attention(qkv, packed, alibi_slopes, scale, dropout_p):
    """Stand in for `attend_in_chunks` while a model is traced, as a function of the table of attention backends."""
    query, key, value = (x.transpose(1, 2) for x in packed.to_rows(qkv).unbind(2))
    mask = torch.zeros_like(packed.key_mask, dtype=qkv.dtype)
    mask = mask.masked_fill(~packed.key_mask, torch.finfo(qkv.dtype).min)[:, None, None]
    inputs = (query * scale, key.transpose(2, 3), value, mask, -alibi_slopes[:, None, None], torch.tensor(CHUNK_SCORES))
    context = torch.onnx.ops.symbolic(
        f"{DOMAIN}::{attend_in_chunks.name}", inputs, dtype=value.dtype, shape=value.shape, version=1
    )
    return packed.from_rows(context.transpose(1, 2))


@contextlib.contextmanager
def quiet():
    """Silence the exporter and the converter."""
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(logging.NOTSET)


def trace(model: torch.nn.Module) -> onnx.ModelProto:
    """Export a model as it is, ours or another BERT; see `to_onnx`."""
    # Three tensors, as torch takes one tensor in several arguments for one input.
    inputs = tuple(torch.ones(2, 9, dtype=torch.int64) for _ in INPUTS)
    sizes = {0: torch.export.Dim("batch"), 1: torch.export.Dim("sequence")}
    with quiet(), torch.inference_mode():
        program = torch.onnx.export(
            Traced(model).eval(),
            inputs,
            dynamo=True,
            dynamic_shapes=(sizes,) * len(INPUTS),
            input_names=INPUTS,
            output_names=OUTPUTS[type(model).__name__],
            verbose=False,
        )
    return program.model_proto


def to_onnx(model: torch.nn.Module, chunked: bool = False) -> onnx.ModelProto:
    """Export a model in float32, with its weights in the file.

    Args:
        model: of a class of `OUTPUTS`, float32, in eval mode.
        chunked: compute attention for a few queries at a time.

    Returns:
        The ONNX model, with dynamic batch size and length.

    Raises:
        ValueError: this torch cannot export a dynamic length, or chunked attention.
    """
    if Version(torch.__version__) < OLDEST_TORCH:
        raise ValueError(f"ONNX export needs torch {OLDEST_TORCH} or newer, got {torch.__version__}")
    if chunked and not hasattr(torch.onnx, "ops"):
        raise ValueError(f"chunked: torch 2.8 or newer is needed, got {torch.__version__}")
    backends = sys.modules[type(model).__module__].ATTENTION_BACKENDS
    row, before = backends["sdpa"], model.config._attn_implementation
    try:
        model.set_attn_implementation("sdpa")
        if chunked:
            backends["sdpa"] = type(row)(chunked_attention, row.dtypes)
        result = trace(model)
    finally:
        backends["sdpa"] = row
        model.set_attn_implementation(before)
    if chunked:
        result.functions.append(attend_in_chunks.to_function_proto())
        result = onnx.inliner.inline_local_functions(result)
    for part in (result, result.graph, *result.graph.node, *result.graph.value_info):
        del part.metadata_props[:]  # stack traces with the paths of this machine
    return result


def to_float16(model: onnx.ModelProto) -> onnx.ModelProto:
    """Copy a model to one that computes in float16 and returns float32."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    with quiet():
        return convert_float_to_float16(copy, keep_io_types=True, max_finite_val=LARGEST_FLOAT16)


def to_int8(model: onnx.ModelProto) -> onnx.ModelProto:
    """Copy a model to one that stores large matrices in 8 bits, with a scale for each output, and computes in float32.

    ONNX Runtime and other engines that fold constants turn the matrices into float32 when they load the file;
    OpenVINO keeps them in 8 bits.
    """
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    users = collections.defaultdict(set)
    for node in copy.graph.node:
        for name in node.input:
            users[name].add(node.op_type)
    tensors, nodes = [], []
    for tensor in copy.graph.initializer:
        is_matrix = len(tensor.dims) == 2 and tensor.data_type == onnx.TensorProto.FLOAT
        if not is_matrix or tensor.dims[0] * tensor.dims[1] < FEWEST_QUANTIZED:
            tensors.append(tensor)
            continue
        weight = onnx.numpy_helper.to_array(tensor)
        # A matrix as MatMul takes it has its outputs in columns; tables and transposed matrices have them in rows.
        scale = numpy.abs(weight).max(axis=0 if users[tensor.name] == {"MatMul"} else 1, keepdims=True) / 127
        scale[scale == 0] = 1
        rounded = numpy.rint(weight / scale).astype(numpy.int8)
        whole, scaled, widened = (f"{tensor.name}_{part}" for part in ("int8", "scale", "float32"))
        tensors += [onnx.numpy_helper.from_array(rounded, whole), onnx.numpy_helper.from_array(scale, scaled)]
        nodes.append(onnx.helper.make_node("Cast", [whole], [widened], to=onnx.TensorProto.FLOAT))
        nodes.append(onnx.helper.make_node("Mul", [widened, scaled], [tensor.name]))
    nodes += copy.graph.node
    del copy.graph.initializer[:], copy.graph.node[:]
    copy.graph.initializer.extend(tensors)
    copy.graph.node.extend(nodes)
    return copy


# The conversion of the float32 model to each type.
CONVERTED = {"float32": lambda model: model, "float16": to_float16, "int8": to_int8}


def onnx_session(path: Path):
    """Load a file into ONNX Runtime.

    Returns:
        A function from `input_ids`, `attention_mask` and `token_type_ids`, int64 [B, S], to the list of its outputs.
    """
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])

    def answer(*inputs):
        outputs = session.run(None, {name: tensor.numpy() for name, tensor in zip(INPUTS, inputs)})
        return [torch.from_numpy(output) for output in outputs]

    return answer
