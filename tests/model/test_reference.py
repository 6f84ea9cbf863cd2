"""The model is the published model: its stored values, and the independent float64 formula of `reference.py`."""

import json

import numerics
import pytest
import reference
import torch
from conftest import ROOT
from models import VOCAB, holed_batch, tiny_model
from safetensors.torch import load_file

from mosaicbert.bert_attention import alibi_slopes
from mosaicbert.bert_layers import BertForMaskedLM, BertForSequenceClassification, BertModel

DATA = ROOT / "tests" / "data" / "reference"
SHARED = ROOT.parent / "shared" / "reference"
DTYPES = (torch.float32, torch.float64)


def case_folder(name):
    folder = DATA / name if (DATA / name).exists() else SHARED / name
    if not folder.exists():
        pytest.skip(f"the published values of {name} are not at hand")
    return folder


@pytest.mark.parametrize("backend", ["eager", "sdpa"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["mlm-12heads-dim16", "mlm-4heads-dim64"])
def test_mlm_gives_published_states_logits_loss_and_gradients(name, dtype, backend):
    folder = case_folder(name)
    expected = load_file(folder / "expected.safetensors")
    model = BertForMaskedLM.from_pretrained(folder, attn_implementation=backend).to(dtype).eval()
    inputs = {key: expected[key] for key in ("input_ids", "attention_mask", "token_type_ids")}
    attended = expected["attention_mask"].bool()
    tolerance = numerics.PUBLISHED[dtype]

    output = model(**inputs, output_hidden_states=True)
    numerics.assert_same(output.logits[attended], expected["logits_at_attended"], tolerance, "logits")
    assert len(output.hidden_states) == model.config.num_hidden_layers + 1
    for number, state in enumerate(output.hidden_states[1:], start=1):
        numerics.assert_same(state[attended], expected[f"hidden_{number}_at_attended"], tolerance, f"layer {number}")

    loss = model(**inputs, labels=expected["labels"]).loss
    # The loss itself is a float32 mean in every dtype.
    numerics.assert_same(loss, expected["loss"], numerics.PUBLISHED[torch.float32], "loss")
    loss.backward()
    gradients = {key[len("grad.") :]: value for key, value in expected.items() if key.startswith("grad.")}
    assert len(gradients) > 20
    for key, value in gradients.items():
        numerics.assert_same(model.get_parameter(key).grad, value, numerics.PUBLISHED[torch.float32], key)


@pytest.mark.parametrize("backend", ["eager", "sdpa"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_classifier_gives_published_pooled_logits_and_losses(dtype, backend):
    folder = case_folder("seqcls-6heads-dim32")
    expected = load_file(folder / "expected.safetensors")
    model = BertForSequenceClassification.from_pretrained(folder, attn_implementation=backend).to(dtype).eval()
    inputs = {key: expected[key] for key in ("input_ids", "attention_mask")}
    tolerance = numerics.PUBLISHED[dtype]

    encoder = model.bert(**inputs)
    attended = expected["attention_mask"].bool()
    numerics.assert_same(encoder.last_hidden_state[attended], expected["last_hidden_at_attended"], tolerance)
    numerics.assert_same(encoder.pooler_output, expected["pooled"], tolerance)
    numerics.assert_same(model(**inputs).logits, expected["logits"], tolerance)
    for kind, problem in (
        ("single", "single_label_classification"),
        ("multi", "multi_label_classification"),
        ("regression", "regression"),
    ):
        model.config.problem_type = problem
        loss = model(**inputs, labels=expected[f"labels.{kind}"]).loss
        numerics.assert_same(loss, expected[f"loss.{kind}"], numerics.PUBLISHED[torch.float32], kind)


def test_reference_formula_gives_published_values():
    folder = DATA / "mlm-12heads-dim16"
    expected = load_file(folder / "expected.safetensors")
    judge = reference.Model(
        torch.load(folder / "pytorch_model.bin", weights_only=True), json.loads((folder / "config.json").read_text())
    )
    states = judge.hidden_states(expected["input_ids"], expected["attention_mask"], expected["token_type_ids"])
    attended = expected["attention_mask"].bool()
    tolerance = numerics.PUBLISHED[torch.float64]
    numerics.assert_same(states[2][attended], expected["hidden_2_at_attended"], tolerance)
    numerics.assert_same(judge.mlm_logits(states[2][attended]), expected["logits_at_attended"], tolerance)


@pytest.mark.parametrize("backend", ["eager", "sdpa"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_holes_left_padding_and_an_empty_row_match_the_reference(dtype, backend):
    model = tiny_model(BertModel, attn_implementation=backend).to(dtype)
    ids, mask = holed_batch()
    types = torch.randint(0, 2, ids.shape, generator=torch.Generator().manual_seed(1))
    judge = reference.Model(model.state_dict(), model.config.to_dict())
    expected = judge.hidden_states(ids, mask, types)

    output = model(ids, mask, types, output_hidden_states=True)
    assert len(output.hidden_states) == len(expected)
    for number, (state, truth) in enumerate(zip(output.hidden_states, expected)):
        numerics.assert_same(state, truth, numerics.SAME[dtype], f"state {number}")
    filled = mask.bool().any(dim=1)
    pooled = judge.pooled(expected[-1], mask)
    numerics.assert_same(output.pooler_output[filled], pooled[filled], numerics.SAME[dtype], "pooled")


@pytest.mark.parametrize("backend", ["eager", "sdpa"])
def test_gradients_with_holes_match_the_reference(backend):
    model = tiny_model(attn_implementation=backend).double()
    ids, mask = holed_batch()
    labels = torch.randint(0, VOCAB, ids.shape, generator=torch.Generator().manual_seed(2))
    labels[torch.rand(ids.shape, generator=torch.Generator().manual_seed(3)) < 0.5] = -100
    model(ids, mask, labels=labels).loss.backward()

    state = {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters()}
    judge = reference.Model(state, model.config.to_dict())
    counted = mask.bool() & (labels != -100)
    logits = judge.mlm_logits(judge.hidden_states(ids, mask)[-1][counted])
    torch.nn.functional.cross_entropy(logits, labels[counted]).backward()
    for name, parameter in model.named_parameters():
        # The loss is a float32 mean, so its gradient carries float32 rounding.
        numerics.assert_same(parameter.grad, state[name].grad, 1e-6, name)


@pytest.mark.parametrize("heads", [1, 2, 3, 4, 6, 8, 12, 16, 20, 25])
def test_slopes_match_the_reference(heads):
    assert alibi_slopes(heads) == pytest.approx(reference.alibi_slopes(heads), rel=1e-12)


def test_slopes_of_12_heads_are_the_published_list():
    expected = [2.0**-n for n in range(1, 9)] + [2.0**-0.5, 2.0**-1.5, 2.0**-2.5, 2.0**-3.5]
    assert alibi_slopes(12) == pytest.approx(expected, rel=1e-12)
