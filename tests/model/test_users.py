"""What people do with an encoder and other tools: one test a situation, named after it."""

import copy
import json

import numerics
import pytest
import torch
import torch.nn.functional as F
import transformers
from conftest import ROOT
from folders import write_complete_repository, write_tokenizer
from heads import BACKENDS, HEADS, SAME, assert_equal_outputs, call_of, head, name_of, outputs
from lib.common import CODE_FILES
from models import VOCAB, ragged_batch, tiny_config, tiny_model
from torch import nn
from torch.nn.utils import parametrize, prune
from transformers import AutoModelForSequenceClassification, AutoTokenizer, pipeline

from mosaicbert.bert_layers import (
    BertForMaskedLM,
    BertForMultipleChoice,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertForTokenClassification,
    BertModel,
)
from mosaicbert.configuration_bert import BertConfig

REMOTE = {"trust_remote_code": True}

# Problem types


@pytest.mark.parametrize(
    "count, labels, guess",
    [
        (1, torch.tensor([0.5, -2.0]), "regression"),
        (1, torch.tensor([1, 3]), "regression"),
        (3, torch.tensor([[0.0, 1.0, 1.0], [1.0, 0.0, 0.0]]), "multi_label_classification"),
        (3, torch.tensor([2, 0]), "single_label_classification"),
        (3, torch.tensor([2, 0], dtype=torch.int32), "single_label_classification"),
    ],
)
def test_a_guessed_problem_type_is_kept_and_saved_as_stock_bert_does(tmp_path, count, labels, guess):
    model = head(BertForSequenceClassification, num_labels=count)
    ids, mask = ragged_batch([7, 4])
    model(ids, mask)
    assert model.config.problem_type is None, "without labels there is nothing to guess from"
    model(ids, mask, labels=labels)
    assert model.config.problem_type == guess
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["problem_type"] == guess
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path, **REMOTE)
    assert again.config.problem_type == guess


def test_a_declared_problem_type_is_never_replaced_by_a_guess():
    model = head(BertForSequenceClassification, problem_type="regression")
    ids, mask = ragged_batch([7, 4])
    targets = torch.randn(2, 3)
    output = model(ids, mask, labels=targets)
    numerics.assert_same(output.loss, F.mse_loss(output.logits, targets), SAME)
    assert model.config.problem_type == "regression"


def test_a_problem_type_guessed_under_compile_is_kept():
    torch._dynamo.reset()
    model = head(BertForSequenceClassification, num_labels=1, num_hidden_layers=1)
    torch.compile(model, backend="eager")(**call_of(BertModel), labels=torch.tensor([0.5, -2.0]))
    assert model.config.problem_type == "regression"


@pytest.mark.parametrize("count, labels", [(1, torch.tensor([0.5])), (3, torch.tensor([[0.0, 1.0, 1.0]]))])
def test_the_pipeline_answers_a_trained_regression_or_multi_label_model_rightly(tmp_path, count, labels):
    vocabulary = write_tokenizer(tmp_path)
    model = head(BertForSequenceClassification, num_labels=count, vocab_size=vocabulary)
    model(torch.tensor([[2, 5, 6, 3]]), labels=labels)
    model.save_pretrained(tmp_path)
    classify = pipeline("text-classification", str(tmp_path), **REMOTE, device="cpu")
    answers = classify("the cat sat", top_k=None)
    encoded = AutoTokenizer.from_pretrained(tmp_path)("the cat sat", return_tensors="pt")
    logits = model(**encoded).logits[0].detach()
    expected = logits if count == 1 else logits.sigmoid()
    scores = {answer["label"]: answer["score"] for answer in answers}
    got = torch.tensor([scores[f"LABEL_{number}"] for number in range(count)])
    numerics.assert_same(got, expected, SAME)


# Tools that look for linear layers


def linear_layers(model):
    return {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}


@pytest.mark.parametrize("model_class", HEADS, ids=name_of)
def test_every_matrix_but_an_embedding_belongs_to_a_plain_linear_layer(model_class):
    model = head(model_class)
    owners = {type(module) for module in model.modules() for p in module.parameters(recurse=False) if p.dim() == 2}
    assert owners == {nn.Embedding, nn.Linear}


