"""Bad input: an error that names the argument, what was expected and what came."""

import re

import pytest
import torch
from models import ragged_batch, tiny_config, tiny_model

from mosaicbert.bert_layers import (
    BertForMaskedLM,
    BertForMultipleChoice,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertForTokenClassification,
    sequence_loss,
)
from mosaicbert.configuration_bert import BertConfig

IDS, MASK = ragged_batch([6, 4])


def fails(message):
    return pytest.raises(ValueError, match=re.escape(message))


@pytest.fixture(scope="module")
def model():
    return tiny_model()


def test_exactly_one_kind_of_input(model):
    with fails("exactly one of input_ids and inputs_embeds must be given, got neither"):
        model(attention_mask=MASK)
    with fails("exactly one of input_ids and inputs_embeds must be given, got both"):
        model(IDS, inputs_embeds=torch.zeros(2, 6, 48))


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"input_ids": IDS[0]}, "input_ids must have 2 dimensions [B, S], got [6]"),
        ({"inputs_embeds": torch.zeros(2, 48)}, "inputs_embeds must have 3 dimensions [B, S, E], got [2, 48]"),
        ({"input_ids": IDS, "attention_mask": MASK[:, :5]}, "attention_mask must have shape [2, 6], got [2, 5]"),
        (
            {"input_ids": IDS, "attention_mask": MASK[:, None, None, :]},
            "attention_mask must have shape [2, 6], got [2, 1, 1, 6]",
        ),
        ({"input_ids": IDS, "token_type_ids": IDS[:1]}, "token_type_ids must have shape [2, 6], got [1, 6]"),
        ({"input_ids": IDS, "position_ids": IDS[:, :3]}, "position_ids must have shape [2, 6], got [2, 3]"),
        ({"input_ids": IDS, "labels": IDS[:, :5]}, "labels must have shape [2, 6], got [2, 5]"),
        ({"input_ids": IDS, "labels": IDS[0]}, "labels must have shape [2, 6], got [6]"),
        (
            {"input_ids": IDS, "cu_seq_lens_q": torch.tensor([0, 12])},
            "cu_seq_lens_q describes one row [1, T] without attention_mask, got no mask and input_ids of shape [2, 6]",
        ),
        (
            {"input_ids": IDS[:1], "cu_seq_lens_q": torch.tensor([0.0, 6.0])},
            "cu_seq_lens_q must be integers of shape [N + 1], got torch.float32 [2]",
        ),
        (
            {"input_ids": IDS[:1], "cu_seq_lens_q": torch.tensor([0, 4, 3, 6])},
            "cu_seq_lens_q must rise from 0 to the 6 tokens given, got [0, 4, 3, 6]",
        ),
        (
            {"input_ids": IDS[:1], "cu_seq_lens_q": torch.tensor([0, 5])},
            "cu_seq_lens_q must rise from 0 to the 6 tokens given, got [0, 5]",
        ),
        (
            {"input_ids": IDS[:1], "cu_seq_lens_q": torch.tensor([0, 6]), "max_length_q": 5},
            "max_length_q must be at least the longest sequence, 6 tokens, got 5",
        ),
    ],
)
def test_wrong_rank_or_shape(model, arguments, message):
    with fails(message):
        model(**arguments)


@pytest.mark.parametrize("bad", [101, -1])
def test_a_token_id_outside_the_vocabulary_is_named_with_its_place(model, bad):
    ids = IDS.clone()
    ids[1, 2] = bad
    with fails(f"input_ids must lie in [0, 101), got {bad} at [1, 2]"):
        model(ids)
    with fails(f"token_type_ids must lie in [0, 2), got {bad} at [1, 2]"):
        model(
            IDS, token_type_ids=torch.zeros_like(IDS).index_put((torch.tensor(1), torch.tensor(2)), torch.tensor(bad))
        )
    labels = torch.full_like(IDS, -100)
    labels[0, 3] = bad
    with fails(f"labels must lie in [0, 101), got {bad} at [0]"):
        model(IDS, labels=labels)


def test_heads_name_wrong_labels():
    classifier = tiny_model(BertForSequenceClassification, num_labels=3)
    with fails("labels must have shape [2], got [2, 3]"):
        classifier(IDS, labels=torch.zeros(2, 3, dtype=torch.long))
    with fails("labels must have shape [2, 3], got [2]"):
        classifier(IDS, labels=torch.zeros(2))
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
    with fails("start_positions must have shape [2], got [2, 1]"):
        answering(IDS, start_positions=torch.zeros(2, 1, dtype=torch.long), end_positions=torch.tensor([0, 1]))
    with fails("input_ids must have 3 dimensions [B, C, S, …], got [2, 6]"):
        tiny_model(BertForMultipleChoice)(IDS)
    boundaries = torch.tensor([0, 6])
    with fails("cu_seq_lens_q cannot be served by BertForQuestionAnswering, which needs one row a text"):
        answering(IDS[:1], cu_seq_lens_q=boundaries)
    with fails("cu_seq_lens_q cannot be served by BertForMultipleChoice, which needs one row a text"):
        tiny_model(BertForMultipleChoice)(IDS[None], cu_seq_lens_q=boundaries)
    with fails("labels must have shape [1], got [2]"):
        tiny_model(BertForMultipleChoice)(IDS[None], labels=torch.tensor([0, 1]))


@pytest.mark.parametrize("value", [0, -3, 2.5, True, "512", None])
def test_config_refuses_what_is_no_positive_integer(value):
    for name in ("alibi_starting_size", "hidden_size", "num_attention_heads"):
        with fails(f"{name} must be a positive integer, got {value!r}"):
            BertConfig(**{name: value})


def test_config_refuses_heads_that_do_not_divide_the_hidden_size():
    with fails("hidden_size must be a multiple of num_attention_heads, got 50 and 12"):
        BertConfig(hidden_size=50)


def test_an_unknown_activation_is_named():
    with fails("got 'gelou'") as error:
        BertForMaskedLM(tiny_config(hidden_act="gelou"))
    assert "hidden_act must be one of" in str(error.value) and "gelu" in str(error.value)


def test_an_attention_implementation_that_cannot_serve_says_why():
    pytest.importorskip("triton", reason="without Triton the reason is another one: tests/test_loading.py")
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
