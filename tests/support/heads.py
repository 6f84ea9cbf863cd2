"""Every model class with arguments for a call, for tests that ask the same of all classes."""

import numerics
import torch
from models import ragged_batch, tiny_model

from mosaicbert.bert_layers import (
    BertForMaskedLM,
    BertForMultipleChoice,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertForTokenClassification,
    BertModel,
)

SAME = numerics.SAME[torch.float32]
HEADS = [
    BertModel,
    BertForMaskedLM,
    BertForSequenceClassification,
    BertForTokenClassification,
    BertForQuestionAnswering,
    BertForMultipleChoice,
]


def name_of(model_class):
    """The name of a class, for the ids of parametrized tests."""
    return getattr(model_class, "__name__", str(model_class))


def call_of(model_class, lengths=(7, 4), labels=True, seed=0):
    """Arguments of a call of a head, with labels where it has any; two choices a question for multiple choice."""
    ids, mask = ragged_batch(list(lengths), seed=seed)
    call = {"input_ids": ids, "attention_mask": mask}
    if model_class is BertForMultipleChoice:
        call = {name: torch.stack((tensor, tensor.roll(1, 0)), dim=1) for name, tensor in call.items()}
    if not labels or model_class is BertModel:
        return call
    rows = torch.arange(len(lengths))
    if model_class is BertForQuestionAnswering:
        return {**call, "start_positions": rows * 0, "end_positions": rows * 0 + 1}
    per_token = {BertForMaskedLM: ids, BertForTokenClassification: ids % 3}
    return {**call, "labels": per_token.get(model_class, rows % 2)}


def relabelled(call, change):
    """The arguments of a call, its labels passed through `change`."""
    return {name: change(x) if name.startswith(("labels", "start", "end")) else x for name, x in call.items()}


def head(model_class, **fields):
    """A tiny model of a class, with three labels where it classifies."""
    return tiny_model(model_class, **{"num_labels": 3, **fields})


def gradless(model):
    """The model without gradients, in eval mode."""
    return model.eval().requires_grad_(False)


def outputs(model, **call):
    """All tensors that a model returns."""
    return [x for x in model(**call, return_dict=False) if x is not None]


def loss_and_gradients(model, *arguments, **call):
    """The loss of a call, and the gradients that it gives the parameters."""
    model.zero_grad()
    loss = model(*arguments, **call).loss
    loss.backward()
    return [loss.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]


def assert_equal_outputs(actual, expected, tolerance=SAME):
    """Fail unless two lists of tensors agree one by one; refuses empty lists."""
    assert len(actual) == len(expected) > 0
    for one, other in zip(actual, expected):
        numerics.assert_same(one, other, tolerance)


def linear_layers(model):
    """Name to module of every linear layer."""
    return {name: module for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
