"""benchmarks/compare_with_bert.py: both models read the same wordpieces and start alike; a stopped run goes on."""

import argparse
import csv
import itertools

import compare_with_bert
import numpy as np
import packing
import pytest
import torch
from models import tiny_model
from numerics import SAME, assert_same
from test_pretrain import corpus, tokenizer  # noqa: F401
from transformers import BertConfig, BertForMaskedLM, BertModel


def test_padded_and_packed_rows_are_the_same_batch():
    model = tiny_model(vocab_size=64)
    generator = np.random.default_rng(0)
    special = type("Tokenizer", (), {"all_special_ids": [2, 3], "mask_token_id": 4, "__len__": lambda self: 45})()
    parts = [np.array([2, *generator.integers(5, 45, length), 3]) for length in (3, 9, 30)]
    lengths = np.array([len(part) for part in parts])
    row = packing.Masking(special, 0.3)(np.concatenate(parts), lengths, generator)
    padded, packed = compare_with_bert.pad_row(row), compare_with_bert.flatten_row(row)
    assert padded["attention_mask"].sum(1).tolist() == [5, 11, 32]
    assert_same(model(**padded).loss, model(**packed).loss, SAME[torch.float32])


def test_the_twin_takes_first_layers_and_head(tmp_path):
    torch.manual_seed(0)
    mosaic = tiny_model(vocab_size=64)
    sizes = {"hidden_size": 48, "num_attention_heads": 12, "intermediate_size": 40, "vocab_size": 60}
    bert = BertModel(BertConfig(num_hidden_layers=3, max_position_embeddings=32, **sizes))
    bert.save_pretrained(tmp_path)
    twin = compare_with_bert.stock_twin(str(tmp_path), mosaic)
    assert twin.config.num_hidden_layers == 2 and twin.get_output_embeddings().weight.shape[0] == 64
    for name, value in twin.bert.encoder.state_dict().items():
        assert torch.equal(value, bert.encoder.state_dict()[name])
    assert torch.equal(twin.cls.predictions.transform.dense.weight, mosaic.cls.predictions.transform.dense.weight)
    assert torch.equal(twin.get_output_embeddings().bias, mosaic.get_output_embeddings().bias)
    torch.manual_seed(1)
    random_twin = compare_with_bert.stock_twin(str(tmp_path), mosaic, random_weights=True)
    other = twin.state_dict()
    assert {k: v.shape for k, v in random_twin.state_dict().items()} == {k: v.shape for k, v in other.items()}
    assert not any(torch.equal(v, other[k]) for k, v in random_twin.state_dict().items() if k.endswith("query.weight"))


def test_a_lean_baseline_has_the_same_loss_and_gradients():
    torch.manual_seed(0)
    config = BertConfig(hidden_size=48, num_attention_heads=4, intermediate_size=40, vocab_size=45, num_hidden_layers=2)
    model = BertForMaskedLM(config).eval()
    generator = np.random.default_rng(0)
    lengths = np.array([3, 4, 9, 20, 24, 26])
    ids = generator.integers(5, 45, lengths.sum())
    labels = np.where(generator.random(lengths.sum()) < 0.3, ids, packing.IGNORED)
    batch = compare_with_bert.pad_row({"input_ids": ids, "labels": labels, "lengths": lengths})
    results = []
    for loss_of in (compare_with_bert.batch_loss, compare_with_bert.lean_loss):
        model.zero_grad()
        loss = loss_of(model, batch)
        loss.backward()
        grads = [weight.grad.flatten() for weight in model.parameters() if weight.grad is not None]
        results.append((loss, torch.cat(grads)))  # at once, as those of the key biases are 0 but for rounding
    for full, lean in zip(*results):
        assert_same(lean, full, SAME[torch.float32])


def run(corpus, tokenizer, folder, **changes):  # noqa: F811
    """Train a tiny model with dropout for ten steps and return its log and its first weight."""
    sequences = packing.load_sequences([str(corpus)], tokenizer, [32], [1.0], seed=0)
    rows = packing.PackedRows(sequences, tokenizer, 256, 0.3, seed=0)
    loss_of = changes.pop("loss_of", compare_with_bert.batch_loss)
    asked = {"device": "cpu", "learning_rate": 1e-2, "steps": 10, "log_every": 5, "save_every": 0, "bf16": False}
    arguments = argparse.Namespace(**{**asked, "output_dir": folder, **changes})
    torch.manual_seed(0)
    model = tiny_model(vocab_size=64, hidden_dropout_prob=0.1)
    log = compare_with_bert.train("one", model, compare_with_bert.flatten_row, loss_of, rows, [rows[0]], 0, arguments)
    assert log[-1]["wordpieces"] == sum(len(rows[i]["input_ids"]) for i in range(10))
    return log, next(model.parameters())


def test_the_curve_of_a_training_falls_and_is_written(corpus, tokenizer, tmp_path):  # noqa: F811
    log, _ = run(corpus, tokenizer, tmp_path)
    assert [entry["step"] for entry in log] == [0, 5, 10]
    assert log[0]["train_loss"] == "" and log[2]["validation_loss"] < log[0]["validation_loss"]
    assert log[2]["seconds"] > 0
    compare_with_bert.write_curves(log, tmp_path)
    assert len(list(csv.DictReader((tmp_path / "curves.csv").open()))) == 3
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_a_stopped_training_goes_on_to_the_same_numbers(corpus, tokenizer, tmp_path):  # noqa: F811
    whole, weight = run(corpus, tokenizer, tmp_path)
    calls = itertools.count()

    def interrupted(model, batch):
        if next(calls) == 9:  # the first was the validation before training
            raise KeyboardInterrupt
        return compare_with_bert.batch_loss(model, batch)

    with pytest.raises(KeyboardInterrupt):
        run(corpus, tokenizer, tmp_path, save_every=3, loss_of=interrupted)
    resumed, again = run(corpus, tokenizer, tmp_path, save_every=3)
    assert torch.equal(again, weight)
    timeless = [[{**entry, "seconds": 0} for entry in log] for log in (whole, resumed)]
    assert timeless[0] == timeless[1]
    with pytest.raises(ValueError, match="output_dir holds a run of another command line"):
        run(corpus, tokenizer, tmp_path, save_every=3, learning_rate=2e-2)
