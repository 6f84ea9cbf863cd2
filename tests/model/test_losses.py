"""Losses: which labels count, what divides the sum, and how the problem type is guessed."""

import json

import numerics
import pytest
import torch
import torch.nn.functional as F
from folders import write_tokenizer
from heads import HEADS, SAME, call_of, head, name_of, relabelled
from models import ragged_batch, random_labels, tiny_model
from repositories import REMOTE
from transformers import AutoModelForSequenceClassification, AutoTokenizer, pipeline

from mosaicbert.bert_layers import (
    BertForMaskedLM,
    BertForMultipleChoice,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertModel,
)


def test_num_items_in_batch_divides_the_summed_loss():
    model = tiny_model()
    ids, mask = ragged_batch([6, 9])
    labels = random_labels(ids)
    count = int(((labels != -100) & mask.bool()).sum())
    mean = model(ids, mask, labels=labels).loss
    for items in (2 * count, torch.tensor(2 * count)):
        assert model(ids, mask, labels=labels, num_items_in_batch=items).loss.item() == pytest.approx(mean.item() / 2)


def test_the_loss_counts_every_label_of_a_real_token_and_no_other(backend):
    model = tiny_model(attn_implementation=backend)
    ids, mask = ragged_batch([6, 9])
    logits = model(ids, mask).logits
    labels = random_labels(ids)
    labels[0, 2] = 0  # id 0 counts like any other
    counted = (labels != -100) & mask.bool()
    assert (labels[~mask.bool()] != -100).any(), "labels on padding are part of this test"
    expected = F.cross_entropy(logits[counted], labels[counted])
    output = model(ids, mask, labels=labels)
    numerics.assert_same(output.loss, expected, SAME)
    numerics.assert_same(output.logits[counted], logits[counted], SAME)
    assert output.logits.shape == logits.shape and output.logits[~counted].abs().sum() == 0


def test_sparse_prediction_returns_the_labelled_rows():
    ids, mask = ragged_batch([6, 9])
    labels = random_labels(ids)
    counted = (labels != -100) & mask.bool()
    dense = tiny_model()(ids, mask, labels=labels)
    sparse = tiny_model(sparse_prediction=True)(ids, mask, labels=labels)
    assert sparse.loss.item() == dense.loss.item()
    numerics.assert_same(sparse.logits, dense.logits[counted], 0.0)


def test_known_positions_of_labels_give_the_same_loss_and_logits():
    model = tiny_model()
    ids, _ = ragged_batch([9, 9])
    labels = random_labels(ids)
    expected = model(ids, labels=labels)
    positions = (labels != -100).flatten().nonzero().flatten()
    output = model(ids, labels=labels, masked_lm_positions=positions)
    assert output.loss.item() == expected.loss.item()
    numerics.assert_same(output.logits, expected.logits, 0.0)
    with pytest.raises(ValueError, match="masked_lm_positions needs a batch without padding, got an attention_mask"):
        model(ids, torch.ones_like(ids), labels=labels, masked_lm_positions=positions)


@pytest.mark.parametrize("model_class", HEADS[1:], ids=name_of)
def test_a_batch_without_a_label_has_zero_loss_whatever_num_items_in_batch_says(model_class):
    call = without_labels(model_class)
    for items in (None, 0, torch.tensor(0)):
        assert_has_zero_loss(head(model_class, num_hidden_layers=1), {**call, "num_items_in_batch": items})


def test_a_batch_without_a_label_has_zero_loss_under_compile():
    torch._dynamo.reset()
    call = {**without_labels(BertForMaskedLM), "num_items_in_batch": torch.tensor(0)}
    assert_has_zero_loss(torch.compile(head(BertForMaskedLM, num_hidden_layers=1), backend="eager"), call)


def without_labels(model_class):
    """Arguments of a call in which every label is ignored."""
    return relabelled(call_of(model_class), lambda labels: torch.full_like(labels, -100))


def assert_has_zero_loss(model, call):
    """Fail unless a call has a loss of 0 with zero gradients."""
    loss = model(**call).loss
    assert loss.item() == 0.0
    loss.backward()
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    assert gradients and all((gradient == 0).all() for gradient in gradients)


@pytest.mark.parametrize(
    "model_class", [BertForSequenceClassification, BertForMultipleChoice, BertForQuestionAnswering], ids=name_of
)
def test_labels_as_a_column_count_as_a_row(model_class):
    """As stock BERT takes them: [B, 1] from datasets that keep a list of one label."""
    model, call = head(model_class), call_of(model_class)
    columns = relabelled(call, lambda labels: labels[:, None])
    assert model(**columns).loss.item() == model(**call).loss.item()


def test_regression_takes_a_column():
    labels = torch.tensor([[0.5], [-2.0]])
    output = head(BertForSequenceClassification, num_labels=1)(**call_of(BertModel), labels=labels)
    numerics.assert_same(output.loss, F.mse_loss(output.logits, labels), SAME)


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


@pytest.mark.parametrize("count, labels", [(1, torch.tensor([0.5])), (3, torch.tensor([[0.0, 1.0, 1.0]]))])
def test_pipelines_return_the_scores_of_regression_and_multi_label_models(tmp_path, count, labels):
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
