"""The shipped checkpoint reads longer texts than it was trained on: loss by length, backends against eager, and what
`alibi_starting_size` does not do."""

import gzip
import json

import pytest
import torch
from conftest import ROOT
from lib import evaluation
from numerics import SAME, assert_same
from transformers import AutoModelForMaskedLM, AutoTokenizer

CORPUS = ROOT.parent / "shared/corpus/validation"
LONG_TEXT = pytest.mark.skipif(not CORPUS.exists(), reason="the validation corpus lies beside the repository only")


@pytest.fixture(scope="module")
def shipped():
    model = AutoModelForMaskedLM.from_pretrained(ROOT, trust_remote_code=True).float().eval()
    return model, AutoTokenizer.from_pretrained(ROOT)


def long_documents(tokenizer, longest, tokens):
    texts = []
    for name in ("sotu", "eltec_eng", "gensim_wiki"):
        with gzip.open(CORPUS / f"{name}.jsonl.gz", "rt", encoding="utf-8") as lines:
            texts += [json.loads(line)["text"] for line in lines]
    return evaluation.sample_documents(texts, tokenizer, longest, True, tokens)


@LONG_TEXT
def test_loss_does_not_rise_with_length(shipped):
    model, tokenizer = shipped
    documents = long_documents(tokenizer, 1024, 8_000)
    losses = [evaluation.measure(model, tokenizer, documents, n, 8192)["loss"] for n in (128, 1024)]
    # The same wordpieces are masked at each length. Measured: 3.237 nats at 128, 3.168 at 1,024.
    assert losses[1] <= losses[0]


@pytest.mark.gpu
@LONG_TEXT
def test_loss_does_not_rise_up_to_8192_on_a_gpu(shipped):
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    model, tokenizer = shipped
    documents = long_documents(tokenizer, 8192, 65_536)
    lengths = (128, 512, 2048, 8192)
    try:
        losses = [evaluation.measure(model.cuda(), tokenizer, documents, n, 16_384)["loss"] for n in lengths]
    finally:
        model.cpu()
    assert max(losses[1:]) <= losses[0]


@pytest.mark.parametrize("length", [128, 512, 1024])
def test_sdpa_agrees_with_eager_at_each_length(shipped, length):
    model, tokenizer = shipped
    words = tokenizer((ROOT / "README.md").read_text(), add_special_tokens=False, verbose=False)["input_ids"]
    ids = torch.tensor([(words * 8)[:length]])
    outputs = []
    try:
        for name in ("eager", "sdpa"):
            model.set_attn_implementation(name)
            with torch.inference_mode():
                outputs.append(model.bert(ids).last_hidden_state)
    finally:
        model.set_attn_implementation("auto")
    assert_same(outputs[1], outputs[0], SAME[torch.float32])


def test_alibi_starting_size_changes_no_number(shipped):
    model, tokenizer = shipped
    ids = torch.arange(1000, 1200)[None]
    before = model.config.alibi_starting_size
    outputs = []
    try:
        for size in (8, 200, 4096):
            model.config.alibi_starting_size = size
            with torch.inference_mode():
                outputs.append(model.bert(ids).last_hidden_state)
    finally:
        model.config.alibi_starting_size = before
    assert torch.equal(outputs[0], outputs[1]) and torch.equal(outputs[0], outputs[2])
