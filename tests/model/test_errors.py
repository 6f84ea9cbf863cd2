"""Bad input raises an error that names the argument, what was expected and what was given."""

import inspect
import math
import re

import pytest
import torch
import transformers
from heads import HEADS, assert_equal_outputs, call_of, head, name_of, outputs, relabelled
from models import ragged_batch, tiny_config, tiny_model

from mosaicbert.bert_layers import (
    HARMLESS_ARGUMENTS,
    BertForMaskedLM,
    BertForMultipleChoice,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertForTokenClassification,
    BertModel,
    sequence_loss,
)
from mosaicbert.configuration_bert import BertConfig

IDS, MASK = ragged_batch([6, 4])
EMBEDS = torch.zeros(2, 6, 48)


def fails(message):
    return pytest.raises(ValueError, match=re.escape(message))


@pytest.fixture(scope="module")
def model():
    return tiny_model()


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"attention_mask": MASK}, "exactly one of input_ids and inputs_embeds must be given, got neither"),
        (
            {"input_ids": IDS, "inputs_embeds": EMBEDS},
            "exactly one of input_ids and inputs_embeds must be given, got both",
        ),
        ({"input_ids": IDS[0]}, "input_ids must have 2 dimensions [B, S], got [6]"),
        ({"inputs_embeds": EMBEDS[0]}, "inputs_embeds must have 3 dimensions [B, S, E], got [6, 48]"),
        (
            {"input_ids": IDS, "cu_seq_lens_q": torch.tensor([0, 12])},
            "cu_seq_lens_q describes one row [1, T] without attention_mask, got no mask and input_ids of shape [2, 6]",
        ),
        (
            {"input_ids": IDS, "labels": IDS, "num_items_in_batch": "3"},
            "num_items_in_batch must be a number or a scalar tensor, got '3'",
        ),
    ],
)
def test_arguments_of_a_wrong_number_rank_or_kind_are_named(model, arguments, message):
    with fails(message):
        model(**arguments)


@pytest.mark.parametrize(
    "name, value",
    [
        *(("attention_mask", MASK[:, :5]), ("attention_mask", MASK[:, None, None, :]), ("token_type_ids", IDS[:1])),
        *(("position_ids", IDS[:, :3]), ("labels", IDS[:, :5]), ("labels", IDS[0])),
    ],
)
def test_an_argument_of_a_wrong_shape_is_named(model, name, value):
    with fails(f"{name} must have shape [2, 6], got {list(value.shape)}"):
        model(IDS, **{name: value})


@pytest.mark.parametrize(
    "bounds, longest, message",
    [
        ([0.0, 6.0], None, "cu_seq_lens_q must be integers of shape [N + 1], got torch.float32 [2]"),
        ([0, 4, 3, 6], None, "cu_seq_lens_q must rise from 0 to the 6 tokens given, got [0, 4, 3, 6]"),
        ([0, 5], None, "cu_seq_lens_q must rise from 0 to the 6 tokens given, got [0, 5]"),
        ([0, 6], 5, "max_length_q must be at least the longest sequence, 6 tokens, got 5"),
        ([0, 6], "7", "max_length_q must be an int or None, got '7'"),
    ],
)
def test_boundaries_that_do_not_fit_the_tokens_are_named(model, bounds, longest, message):
    with fails(message):
        model(IDS[:1], cu_seq_lens_q=torch.tensor(bounds), max_length_q=longest)


@pytest.mark.parametrize("model_class", HEADS, ids=name_of)
@pytest.mark.parametrize(
    "name",
    [
        *("next_sentence_label", "head_mask", "encoder_hidden_states", "encoder_attention_mask"),
        *("past_key_values", "cache", "atention_mask", "start_position"),
    ],
)
def test_an_argument_that_no_model_uses_must_be_none(model_class, name):
    """Some change the numbers of stock BERT, and some are misspelt."""
    model, call = head(model_class), call_of(model_class)
    assert_equal_outputs(outputs(model, **call, **{name: None}), outputs(model, **call), 0.0)
    with fails(f"{name} must be None: BertModel has no use for it, got <class 'torch.Tensor'>"):
        model(**call, **{name: torch.zeros(2)})


@pytest.mark.parametrize(
    ("model_class", "name"),
    [
        (BertModel, "labels"),
        (BertForQuestionAnswering, "labels"),
        (BertForMaskedLM, "start_positions"),
        (BertForSequenceClassification, "end_positions"),
    ],
    ids=str,
)
def test_labels_of_another_head_are_refused(model_class, name):
    with fails(f"{name} must be None"):
        head(model_class)(IDS, **{name: torch.tensor([0, 1])})


