"""Slots of the padded vocabulary: dead ones are never predicted, and tokens that are added within the padding work."""

import math

import pytest
import torch
from folders import write_complete_repository
from transformers import AutoModelForMaskedLM, AutoTokenizer

from mosaicbert.bert_vocabulary import DEAD_SLOT_BIAS

REMOTE = {"trust_remote_code": True}
SLOTS = 40  # the vocabulary of `folders.write_tokenizer` is smaller: the rest is padding
NEW = ["zebra", "lion"]


@pytest.fixture
def padded(tmp_path):
    """Model and tokenizer of a repository with dead slots, loaded as users do, with two tokens added."""
    model = write_complete_repository(tmp_path / "base", vocab_size=SLOTS, hidden_dropout_prob=0.0)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "base")
    assert len(tokenizer) + len(NEW) < SLOTS
    model.silence_dead_slots(len(tokenizer))
    model.save_pretrained(tmp_path / "base")
    tokenizer.add_tokens(NEW)
    return AutoModelForMaskedLM.from_pretrained(tmp_path / "base", **REMOTE), tokenizer


def train(model, tokenizer, steps=100, rate=5e-3):
    """Teach that the masked word after "the" is the new token; returns the losses."""
    torch.manual_seed(0)  # dropout
    labels = tokenizer(["the zebra sat", "a lion ran"], return_tensors="pt")["input_ids"]
    new = torch.isin(labels, torch.tensor(tokenizer.convert_tokens_to_ids(NEW)))
    ids = labels.masked_fill(new, tokenizer.mask_token_id)
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=rate, weight_decay=0.0)
    model.train()
    losses = []
    for _ in range(steps):
        loss = model(input_ids=ids, labels=labels.masked_fill(~new, -100)).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    model.eval()
    return losses


def answers(model, tokenizer):
    """The words that the model puts in the place of the new tokens."""
    ids = tokenizer(["the [MASK] sat", "a [MASK] ran"], return_tensors="pt")["input_ids"]
    logits = model(input_ids=ids).logits[ids == tokenizer.mask_token_id]
    assert (logits.softmax(-1)[:, len(tokenizer) :] == 0).all(), "a dead slot has a probability"
    return tokenizer.convert_ids_to_tokens(logits.argmax(-1))


def resize_if_larger(model, tokenizer):
    """The line that most scripts have; it does nothing here, as the padded vocabulary has room."""
    if len(tokenizer) > model.get_input_embeddings().weight.shape[0]:
        model.resize_token_embeddings(len(tokenizer))


RESIZES = {
    "resized": lambda model, tokenizer: model.resize_token_embeddings(len(tokenizer)),
    "resized and padded": lambda model, tokenizer: model.resize_token_embeddings(len(tokenizer), pad_to_multiple_of=8),
    "only if larger": resize_if_larger,
}


@pytest.mark.parametrize("resize", RESIZES.values(), ids=RESIZES)
def test_tokens_added_within_the_padded_vocabulary_train_and_survive_saving(tmp_path, padded, resize):
    model, tokenizer = padded
    resize(model, tokenizer)
    losses = train(model, tokenizer)
    assert losses[0] < 20 and losses[-1] < 0.1, losses
    assert answers(model, tokenizer) == NEW
    model.save_pretrained(tmp_path / "new")
    tokenizer.save_pretrained(tmp_path / "new")
    again = AutoModelForMaskedLM.from_pretrained(tmp_path / "new", **REMOTE).eval()
    assert answers(again, AutoTokenizer.from_pretrained(tmp_path / "new")) == NEW


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_tokens_added_within_the_padded_vocabulary_revive_in_low_precision(padded, dtype):
    model, tokenizer = padded
    model.to(dtype).train()
    ids = tokenizer("the zebra sat", return_tensors="pt")["input_ids"]
    assert model(input_ids=ids, labels=ids).loss < 20
    assert answers(model.eval(), tokenizer)  # no dead slot has a probability


def test_tokens_added_within_the_padded_vocabulary_train_under_compile(padded):
    torch._dynamo.reset()
    model, tokenizer = padded
    compiled = torch.compile(model, backend="aot_eager")
    losses = train(compiled, tokenizer)
    assert losses[0] < 20 and losses[-1] < 0.1, losses
    assert answers(model, tokenizer) == NEW


def test_other_slots_stay_dead_while_new_tokens_train(padded):
    model, tokenizer = padded
    train(model, tokenizer, steps=5)
    bias = model.cls.predictions.decoder.bias
    assert (bias[len(tokenizer) :] < DEAD_SLOT_BIAS / 2).all() and (bias[: len(tokenizer)] > -100).all()


def test_a_label_in_a_dead_slot_is_an_error_that_names_the_remedy(padded):
    model, tokenizer = padded
    ids = torch.tensor([[2, 5, 6, 3]])
    labels = torch.tensor([[-100, -100, SLOTS - 1, -100]])
    with pytest.raises(ValueError, match=rf"labels .*{SLOTS - 1}.*resize_token_embeddings\(len\(tokenizer\)"):
        model.eval()(ids, labels=labels)
    assert math.isfinite(model(ids, labels=ids).loss.item())


def test_dead_slots_as_inputs_are_no_error(padded):
    """A random word that a collator draws below `vocab_size` may be one."""
    model, _ = padded
    ids = torch.tensor([[2, SLOTS - 1, 6, 3]])
    assert torch.isfinite(model(ids).logits).all()


@pytest.mark.parametrize("saved", ["merged", "adapter"])
def test_tokens_added_within_the_padded_vocabulary_train_with_peft_trainable_token_indices(tmp_path, padded, saved):
    peft = pytest.importorskip("peft")
    model, tokenizer = padded
    model.resize_token_embeddings(len(tokenizer))
    new = tokenizer.convert_tokens_to_ids(NEW)
    config = peft.LoraConfig(
        r=4, target_modules=["Wqkv", "gated_layers", "wo"], trainable_token_indices={"word_embeddings": new}
    )
    adapted = peft.get_peft_model(model, config)
    losses = train(adapted, tokenizer)
    assert losses[0] < 20 and losses[-1] < 1, losses
    assert answers(adapted, tokenizer) == NEW
    if saved == "merged":
        adapted.merge_and_unload().save_pretrained(tmp_path / "new")
        again = AutoModelForMaskedLM.from_pretrained(tmp_path / "new", **REMOTE).eval()
    else:
        adapted.save_pretrained(tmp_path / "adapter")
        base = AutoModelForMaskedLM.from_pretrained(tmp_path / "base", **REMOTE)
        base.resize_token_embeddings(len(tokenizer))
        again = peft.PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    assert answers(again, tokenizer) == NEW
