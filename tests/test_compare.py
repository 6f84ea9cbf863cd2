"""scripts/compare_with_bert.py: both models read the same wordpieces and start alike; curves are written."""

import csv

import compare_with_bert
import numpy as np
import pretrain_mlm
import torch
from models import tiny_model
from numerics import SAME, assert_same
from test_pretrain import corpus, tokenizer  # noqa: F401
from transformers import BertConfig, BertModel


def test_padded_and_packed_rows_are_the_same_batch():
    model = tiny_model(vocab_size=64)
    generator = np.random.default_rng(0)
    special = type("Tokenizer", (), {"all_special_ids": [2, 3], "mask_token_id": 4, "__len__": lambda self: 45})()
    parts = [np.array([2, *generator.integers(5, 45, length), 3]) for length in (3, 9, 30)]
    row = pretrain_mlm.mask_row(parts, special, 0.3, generator)
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


def test_the_curve_of_a_training_falls_and_is_written(corpus, tokenizer, tmp_path):  # noqa: F811
    sequences = pretrain_mlm.load_sequences(pretrain_mlm.load_texts([str(corpus)]), tokenizer, [32], [1.0], seed=0)
    rows = pretrain_mlm.PackedRows(sequences, tokenizer, 256, 0.3, seed=0)
    arguments = type("Arguments", (), {"device": "cpu", "learning_rate": 1e-2, "steps": 10, "log_every": 5})()
    model = tiny_model(vocab_size=64)
    log = compare_with_bert.train("one", model, compare_with_bert.flatten_row, rows, [rows[0]], 0, arguments)
    assert [entry["step"] for entry in log] == [0, 5, 10]
    assert log[0]["train_loss"] == "" and log[2]["validation_loss"] < log[0]["validation_loss"]
    assert log[2]["wordpieces"] == sum(len(rows[i]["input_ids"]) for i in range(10)) and log[2]["seconds"] > 0
    compare_with_bert.write_curves(log, tmp_path)
    assert len(list(csv.DictReader((tmp_path / "curves.csv").open()))) == 3
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