def test_every_argument_of_stock_bert_is_served_refused_or_harmless():
    """An argument that transformers adds has to be decided."""
    stock = transformers.models.bert.modeling_bert
    names = set()
    for name in {model_class.__name__ for model_class in HEADS} | {"BertForPreTraining"}:
        names |= set(inspect.signature(getattr(stock, name).forward).parameters)
    served = {"self", "kwargs", "output_attentions", "output_hidden_states", "return_dict"}
    for model_class in HEADS:
        served |= set(inspect.signature(model_class.forward).parameters)
    refused = {"head_mask", "next_sentence_label", "past_key_values", "cache"}
    refused |= {"encoder_hidden_states", "encoder_attention_mask"}
    assert names <= served | refused | HARMLESS_ARGUMENTS


@pytest.mark.parametrize("name", sorted(HARMLESS_ARGUMENTS))
def test_harmless_arguments_change_nothing(model, name):
    assert torch.equal(model(IDS, MASK, **{name: torch.tensor(3)}).logits, model(IDS, MASK).logits)


@pytest.mark.parametrize("bad", [101, -1])
def test_a_token_id_outside_the_vocabulary_is_named_with_its_position(model, bad):
    ids = IDS.clone()
    ids[1, 2] = bad
    with fails(f"input_ids must lie in [0, 101), got {bad} at [1, 2]"):
        model(ids)
    with fails(f"token_type_ids must lie in [0, 2), got {bad} at [1, 2]"):
        model(IDS, token_type_ids=torch.where(ids == bad, bad, 0))
    labels = torch.full_like(IDS, -100)
    labels[0, 3] = bad
    with fails(f"labels must lie in [0, 101), got {bad} at [0]"):
        model(IDS, labels=labels)


@pytest.mark.parametrize("unpad", [True, False])
@pytest.mark.parametrize("number, dtype", [(-1e4, torch.float32), (0.5, torch.float16), (2, torch.int64)], ids=str)
def test_a_mask_of_other_numbers_than_0_and_1_is_named(number, dtype, unpad):
    """A mask made to be added to scores was read as its opposite: 0 at tokens is padding."""
    model, mask = tiny_model(unpad_inputs=unpad), MASK.clone().to(dtype)
    assert torch.equal(model(IDS, mask).logits, model(IDS, MASK.bool()).logits)
    mask[1, 2] = number
    with fails(f"attention_mask must be 1 at tokens and 0 at padding, got {mask[1, 2].item()} at [1, 2]"):
        model(IDS, mask)


@pytest.mark.parametrize(
    "positions, wrong", [((5, 4, 3, 2, 1, 0), "4 at [0, 1]"), ((0, 1, 9, 10, 0, 1), "9 at [0, 2]")]
)
def test_positions_that_neither_rise_nor_restart_are_named(model, positions, wrong):
    with fails(f"position_ids must rise by 1 or restart as their row starts, got {wrong}"):
        model(IDS, position_ids=torch.tensor([positions]))


def test_heads_name_wrong_labels():
    classifier = tiny_model(BertForSequenceClassification, num_labels=3)
    with fails("labels must have shape [2], got [2, 2]"):
        classifier(IDS, labels=torch.zeros(2, 2, dtype=torch.long))
    with fails("labels of several classes per text must be floating, got torch.int64"):
        classifier(IDS, labels=torch.zeros(2, 3, dtype=torch.long))
    with fails(
        "labels of multi_label_classification must have shape [2, 3], got torch.float32 [2]; "
        "one class per text takes integers and single_label_classification"
    ):
        classifier(IDS, labels=torch.zeros(2))
    with fails("labels must have shape [2, 3], got [2, 2]"):
        classifier(IDS, labels=torch.zeros(2, 2))
    with fails("labels must lie in [0, 3), got 3 at [1]"):
        classifier(IDS, labels=torch.tensor([0, 3]))
    # Some releases of transformers refuse it in the config already.
    with fails("problem_type must be regression, single_label_classification or multi_label_classification, got 'x'"):
        sequence_loss(torch.zeros(2, 3), torch.zeros(2), "x", None)
    with fails("labels must have shape [2, 6], got [2]"):
        tiny_model(BertForTokenClassification)(IDS, labels=torch.zeros(2, dtype=torch.long))
    answering = tiny_model(BertForQuestionAnswering)
    with fails("start_positions and end_positions must be given together, got start_positions only"):
        answering(IDS, start_positions=torch.tensor([0, 1]))
    with fails("start_positions must have shape [2], got [2, 2]"):
        answering(IDS, start_positions=torch.zeros(2, 2, dtype=torch.long), end_positions=torch.tensor([0, 1]))
    with fails("input_ids must have 3 dimensions [B, C, S, …], got [2, 6]"):
        tiny_model(BertForMultipleChoice)(IDS)
    with fails("labels must have shape [1], got [2]"):
        tiny_model(BertForMultipleChoice)(IDS[None], labels=torch.tensor([0, 1]))