def test_quantize_dynamic_quantizes_every_linear_layer():
    model = head(BertForMaskedLM)
    call = call_of(BertForMaskedLM, labels=False)
    expected = model(**call).logits
    names = set(linear_layers(model))
    quantized = torch.ao.quantization.quantize_dynamic(copy.deepcopy(model), {nn.Linear}, dtype=torch.qint8)
    found = {n for n, module in quantized.named_modules() if type(module) is torch.ao.nn.quantized.dynamic.Linear}
    assert found == names and len(names) == 2 * 4 + 2
    logits = quantized(**call).logits
    assert not torch.equal(logits, expected)
    numerics.assert_same(logits, expected, numerics.QUANTIZED)


def test_eight_bit_weights_of_the_shipped_checkpoint_keep_its_answers():
    """As weight-only quantizers round them (torchao, quanto, bitsandbytes): 127 steps a row of each linear layer."""
    model = BertForMaskedLM.from_pretrained(ROOT).eval()
    batch = AutoTokenizer.from_pretrained(ROOT)(
        ["Yesterday she [MASK] a letter.", "Tea, bread and butter."], padding=True, return_tensors="pt"
    )
    keep = batch["attention_mask"].bool()

    def answers():
        with torch.inference_mode():
            return model.bert(**batch).last_hidden_state[keep], model(**batch).logits[keep]

    expected = answers()
    for layer in linear_layers(model.bert).values():
        step = layer.weight.detach().abs().amax(1, keepdim=True) / 127
        layer.weight.data = (layer.weight / step).round().detach() * step
    for got, before in zip(answers(), expected):
        assert not torch.equal(got, before)
        assert F.cosine_similarity(got, before, dim=-1).mean() > 0.99


