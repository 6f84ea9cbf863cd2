"""ONNX by torch's older exporter, whose dynamic batch and length ONNX Runtime runs at other sizes; export.py, which
takes the newer one, has tests of its own."""

import numerics
import pytest
import torch
from models import ragged_batch, tiny_model

from mosaicbert.bert_layers import BertForMaskedLM, BertForSequenceClassification, BertModel

SAME = numerics.SAME[torch.float32]


@pytest.mark.parametrize(
    ("model_class", "attention"),
    [(BertModel, "eager"), (BertForMaskedLM, "sdpa"), (BertForSequenceClassification, "auto")],
)
def test_onnx_runtime_agrees_beyond_the_traced_sizes(tmp_path, model_class, attention):
    pytest.importorskip("onnx")
    runtime = pytest.importorskip("onnxruntime")
    model = tiny_model(model_class, attn_implementation=attention)
    model.config.return_dict = False
    names, path = ["input_ids", "attention_mask"], tmp_path / "model.onnx"
    axes = {name: {0: "batch", 1: "length"} for name in (*names, "output")}
    options = {"dynamo": False, "input_names": names, "output_names": ["output"], "dynamic_axes": axes}
    torch.onnx.export(model, ragged_batch([9, 4]), path, **options)
    session = runtime.InferenceSession(path, providers=["CPUExecutionProvider"])
    for lengths in ([9, 4], [17], [40, 3, 22], [1, 1, 1, 130, 64]):
        ids, mask = ragged_batch(lengths)
        (output,) = session.run(["output"], {"input_ids": ids.numpy(), "attention_mask": mask.numpy()})
        numerics.assert_same(torch.from_numpy(output), model(ids, mask)[0], SAME, f"lengths {lengths}")