def test_an_attention_implementation_that_cannot_serve_says_why():
    model = tiny_model(attn_implementation="triton")
    with fails("attn_implementation 'triton' cannot serve this call: it supports devices cuda, got cpu"):
        model(IDS)
    with fails("it supports torch.float16, torch.bfloat16, torch.float32, got torch.float64"):
        model.double()(IDS)


def test_the_names_registered_with_transformers_refuse_other_architectures():
    from transformers import BertConfig as StockConfig
    from transformers import BertModel as StockModel

    sizes = {"num_hidden_layers": 1, "hidden_size": 48, "intermediate_size": 8, "vocab_size": 101}
    for name in ("auto", "triton"):
        # Before 4.57 stock BERT had a table of its own and does not find the name.
        with pytest.raises((ValueError, KeyError), match="'triton' are MosaicBERT's|" + name):
            StockModel(StockConfig(**sizes, attn_implementation=name))(IDS)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bool, torch.float16], ids=str)
@pytest.mark.parametrize("model_class", HEADS[1:], ids=name_of)
def test_labels_that_are_not_integers_are_named(model_class, dtype):
    model = head(model_class, problem_type="single_label_classification")
    name = "start_positions" if model_class is BertForQuestionAnswering else "labels"
    with fails(f"{name} must be integers, got {dtype}"):
        model(**relabelled(call_of(model_class), lambda labels: labels.to(dtype)))


@pytest.mark.parametrize("dtype", [torch.int8, torch.int16, torch.int32, torch.uint8], ids=str)
@pytest.mark.parametrize("model_class", HEADS[1:], ids=name_of)
def test_labels_of_every_integer_dtype_mean_the_same(model_class, dtype):
    model, call = head(model_class), call_of(model_class)
    if model_class is BertForMaskedLM and dtype != torch.uint8:
        call["labels"] = call["labels"].index_fill(1, torch.tensor(2), -100)
    loss = model(**relabelled(call, lambda labels: labels.to(dtype))).loss
    assert loss.item() == model(**call).loss.item()


def test_a_label_of_156_in_uint8_is_not_taken_for_minus_100():
    labels = torch.full((2, 6), 156, dtype=torch.uint8)
    with fails("labels must lie in [0, 101), got 156 at [0]"):
        tiny_model()(IDS, labels=labels)
    model = tiny_model(BertForTokenClassification, num_labels=200)
    numbers = model(IDS, labels=labels.long()).loss.item()
    assert model(IDS, labels=labels).loss.item() == numbers


@pytest.mark.parametrize("given", [list, "numpy", tuple], ids=str)
@pytest.mark.parametrize(
    "name",
    ["input_ids", "attention_mask", "token_type_ids", "position_ids", "inputs_embeds", "labels", "cu_seq_lens_q"],
)
def test_an_argument_that_is_not_a_tensor_is_named(model, name, given):
    tensors = {"inputs_embeds": torch.zeros(1, 6, 48), "cu_seq_lens_q": torch.tensor([0, 6])}
    tensor = tensors.get(name, IDS[:1])
    value = tensor.numpy() if given == "numpy" else given(tensor.tolist())
    call = {"input_ids": IDS[:1], name: value}
    if name == "inputs_embeds":
        del call["input_ids"]
    with pytest.raises(TypeError, match=f"{name} must be a tensor, got {type(value).__name__}"):
        model(**call)


@pytest.mark.parametrize(
    "model_class, name",
    [
        *((BertForQuestionAnswering, "start_positions"), (BertForQuestionAnswering, "end_positions")),
        *((BertForSequenceClassification, "labels"), (BertForTokenClassification, "labels")),
    ],
    ids=name_of,
)
def test_labels_of_a_head_that_are_not_tensors_are_named(model_class, name):
    with pytest.raises(TypeError, match=f"{name} must be a tensor, got list"):
        head(model_class)(**{**call_of(model_class), name: [0, 1]})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bool, torch.complex64], ids=str)
@pytest.mark.parametrize("name", ["input_ids", "token_type_ids", "position_ids"])
def test_ids_that_are_not_integers_are_named(model, name, dtype):
    with fails(f"{name} must be integers, got {dtype}"):
        model(**{"input_ids": IDS, name: torch.ones(2, 6).to(dtype)})