@pytest.mark.parametrize("grad", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize("model_class", [BertModel, BertForMaskedLM], ids=name_of)
def test_hooks_on_linear_layers_are_called_once_with_the_product(model_class, grad):
    model = head(model_class)
    seen = []

    def check(name):
        def hook(module, arguments, output):
            seen.append(name)
            numerics.assert_same(output, F.linear(arguments[0], module.weight, module.bias), SAME)

        return hook

    for name, module in linear_layers(model).items():
        module.register_forward_hook(check(name))
    with torch.set_grad_enabled(grad):
        model(**call_of(model_class, lengths=(90, 70), labels=False))
    assert sorted(seen) == sorted(linear_layers(model))


@pytest.mark.parametrize("grad", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize("way", ["hook", "pre_hook", "global_hook", "forward", "subclass", "parametrized", "pruned"])
def test_what_a_tool_does_to_a_linear_layer_has_its_effect(way, grad):
    """Hooks, replaced forwards, subclasses, parametrizations and pruning: nothing may compute around them."""
    call = call_of(BertModel, lengths=(90, 70))
    expected, model = head(BertModel), head(BertModel)
    handle = None
    for layer in expected.encoder.layer:
        with torch.no_grad():
            layer.mlp.gated_layers.weight.zero_()
    for layer in model.encoder.layer:
        linear = layer.mlp.gated_layers
        if way == "hook":
            linear.register_forward_hook(lambda module, arguments, output: output * 0)
        elif way == "pre_hook":
            linear.register_forward_pre_hook(lambda module, arguments: (arguments[0] * 0,))
        elif way == "forward":
            linear.forward = lambda x, linear=linear: F.linear(x, linear.weight) * 0
        elif way == "subclass":
            layer.mlp.gated_layers = silent_copy(linear)
        elif way == "parametrized":
            parametrize.register_parametrization(linear, "weight", Silent())
        elif way == "pruned":
            prune.random_unstructured(linear, "weight", amount=1.0)
    if way == "global_hook":
        gated = {id(layer.mlp.gated_layers) for layer in model.encoder.layer}
        handle = nn.modules.module.register_module_forward_hook(
            lambda module, arguments, output: output * 0 if id(module) in gated else None
        )
    try:
        with torch.set_grad_enabled(grad):
            got = model(**call).last_hidden_state
    finally:
        if handle:
            handle.remove()
    numerics.assert_same(got, expected(**call).last_hidden_state, SAME)


class Silent(nn.Module):
    """A parametrization to zero."""

    def forward(self, weight):
        return weight * 0


def silent_copy(linear):
    """A layer of a subclass of nn.Linear whose products are zero."""

    class SilentLinear(nn.Linear):
        def forward(self, x):
            return super().forward(x) * 0

    return SilentLinear(linear.in_features, linear.out_features, bias=False)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("model_class", HEADS[1:], ids=name_of)
def test_per_sample_gradients_come_from_hooks_on_linear_layers(model_class, backend):
    """As Opacus collects them: input and output gradient of each linear layer, contracted a sample at a time."""
    model = head(model_class, attn_implementation=backend)
    lengths = [7, 4, 9]
    call = call_of(model_class, lengths)
    layers = {n: m for n, m in linear_layers(model).items() if n.startswith("bert.encoder")}
    inputs, grads = {}, {}
    for name, module in layers.items():
        module.register_forward_hook(lambda m, arguments, output, name=name: inputs.update({name: arguments[0]}))
        module.register_full_backward_hook(lambda m, grad_in, grad_out, name=name: grads.update({name: grad_out[0]}))
    count = {BertForMaskedLM: 20, BertForTokenClassification: 20}.get(model_class, 3)
    model(**call, num_items_in_batch=count).loss.backward()
    rows = call["attention_mask"].flatten(1).sum(1).tolist()
    for sample, size in enumerate(rows):
        start = sum(rows[:sample])
        model.zero_grad()
        one = {name: tensor[sample : sample + 1] for name, tensor in call.items()}
        single = head(model_class, attn_implementation=backend)
        single(**one, num_items_in_batch=count).loss.backward()
        expected = dict(single.named_parameters())
        for name in layers:
            part = slice(start, start + size)
            got = grads[name][part].T @ inputs[name][part]
            numerics.assert_same(got, expected[f"{name}.weight"].grad, SAME, name)


# Packed rows


def packed_call(lengths=(5, 1, 8), boundaries=False):
    """One row of concatenated texts, by position ids or by boundaries, and the padded batch of the same texts."""
    ids, mask = ragged_batch(list(lengths))
    flat = ids[mask.bool()][None]
    if boundaries:
        bounds = torch.tensor([0, *lengths]).cumsum(0).int()
        return {"input_ids": flat, "cu_seq_lens_q": bounds, "max_length_q": max(lengths)}, (ids, mask)
    return {"input_ids": flat, "position_ids": torch.cat([torch.arange(n) for n in lengths])[None]}, (ids, mask)


@pytest.mark.parametrize("boundaries", [False, True], ids=["position_ids", "cu_seq_lens_q"])
@pytest.mark.parametrize("backend, dynamic", [("auto", None), *((backend, True) for backend in BACKENDS)])
def test_packed_rows_under_compile_stay_apart(backend, boundaries, dynamic):
    torch._dynamo.reset()
    model = head(BertForMaskedLM, num_hidden_layers=1, attn_implementation=backend).requires_grad_(False)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for lengths in ((5, 1, 8), (3, 11)):
        call, (ids, mask) = packed_call(lengths, boundaries)
        got, expected = compiled(**call, labels=call["input_ids"]), model(ids, mask, labels=ids)
        numerics.assert_same(got.logits[0], expected.logits[mask.bool()], SAME)
        numerics.assert_same(got.loss, expected.loss, SAME)


def test_packed_rows_under_compile_give_the_gradients_of_padded_ones():
    torch._dynamo.reset()
    call, (ids, mask) = packed_call()
    model, other = (head(BertForMaskedLM, num_hidden_layers=1) for _ in range(2))
    torch.compile(model, backend="aot_eager")(**call, labels=call["input_ids"]).loss.backward()
    other(ids, mask, labels=ids).loss.backward()
    for (name, parameter), expected in zip(model.named_parameters(), other.parameters()):
        numerics.assert_same(parameter.grad, expected.grad, SAME, name)


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("mask", [False, True], ids=["no_mask", "mask_of_ones"])
def test_several_rows_of_concatenated_texts_are_answered_rightly_or_refused(compiled, mask):
    torch._dynamo.reset()
    model = head(BertForMaskedLM, num_hidden_layers=1)
    call, (ids, keep) = packed_call((5, 1, 8))
    expected = model(ids, keep).logits[keep.bool()]
    rows = {name: tensor.repeat(2, 1) for name, tensor in call.items()}
    if mask:
        rows["attention_mask"] = torch.ones_like(rows["input_ids"])
    ask = torch.compile(model, backend="aot_eager") if compiled else model
    try:
        logits = ask(**rows).logits
    except ValueError as error:
        assert "position_ids" in str(error)
    else:
        for row in logits:
            numerics.assert_same(row, expected, SAME)


@pytest.mark.parametrize("boundaries", [False, True], ids=["position_ids", "cu_seq_lens_q"])
@pytest.mark.parametrize("model_class", [BertForQuestionAnswering, BertForMultipleChoice], ids=name_of)
def test_heads_that_need_one_row_a_text_refuse_both_spellings_of_packed_rows(model_class, boundaries):
    call, _ = packed_call(boundaries=boundaries)
    if model_class is BertForMultipleChoice:
        call = {
            name: x[None] if x is not None and name != "cu_seq_lens_q" else x
            for name, x in call.items()
            if "max" not in name
        }
    spelling = "cu_seq_lens_q" if boundaries else "position_ids"
    with pytest.raises(ValueError, match=f"{spelling} .*{model_class.__name__}.* one row a text"):
        head(model_class)(**call)


@pytest.mark.parametrize("model_class", [BertForQuestionAnswering, BertForMultipleChoice], ids=name_of)
def test_heads_that_need_one_row_a_text_take_ordinary_position_ids(model_class):
    call = call_of(model_class, lengths=(7, 7), labels=False)
    positions = torch.arange(7).expand_as(call["input_ids"])
    expected = outputs(head(model_class), **call)
    assert_equal_outputs(outputs(head(model_class), **call, position_ids=positions), expected, 0.0)


# Length limits that loaders read


def test_loaders_read_no_short_limit_from_the_shipped_config_and_from_the_defaults():
    shipped = json.loads((ROOT / "config.json").read_text())
    assert shipped["max_position_embeddings"] >= 8192 and BertConfig().max_position_embeddings >= 8192
    assert AutoTokenizer.from_pretrained(ROOT).model_max_length >= 8192
    published = json.loads((ROOT / "tests/data/hub-configs/mosaic-bert-base-seqlen-1024.json").read_text())
    assert published["max_position_embeddings"] == 512 and BertConfig(**published).max_position_embeddings == 1024


@pytest.mark.parametrize("loader", ["SentenceTransformer", "CrossEncoder", "SparseEncoder"])
def test_sentence_transformers_does_not_cut_long_texts(tmp_path, loader):
    sentence_transformers = pytest.importorskip("sentence_transformers")
    write_complete_repository(tmp_path)
    model = getattr(sentence_transformers, loader)(str(tmp_path), trust_remote_code=True, device="cpu")
    limit = model.max_length if loader == "CrossEncoder" else model.max_seq_length
    assert limit is None or limit >= 8192
    text, longer = " ".join(["cat"] * 700), " ".join(["cat"] * 700 + ["dog"] * 20)
    if loader == "CrossEncoder":
        one, other = model.predict([("a", text), ("a", longer)], convert_to_tensor=True)
    else:
        one, other = (torch.as_tensor(model.encode(t, convert_to_tensor=True)).to_dense() for t in (text, longer))
    assert not torch.equal(one, other), "what follows the first 700 words was cut"


# Auto classes


AUTO_CLASSES = {
    "AutoModel": "BertModel",
    "AutoModelForTextEncoding": "BertModel",
    "AutoModelForPreTraining": "BertForMaskedLM",
    "AutoModelForMaskedLM": "BertForMaskedLM",
}


@pytest.fixture(scope="module")
def repository(tmp_path_factory):
    folder = tmp_path_factory.mktemp("repository")
    write_complete_repository(folder, vocab_size=VOCAB)
    return folder


@pytest.mark.parametrize("auto_class", AUTO_CLASSES)
def test_every_auto_class_of_an_encoder_gives_its_weights(repository, auto_class):
    model = getattr(transformers, auto_class).from_pretrained(repository, **REMOTE).eval()
    assert type(model).__name__ == AUTO_CLASSES[auto_class] and type(model).__module__.startswith(
        "transformers_modules"
    )
    encoder = getattr(model, "bert", model)
    expected = tiny_model().bert(**call_of(BertModel)).last_hidden_state
    numerics.assert_same(encoder(**call_of(BertModel)).last_hidden_state, expected, 0.0)


@pytest.mark.parametrize("way", ["from_pretrained", "from_config"])
@pytest.mark.parametrize("auto_class", ["AutoModelForNextSentencePrediction", "AutoModelForCausalLM"])
def test_an_auto_class_without_a_model_here_is_refused_with_what_there_is(repository, auto_class, way):
    source = repository
    if way == "from_config":
        source = transformers.AutoConfig.from_pretrained(repository, **REMOTE)
    with pytest.raises(ValueError, match="AutoModelForMaskedLM") as error:
        getattr(getattr(transformers, auto_class), way)(source, **REMOTE)
    assert auto_class in str(error.value)


def test_every_auto_class_of_stock_bert_is_ours_or_refuses():
    """So that no auto class builds stock BERT, whose encoder would be random."""
    from transformers.models.auto import modeling_auto

    mappings = [m for name, m in vars(modeling_auto).items() if name.endswith("_MAPPING") and name.isupper()]
    served = {id(mapping) for mapping in mappings if transformers.BertConfig in mapping}
    autos = {
        n
        for n, c in vars(modeling_auto).items()
        if isinstance(c, type) and id(getattr(c, "_model_mapping", None)) in served
    }
    assert len(autos) >= 10
    known = json.loads((ROOT / "config.json").read_text())["auto_map"]
    deprecated = {"_AutoModelWithLMHead", "AutoModelWithLMHead"}  # gone since transformers 5
    assert not autos - set(known) - deprecated


@pytest.mark.parametrize("name", ["is_decoder", "add_cross_attention"])
def test_a_config_made_a_decoder_after_loading_is_refused(repository, name):
    config = transformers.AutoConfig.from_pretrained(repository, **REMOTE)
    setattr(config, name, False)
    with pytest.raises(ValueError, match=f"{name} must be False: MosaicBERT is a bidirectional encoder .* got True"):
        setattr(config, name, True)


def test_an_encoder_decoder_of_two_mosaicberts_is_refused_instead_of_built_from_stock_bert(repository):
    remote = {"encoder_trust_remote_code": True, "decoder_trust_remote_code": True}
    # 4.54 stops earlier: it drops the flag for the encoder.
    with pytest.raises(ValueError, match="MosaicBERT is a bidirectional encoder|trust_remote_code"):
        transformers.EncoderDecoderModel.from_encoder_decoder_pretrained(repository, repository, **remote)


# Parts called or replaced one by one


def test_embeddings_and_pooler_called_alone_take_what_stock_berts_take():
    model = head(BertModel)
    ids, mask = ragged_batch([7, 7])
    types = ids % 2
    output = model(ids, token_type_ids=types, output_hidden_states=True)
    numerics.assert_same(model.embeddings(ids, types), output.hidden_states[0], SAME)
    numerics.assert_same(model.embeddings(input_ids=ids), model(ids, output_hidden_states=True).hidden_states[0], SAME)
    numerics.assert_same(model.pooler(output.last_hidden_state), output.pooler_output, SAME)


@pytest.mark.parametrize("kind", ["word", "token_type"])
def test_larger_embeddings_put_in_the_place_of_the_models_take_their_ids(kind):
    model = head(BertModel)
    old = getattr(model.embeddings, f"{kind}_embeddings")
    new = nn.Embedding(old.num_embeddings + 2, old.embedding_dim)
    new.weight.data[-1] = old.weight[1]
    setattr(model.embeddings, f"{kind}_embeddings", new)
    new.weight.data[: old.num_embeddings] = old.weight
    name, first, last = {"word": "input_ids", "token_type": "token_type_ids"}[kind], 1, old.num_embeddings + 1
    call = {"input_ids": torch.tensor([[1, 1, 1]])}
    known, added = ({**call, name: torch.full((1, 3), number)} for number in (first, last))
    numerics.assert_same(model(**added).last_hidden_state, model(**known).last_hidden_state, 0.0)
    with pytest.raises(ValueError, match=rf"{name} must lie in \[0, {last + 1}\), got {last + 1}"):
        model(**{**call, name: torch.full((1, 3), last + 1)})


# Losses


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("zero", [0, torch.tensor(0)], ids=["int", "tensor"])
@pytest.mark.parametrize("model_class", HEADS[1:], ids=name_of)
def test_a_batch_without_a_label_loses_nothing_whatever_num_items_in_batch_says(model_class, zero, compiled):
    torch._dynamo.reset()
    call = call_of(model_class)
    for name in ("labels", "start_positions", "end_positions"):
        if name in call:
            call[name] = torch.full_like(call[name], -100)
    model = head(model_class, num_hidden_layers=1)
    ask = torch.compile(model, backend="eager") if compiled else model
    loss = ask(**call, num_items_in_batch=zero).loss
    assert loss.item() == 0.0
    loss.backward()
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    assert gradients and all((gradient == 0).all() for gradient in gradients)


def test_labels_as_a_column_count_as_a_row():
    """As stock BERT takes them: [B, 1] from datasets that keep a list of one label."""
    for model_class, names in (
        (BertForSequenceClassification, ["labels"]),
        (BertForMultipleChoice, ["labels"]),
        (BertForQuestionAnswering, ["start_positions", "end_positions"]),
    ):
        call = call_of(model_class)
        columns = {name: call[name][:, None] for name in names}
        model = head(model_class)
        assert model(**{**call, **columns}).loss.item() == model(**call).loss.item()


@pytest.mark.parametrize("labels", [torch.tensor([[0.5], [-2.0]]), torch.tensor([0.5, -2.0])], ids=["column", "row"])
def test_regression_takes_a_row_and_a_column(labels):
    model = head(BertForSequenceClassification, num_labels=1)
    output = model(**call_of(BertModel), labels=labels)
    numerics.assert_same(output.loss, F.mse_loss(output.logits.flatten(), labels.flatten()), SAME)


# Configurations


@pytest.mark.parametrize("loader", ["AutoModel", "AutoModelForMaskedLM", "AutoModelForSequenceClassification"])
def test_a_folder_from_a_saved_config_holds_the_code_that_from_config_needs(tmp_path, loader):
    tiny_config(num_labels=3).save_pretrained(tmp_path)
    assert {*CODE_FILES} <= {file.name for file in tmp_path.iterdir()}
    config = transformers.AutoConfig.from_pretrained(tmp_path, **REMOTE)
    model = getattr(transformers, loader).from_config(config, **REMOTE)
    assert type(model).__module__.startswith("transformers_modules")
    assert torch.isfinite(outputs(model, **call_of(BertModel))[0]).all()


@pytest.mark.parametrize("when", ["before", "loaded", "after"])
def test_output_attentions_in_the_config_is_served_by_eager(tmp_path, when):
    call = call_of(BertModel)
    expected = head(BertModel)(**call, output_attentions=True)
    if when == "before":
        model = head(BertModel, output_attentions=True)
    elif when == "loaded":
        head(BertModel).save_pretrained(tmp_path)
        model = BertModel.from_pretrained(tmp_path, output_attentions=True).eval()
    else:
        model = head(BertModel)
        model.config.output_attentions = True
    output = model(**call)
    assert_equal_outputs(output.attentions, expected.attentions, 0.0)
    numerics.assert_same(output.last_hidden_state, expected.last_hidden_state, 0.0)
    model.config.output_attentions = False
    assert model(**call).attentions is None
    assert model.config._attn_implementation in ("auto", "eager")


def test_more_layers_than_the_file_has_are_named(tmp_path):
    tiny_model().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"fewer layers than num_hidden_layers says.* 22 weights .* layers 2, 3 "):
        BertForMaskedLM.from_pretrained(tmp_path, num_hidden_layers=4)
