"""ONNX: one export with dynamic batch and length, which ONNX Runtime runs at other sizes."""

import numerics
import pytest
import torch
from models import ragged_batch, tiny_model

from mosaicbert.bert_layers import BertForMaskedLM, BertForSequenceClassification, BertModel

SAME = numerics.SAME[torch.float32]


class Exported(torch.nn.Module):
    """The padded path with one output, the model's first."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, input_ids, attention_mask):
        return self.model(input_ids, attention_mask=attention_mask, return_dict=False)[0]


@pytest.mark.parametrize("dynamo", [True, False], ids=["dynamo", "torchscript"])
@pytest.mark.parametrize(
    ("model_class", "attention"),
    [
        (BertModel, "eager"),
        (BertForMaskedLM, "sdpa"),
        (BertForSequenceClassification, "auto"),
    ],
)
def test_onnx_runtime_agrees_beyond_the_traced_sizes(tmp_path, model_class, attention, dynamo):
    pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    model = tiny_model(model_class, attn_implementation=attention)
    ids, mask = ragged_batch([9, 4])
    names = ["input_ids", "attention_mask"]
    if dynamo:
        axes = {0: torch.export.Dim("batch", max=64), 1: torch.export.Dim("length", max=4096)}
        dynamic = {"dynamic_shapes": (axes, axes)}
    else:
        dynamic = {"dynamic_axes": {name: {0: "batch", 1: "length"} for name in (*names, "output")}}
    path = tmp_path / "model.onnx"
    torch.onnx.export(
        Exported(model).eval(),
        (ids, mask),
        path,
        dynamo=dynamo,
        input_names=names,
        output_names=["output"],
        **dynamic,
    )
    session = runtime.InferenceSession(path, providers=["CPUExecutionProvider"])
    for lengths in ([9, 4], [17], [40, 3, 22], [1, 1, 1, 130, 64]):
        ids, mask = ragged_batch(lengths)
        (output,) = session.run(None, {"input_ids": ids.numpy(), "attention_mask": mask.numpy()})
        expected = model(ids, attention_mask=mask, return_dict=False)[0]
        numerics.assert_same(torch.from_numpy(output), expected, SAME, f"lengths {lengths}")
