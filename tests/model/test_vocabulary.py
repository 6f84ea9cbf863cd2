"""Rows of a padded vocabulary without a token: improbable, otherwise ordinary, and ready for added tokens."""

import numerics
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT
from folders import write_complete_repository
from lib.common import lower_unused_biases
from models import tiny_model
from repositories import REMOTE
from transformers import AutoModelForMaskedLM, AutoTokenizer

from mosaicbert.bert_layers import BertForMaskedLM

ROWS = 40  # the vocabulary of `folders.write_tokenizer` is smaller: the rest is padding
NEW = ["zebra", "lion"]


@pytest.fixture
def padded(tmp_path):
    """Model and tokenizer of a repository with unused rows, loaded as users do, with two tokens added."""
    model = write_complete_repository(tmp_path / "base", vocab_size=ROWS, hidden_dropout_prob=0.0)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "base")
    assert len(tokenizer) + len(NEW) < ROWS
    lower_unused_biases(model, len(tokenizer))
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
    """The words that the model predicts at the positions of the new tokens."""
    ids = tokenizer(["the [MASK] sat", "a [MASK] ran"], return_tensors="pt")["input_ids"]
    logits = model(input_ids=ids).logits[ids == tokenizer.mask_token_id]
    assert (logits.softmax(-1)[:, len(tokenizer) :] < 1e-10).all(), "a row without a token is probable"
    return tokenizer.convert_ids_to_tokens(logits.argmax(-1))


RESIZES = {
    "resized": lambda model, tokenizer: model.resize_token_embeddings(len(tokenizer)),
    "resized and padded": lambda model, tokenizer: model.resize_token_embeddings(len(tokenizer), pad_to_multiple_of=8),
    "not resized": lambda model, tokenizer: None,  # most scripts resize only if the tokenizer is larger than the table
}


@pytest.mark.parametrize("resize", RESIZES.values(), ids=RESIZES)
def test_tokens_added_within_the_padded_vocabulary_train_and_survive_saving(tmp_path, padded, resize):
    model, tokenizer = padded
    resize(model, tokenizer)
    losses = train(model, tokenizer)
    assert 25 < losses[0] < 40 and losses[-1] < 0.1, losses
    assert answers(model, tokenizer) == NEW
    model.save_pretrained(tmp_path / "new")
    tokenizer.save_pretrained(tmp_path / "new")
    again = AutoModelForMaskedLM.from_pretrained(tmp_path / "new", **REMOTE).eval()
    assert answers(again, AutoTokenizer.from_pretrained(tmp_path / "new")) == NEW


@pytest.mark.parametrize("biases", [[0.0, 0.0, 0.0], [-3.0, -20.0, 4.0], [-15.0, -40_000.0, 2.0]], ids=str)
def test_the_bias_of_unused_rows_is_well_below_that_of_every_token(biases):
    model = tiny_model(vocab_size=8)
    bias = model.cls.predictions.decoder.bias
    bias.data[:3] = torch.tensor(biases)
    assert lower_unused_biases(model, 3) == 5
    assert bias[:3].tolist() == biases and len(bias) == 8
    assert (bias[3:] == min(-30, min(biases) - 15)).all() and bias.half().isfinite().all()


@pytest.fixture(scope="module")
def shipped():
    """The model that the repository ships, its tokenizer, and its logits [T, V] for some texts with masked words."""
    model = BertForMaskedLM.from_pretrained(ROOT).eval()
    tokenizer = AutoTokenizer.from_pretrained(ROOT)
    texts = ["The capital of France is [MASK].", "[MASK] is a [MASK] language.", "zz [MASK] ; 12 [MASK]"]
    batch = tokenizer(texts, return_tensors="pt", padding=True)
    return model, tokenizer, model(**batch).logits[batch["attention_mask"].bool()].detach()


def test_unused_rows_of_the_shipped_file_are_improbable(shipped):
    model, tokenizer, logits = shipped
    bias = model.cls.predictions.decoder.bias
    assert (bias[len(tokenizer) :] == -30).all() and (bias[: len(tokenizer)] > -15.5).all()
    # Their embeddings are zero, so this is exp(-30) over the sum of exponentials: exp(-4.3) at least in these texts.
    probabilities = logits.softmax(-1)[:, len(tokenizer) :]
    assert ((0 < probabilities) & (probabilities < 1e-11)).all()


LOSSES = {
    "entropy": lambda logits, other: -(logits.softmax(-1) * logits.softmax(-1).log()).sum(-1).mean(),
    "R-Drop": lambda logits, other: F.kl_div(
        logits.log_softmax(-1), other.log_softmax(-1), log_target=True, reduction="batchmean"
    ),
    "distillation": lambda logits, other: F.kl_div(
        (logits / 0.5).log_softmax(-1), (other / 0.5).softmax(-1), reduction="batchmean"
    ),
    "label smoothing": lambda logits, other: F.cross_entropy(logits, other.argmax(-1), label_smoothing=0.1),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
def test_losses_over_the_whole_vocabulary_count_unused_rows_for_almost_nothing(shipped, loss, dtype):
    """With a bias of -10,000 these were NaN, or 0.2 nats too many."""
    _, tokenizer, logits = shipped
    logits = logits.to(dtype).float()
    other = logits.roll(1, 0)
    every = logits.clone().requires_grad_()
    value = loss(every, other)
    tokens = loss(logits[:, : len(tokenizer)], other[:, : len(tokenizer)])
    # Label smoothing averages over all rows: 0.1 * 6 / 30,528 of their negative log-probability, about 30 nats.
    assert abs(value.item() - tokens.item()) < 1e-3
    value.backward()
    assert every.grad.isfinite().all()


@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
def test_a_label_in_an_unused_row_is_an_ordinary_label_and_changes_no_weight(padded, training):
    model, _ = padded
    model.train(training)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    ids = torch.tensor([[2, ROWS - 1, 6, 3]])
    logits = model(ids).logits
    assert logits.isfinite().all()
    expected = F.cross_entropy(logits[0, 1:2], ids[0, 1:2])
    loss = model(ids, labels=ids.masked_fill(ids != ROWS - 1, -100)).loss
    assert 25 < expected < 40
    numerics.assert_same(loss, expected, numerics.SAME[torch.float32])
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), name


def test_tokens_added_within_the_padded_vocabulary_train_with_peft_trainable_token_indices(tmp_path, padded):
    """PEFT computes the tied decoder without its bias, so the loss starts near log V, and merging would not do."""
    peft = pytest.importorskip("peft")
    model, tokenizer = padded
    model.resize_token_embeddings(len(tokenizer))
    new = tokenizer.convert_tokens_to_ids(NEW)
    config = peft.LoraConfig(
        r=4, target_modules=["Wqkv", "gated_layers", "wo"], trainable_token_indices={"word_embeddings": new}
    )
    adapted = peft.get_peft_model(model, config)
    losses = train(adapted, tokenizer)
    assert losses[0] < 5 and losses[-1] < 1, losses
    assert answers(adapted, tokenizer) == NEW
    adapted.save_pretrained(tmp_path / "adapter")
    base = AutoModelForMaskedLM.from_pretrained(tmp_path / "base", **REMOTE)
    base.resize_token_embeddings(len(tokenizer))
    assert answers(peft.PeftModel.from_pretrained(base, tmp_path / "adapter").eval(), tokenizer) == NEW
