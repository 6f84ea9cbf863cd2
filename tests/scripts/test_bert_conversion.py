"""From BERT to MosaicBERT: every layer keeps its function as closely as the architecture allows."""

import json

import convert_bert
import numerics
import pytest
import torch
from folders import set_fields, stock_bert, write_tokenizer
from lib import bert_conversion, common
from repositories import write_repository
from safetensors.torch import load_file, save_file
from transformers import AutoModelForMaskedLM, AutoTokenizer

from mosaicbert.bert_layers import BertForMaskedLM

SAME = numerics.SAME[torch.float32]
CODE = set(common.CODE_FILES)


def test_fold_bias_is_exact_where_v_times_x_is_one():
    torch.manual_seed(0)
    weight, bias, constant = torch.randn(6, 4), torch.randn(6), torch.randn(4)
    x = torch.randn(10, 4)
    x = x + (1 - x @ constant)[:, None] * constant / constant.square().sum()
    gate, value = torch.nn.functional.linear(x, bert_conversion.fold_bias(weight, bias, constant)).chunk(2, dim=-1)
    numerics.assert_same(gate, x @ weight.T + bias, SAME)
    numerics.assert_same(value, torch.ones_like(value), SAME)


def test_fit_constant_without_ridge_is_the_exact_vector_of_a_layernorm():
    torch.manual_seed(0)
    norm = torch.nn.LayerNorm(16)
    torch.nn.init.uniform_(norm.weight, 0.5, 2.0)
    torch.nn.init.normal_(norm.bias)
    with torch.no_grad():
        x = norm(torch.randn(400, 16))
        exact = norm.weight.reciprocal() / (norm.bias / norm.weight).sum()
    # float32 outputs make the normal equations exact to about the square root of their condition times 1e-7.
    numerics.assert_same(bert_conversion.fit_constant(x, ridge=0), exact, 1e-3)
    shorter = bert_conversion.fit_constant(x, ridge=0.1)
    assert shorter.norm() < exact.norm()


def test_converted_layers_are_exact_but_for_positions(tmp_path, text):
    """Without a ridge the fit is exact; a token alone has no distance, and here all positions are alike."""
    source = stock_bert(tmp_path / "bert")
    with torch.no_grad():
        source.bert.embeddings.position_embeddings.weight.copy_(torch.linspace(-1, 1, 32).expand(512, 32))
    source.save_pretrained(tmp_path / "bert")
    folder = tmp_path / "new"
    reports = bert_conversion.convert(tmp_path / "bert", folder, [text], length=32, tokens=800, ridge=0)
    assert [report.layer for report in reports] == [0, 1, 2]
    model = BertForMaskedLM.from_pretrained(folder)
    ids = torch.arange(5, 26)[:, None]
    expected = source(ids).logits
    # Measured 1e-5: float32 rounding times the length of v, through three layers.
    numerics.assert_same(model(ids).logits[..., : expected.shape[-1]], expected, 1e-4)


def test_convert_bert_keeps_chosen_layers_and_pads_with_improbable_rows(tmp_path, text, run_script):
    source = stock_bert(tmp_path / "bert")
    target = tmp_path / "new"
    run_script(convert_bert, tmp_path / "bert", target, "--data", text, "--layers", 2, 0, "--tokens", 800)
    assert CODE <= {path.name for path in target.iterdir()}
    model = AutoModelForMaskedLM.from_pretrained(target, trust_remote_code=True)
    tokenizer = AutoTokenizer.from_pretrained(target)
    assert model.config.num_hidden_layers == 2
    assert model.config.vocab_size == 64
    first = model.bert.encoder.layer[0].attention.self.Wqkv.weight
    assert torch.equal(first[:32], source.bert.encoder.layer[2].attention.self.query.weight)
    logits = model(**tokenizer(["the cat [MASK] on the mat"], return_tensors="pt")).logits
    assert (model.cls.predictions.decoder.bias[len(tokenizer) :] <= -30).all()
    assert (logits.softmax(-1)[..., len(tokenizer) :] < 1e-12).all()
    assert "v·x" in (target / "README.md").read_text(encoding="utf-8")


def test_convert_bert_makes_a_head_from_frequencies(tmp_path, text):
    source = stock_bert(tmp_path / "bert")
    source.bert.save_pretrained(tmp_path / "encoder")  # keys without `bert.`, no MLM head
    write_tokenizer(tmp_path / "encoder")
    folder = tmp_path / "new"
    bert_conversion.convert(tmp_path / "encoder", folder, [text], [0], length=32, tokens=800)
    model = BertForMaskedLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    bias = model.cls.predictions.decoder.bias
    assert bias.argmax().item() == tokenizer.convert_tokens_to_ids("the")
    assert bias.softmax(-1)[tokenizer.convert_tokens_to_ids("[CLS]")] < bias.softmax(-1).max() / 100


