"""sentence-transformers loads a repository, averages over real tokens, and cuts no text."""

import numerics
import numpy
import pytest
import torch
from folders import write_complete_repository
from transformers import AutoModel, AutoTokenizer

SAME = numerics.SAME[torch.float32]
SENTENCES = ["the cat sat on the mat", "a dog ran", "it was a big red house under a small tree and then the bird flew"]


@pytest.fixture(scope="module")
def repository(tmp_path_factory):
    folder = tmp_path_factory.mktemp("repository")
    write_complete_repository(folder)
    return str(folder)


def test_sentence_transformers_loads_the_repository_and_pools_the_same(repository, tmp_path):
    sentence_transformers = pytest.importorskip("sentence_transformers")
    model = sentence_transformers.SentenceTransformer(repository, trust_remote_code=True, device="cpu")
    assert "Wqkv" in str(model[0].auto_model), "stock BERT was loaded"
    vectors = model.encode(SENTENCES, convert_to_tensor=True)
    batch = AutoTokenizer.from_pretrained(repository)(SENTENCES, padding=True, return_tensors="pt")
    encoder = AutoModel.from_pretrained(repository, trust_remote_code=True).eval()
    # Hidden states are zero at padding, so the sum is that of the real tokens.
    means = encoder(**batch).last_hidden_state.sum(dim=1) / batch["attention_mask"].sum(dim=1, keepdim=True)
    numerics.assert_same(vectors, means, SAME)
    single = torch.from_numpy(numpy.stack([model.encode(sentence) for sentence in SENTENCES]))
    numerics.assert_same(vectors, single, SAME)

    model.save(str(tmp_path / "saved"))
    again = sentence_transformers.SentenceTransformer(str(tmp_path / "saved"), trust_remote_code=True, device="cpu")
    assert "Wqkv" in str(again[0].auto_model), "stock BERT was loaded"
    numerics.assert_same(again.encode(SENTENCES, convert_to_tensor=True), vectors, 0.0)


def test_sentence_transformers_takes_the_same_features_twice(repository):
    """It writes its results beside its arguments, and from release 6 on passes both to the model."""
    sentence_transformers = pytest.importorskip("sentence_transformers")
    model = sentence_transformers.SentenceTransformer(repository, trust_remote_code=True, device="cpu").eval()
    features = (getattr(model, "preprocess", None) or model.tokenize)(SENTENCES)
    first = model(features)["sentence_embedding"]
    numerics.assert_same(model(features)["sentence_embedding"], first, 0.0)


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