def test_embeddings_of_another_width_or_dtype_are_named(model):
    for width in (1, 47):
        with fails(f"inputs_embeds must have shape [2, 6, 48], got [2, 6, {width}]"):
            model(inputs_embeds=torch.zeros(2, 6, width))
    for dtype in (torch.float64, torch.bfloat16, torch.int64):
        with fails(f"inputs_embeds must be torch.float32 as the weights, got {dtype}"):
            model(inputs_embeds=EMBEDS.to(dtype))
    with fails("inputs_embeds must have shape [1, 2, 6, 48], got [1, 2, 6, 1]"):
        tiny_model(BertForMultipleChoice)(inputs_embeds=torch.zeros(1, 2, 6, 1))


def test_embeddings_in_the_autocast_dtype_are_taken(model):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for dtype in (torch.bfloat16, torch.float32):
            assert torch.isfinite(model(inputs_embeds=EMBEDS.to(dtype)).logits).all()


def test_multiple_choice_names_the_shape_that_it_was_given():
    model = tiny_model(BertForMultipleChoice)
    with fails("attention_mask must have shape [1, 2, 6], got [2, 6]"):
        model(IDS[None], attention_mask=MASK)
    with fails("attention_mask must have shape [1, 2, 6], got [1, 2, 5]"):
        model(IDS[None], attention_mask=MASK[None, :, :5])
    with fails("position_ids must have shape [1, 2, 6], got [1, 6]"):
        model(IDS[None], position_ids=torch.arange(6)[None])


SIZES = "vocab_size hidden_size num_hidden_layers num_attention_heads intermediate_size type_vocab_size".split()
SIZES += ["alibi_starting_size", "max_position_embeddings"]
# Field, what it must be, and values that it must not have.
FIELDS = [
    ("hidden_dropout_prob", "a number in [0, 1)", [1.0, -0.1, None, True]),
    ("attention_probs_dropout_prob", "a number in [0, 1)", [math.nan, "0.1"]),
    ("classifier_dropout", "None or a number in [0, 1)", [1.5]),
    ("layer_norm_eps", "a positive number", [0, -1e-12, "1e-12", math.inf]),
    ("initializer_range", "a non-negative number", [-0.02, math.nan]),
    ("pad_token_id", "None or lie in [0, 101)", [101, -1, 1.0]),
    ("hidden_size", "a multiple of num_attention_heads", [50]),
    ("num_hidden_layers", "at most 1000", [10**9]),
    ("hidden_act", "one of ", ["gelou", 3]),
    ("sparse_prediction", "True or False", ["no"]),
    ("low_precision_layernorm", "True or False", [1]),
    *((name, "False: MosaicBERT is a bidirectional", [True]) for name in ("is_decoder", "add_cross_attention")),
]


@pytest.mark.parametrize("value", [0, -3, 2.5, True, "512", None, math.inf])
@pytest.mark.parametrize("name", SIZES)
def test_a_config_names_a_size_that_is_not_a_positive_integer(name, value):
    with fails(f"{name} must be a positive integer, got {value!r}"):
        BertConfig(**{name: value})


@pytest.mark.parametrize(
    "name, rule, value", [(name, rule, value) for name, rule, values in FIELDS for value in values]
)
@pytest.mark.parametrize("way", ["built", "loaded"])
def test_a_config_names_a_field_of_a_wrong_value(tmp_path, name, rule, value, way):
    message = f"{name} must be {re.escape(rule)}.*, got {re.escape(repr(value))}"
    if way == "built":
        with pytest.raises(ValueError, match=message):
            tiny_config(**{name: value})
        return
    tiny_model().save_pretrained(tmp_path)
    # transformers 5 checks the type of some fields itself, with an error of its own.
    with pytest.raises(Exception, match=f"{message}|Validation error for field '{name}'"):
        BertForMaskedLM.from_pretrained(tmp_path, **{name: value})


def test_a_field_that_is_set_wrongly_is_named():
    """It may be set after the config was built, or in transformers' own config."""
    from transformers import BertConfig as StockConfig

    ours = tiny_config()
    with fails("hidden_dropout_prob must be a number in [0, 1), got 2.0"):
        ours.hidden_dropout_prob = 2.0
    stock = StockConfig(hidden_size=48, num_hidden_layers=2, intermediate_size=40, vocab_size=101, type_vocab_size=0)
    with fails("type_vocab_size must be a positive integer, got 0"):
        BertForMaskedLM(stock)
