"""The model is the published model: what the published code computed in float64, at head sizes 16, 32 and 64, comes out
of every row of the attention table, forward and backward, and of every Triton kernel."""

import functools
import json
from dataclasses import replace

import numerics
import pytest
import reference
import torch
from conftest import ROOT
from rows import INTERPRETED, ROWS
from safetensors.torch import load_file

from mosaicbert.bert_layers import ATTENTION_BACKENDS, FUSED_LAYERS, BertForMaskedLM, BertForSequenceClassification

pytestmark = pytest.mark.card

PUBLISHED = ROOT / "tests" / "data" / "reference"
GRADIENT = numerics.INTERPRETED_GRADIENT if INTERPRETED else numerics.PUBLISHED[torch.float32]

CASES = [
    (name, dtype)
    for name in ROWS
    for dtype in (torch.float32, torch.float64)
    if dtype in ATTENTION_BACKENDS[name].dtypes
]
every_row = pytest.mark.parametrize("row, dtype", CASES, ids=lambda value: str(value).removeprefix("torch."))


@pytest.fixture(autouse=True)
def kernels_in_the_interpreter(monkeypatch):
    """In Triton's interpreter the kernels serve the CPU, in tiles large enough to be quick."""
    if not INTERPRETED:
        return
    from triton_kernels import use_tiles

    use_tiles(monkeypatch, 64, 64)
    monkeypatch.setitem(ATTENTION_BACKENDS, "triton", replace(ATTENTION_BACKENDS["triton"], devices=("cpu",)))
    for name, row in FUSED_LAYERS.items():
        monkeypatch.setitem(FUSED_LAYERS, name, replace(row, devices=("cpu",)))


def load(model_class, case, row, dtype):
    """The published weights in one dtype with one row, in eval mode, where that row runs; and the published values."""
    model = model_class.from_pretrained(PUBLISHED / case, attn_implementation=row).to(dtype).eval()
    expected = load_file(PUBLISHED / case / "expected.safetensors", device=ROWS[row])
    return model.to(ROWS[row]), expected


@every_row
@pytest.mark.parametrize("case", ["mlm-12heads-dim16", "mlm-2heads-dim64"])
def test_masked_language_model(case, row, dtype, record_property):
    model, expected = load(BertForMaskedLM, case, row, dtype)
    inputs = {name: expected[name] for name in ("input_ids", "attention_mask", "token_type_ids")}
    attended = expected["attention_mask"].bool()

    output = model(**inputs, output_hidden_states=True)
    loss = model(**inputs, labels=expected["labels"]).loss
    loss.backward()

    # The loss is a float32 mean in every dtype, so its gradients err as in float32.
    tolerance, of_loss = numerics.PUBLISHED[dtype], numerics.PUBLISHED[torch.float32]
    compared = [(output.logits[attended], "logits_at_attended", tolerance), (loss, "loss", of_loss)]
    for number in range(1, model.config.num_hidden_layers + 1):
        compared.append((output.hidden_states[number][attended], f"hidden_{number}_at_attended", tolerance))
    for name in expected:
        if name.startswith("grad."):
            compared.append((model.get_parameter(name.removeprefix("grad.")).grad, name, GRADIENT))
    assert len(compared) > 20
    for actual, name, allowed in compared:
        numerics.assert_same(actual, expected[name], allowed, name)
    record_property("error", max(numerics.relative_error(actual, expected[name]) for actual, name, _ in compared))


@functools.cache
def gradients_of_the_formula(case):
    """Of the single-label loss, which no published gradients came with: by the independent formula in float64."""
    weights = torch.load(PUBLISHED / case / "pytorch_model.bin", weights_only=True)
    state = {name: weight.double().requires_grad_() for name, weight in weights.items()}
    judge = reference.Model(state, json.loads((PUBLISHED / case / "config.json").read_text()))
    expected = load_file(PUBLISHED / case / "expected.safetensors")
    mask = expected["attention_mask"]
    pooled = judge.pooled(judge.hidden_states(expected["input_ids"], mask)[-1], mask)
    logits = pooled @ state["classifier.weight"].T + state["classifier.bias"]
    numerics.assert_same(logits, expected["logits"], numerics.PUBLISHED[torch.float64], "logits of the formula")
    torch.nn.functional.cross_entropy(logits, expected["labels.single"]).backward()
    return {name: weight.grad for name, weight in state.items()}


@every_row
def test_sequence_classifier(row, dtype, record_property):
    case = "seqcls-6heads-dim32"
    model, expected = load(BertForSequenceClassification, case, row, dtype)
    mask = expected["attention_mask"]
    tolerance, of_loss = numerics.PUBLISHED[dtype], numerics.PUBLISHED[torch.float32]
    model.config.problem_type = "single_label_classification"
    output = model(expected["input_ids"], mask, labels=expected["labels.single"], output_hidden_states=True)
    hidden = output.hidden_states[-1][mask.bool()]
    numerics.assert_same(hidden, expected["last_hidden_at_attended"], tolerance, "hidden states")
    numerics.assert_same(output.logits, expected["logits"], tolerance, "logits")
    numerics.assert_same(output.loss, expected["loss.single"], of_loss, "loss")

    output.loss.backward()
    errors = []
    for name, gradient in gradients_of_the_formula(case).items():
        numerics.assert_same(model.get_parameter(name).grad, gradient, GRADIENT, name)
        errors.append(numerics.relative_error(model.get_parameter(name).grad, gradient))
    record_property("error", max(errors))


@pytest.mark.skipif(INTERPRETED, reason="the loss of a head is no kernel")
@pytest.mark.parametrize("kind, problem", [("multi", "multi_label_classification"), ("regression", "regression")])
def test_other_losses_of_a_sequence_classifier(kind, problem):
    model, expected = load(BertForSequenceClassification, "seqcls-6heads-dim32", "eager", torch.float64)
    model.config.problem_type = problem
    loss = model(expected["input_ids"], expected["attention_mask"], labels=expected[f"labels.{kind}"]).loss
    numerics.assert_same(loss, expected[f"loss.{kind}"], numerics.PUBLISHED[torch.float32])


@pytest.mark.skipif(INTERPRETED, reason="this is that process")
def test_triton_kernels_in_the_interpreter(interpreted):
    """The tests above once more, with attention, GeGLU and LayerNorm computed by Triton's kernels."""
    assert interpreted("-vv", __file__).count("triton-float32] PASSED") == 3