def test_convert_bert_reads_old_layernorm_names(tmp_path, text):
    source = stock_bert(tmp_path / "bert")
    path = tmp_path / "bert" / "model.safetensors"
    old = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}
    weights = load_file(path)
    for new_name, old_name in old.items():
        weights = {name.replace(new_name, old_name): tensor for name, tensor in weights.items()}
    assert any("gamma" in name for name in weights)
    save_file(weights, path, metadata={"format": "pt"})
    bert_conversion.convert(tmp_path / "bert", tmp_path / "new", [text], tokens=800)
    model = BertForMaskedLM.from_pretrained(tmp_path / "new")
    assert torch.equal(model.bert.embeddings.LayerNorm.bias, source.bert.embeddings.LayerNorm.bias)


def test_convert_bert_refuses_an_untied_decoder():
    weights = {"embeddings.word_embeddings.weight": torch.zeros(5, 4)}
    weights["cls.predictions.decoder.weight"] = torch.ones(5, 4)
    with pytest.raises(ValueError, match="its MLM decoder is not tied to its embeddings"):
        bert_conversion.convert_head(weights)


def test_convert_bert_refuses_what_it_cannot_convert(tmp_path, text):
    stock_bert(tmp_path / "bert")
    for field, kept, other in (("position_embedding_type", "absolute", "relative_key"), ("hidden_act", "gelu", "relu")):
        set_fields(tmp_path / "bert" / "config.json", **{field: other})
        with pytest.raises(ValueError, match=f"expected {field} {kept}, got '{other}'"):
            bert_conversion.convert(tmp_path / "bert", tmp_path / "new", [text])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--ridge", "nan"), "argument --ridge: expected a number of at least 0, got 'nan'"),
        (("--max_length", 7), "max_length: expected at least 8 tokens, got 7"),
        (("--tokens", 30), "data: expected at least 5 windows of text to fit on, got 2"),
        (("--layers", 3), "layers: expected numbers from 0 to 2, got [3]"),
        (("--license", "a|b"), "license: expected an identifier such as apache-2.0, got 'a|b'"),
    ],
)
def test_a_mistake_on_the_command_line_of_convert_bert_is_named(tmp_path, text, run_script, capsys, options, message):
    stock_bert(tmp_path / "bert")
    with pytest.raises(SystemExit) as stop:
        run_script(convert_bert, tmp_path / "bert", tmp_path / "new", "--data", text, *options)
    assert message in (capsys.readouterr().err if stop.value.code == 2 else stop.value.code)
    assert not (tmp_path / "new").exists()


def test_a_fit_without_a_single_solution_says_that_the_ridge_is_too_small():
    with pytest.raises(ValueError, match="ridge: 0 leaves no single solution on 3 tokens of text"):
        bert_conversion.fit_constant(torch.zeros(3, 4), ridge=0)


def test_convert_bert_names_what_a_foreign_checkpoint_lacks(tmp_path):
    write_repository(tmp_path, code=False)
    config = json.loads((tmp_path / "config.json").read_text())
    with pytest.raises(ValueError, match="it lacks embeddings.position_embeddings.weight, .* more"):
        bert_conversion.read_source(common.load_weights(tmp_path), config)


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("bert.encoder.layer.1.output.dense.weight", (32, 63), r"must have shape \[32, 64\], got \[32, 63\]"),
        ("bert.encoder.layer.0.intermediate.dense.bias", (1,), r"must have shape \[64\], got \[1\]"),
        ("bert.embeddings.word_embeddings.weight", (20, 32), r"must have shape \[26, 32\], got \[20, 32\]"),
        ("bert.embeddings.position_embeddings.weight", (32,), r"must have shape \[32, 32\], got \[32\]"),
        ("cls.predictions.bias", (25,), r"must have shape \[26\], got \[25\]"),
    ],
)
def test_convert_bert_names_a_weight_of_a_wrong_shape(tmp_path, text, name, shape, message):
    stock_bert(tmp_path / "bert")
    path = tmp_path / "bert" / "model.safetensors"
    save_file({**load_file(path), name: torch.ones(shape)}, path, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=f"source: {name.removeprefix('bert.')} {message}"):
        bert_conversion.convert(tmp_path / "bert", tmp_path / "new", [text])
    assert not (tmp_path / "new").exists()
