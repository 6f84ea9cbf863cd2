"""Model folders that several test files start from."""

import json

import torch
from models import tiny_model
from safetensors.torch import load_file, save_file
from transformers import BertConfig
from transformers import BertForMaskedLM as StockBertForMaskedLM

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
WORDS = "the a cat dog bird sat ran flew on under over mat tree house and then it was big small red".split()


def set_fields(path, **fields):
    """Change fields of a JSON file."""
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def write_tokenizer(folder, words=WORDS):
    """A BERT tokenizer of `SPECIAL` and `words`; returns how many entries it has."""
    vocabulary = [*SPECIAL, *words]
    (folder / "vocab.txt").write_text("\n".join(vocabulary) + "\n", encoding="utf-8")
    special = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    content = {"tokenizer_class": "BertTokenizer", "do_lower_case": True, "mask_token": "[MASK]", **special}
    (folder / "tokenizer_config.json").write_text(json.dumps(content), encoding="utf-8")
    return len(vocabulary)


def change_weights(folder, **weights):
    """Add or replace weights of a model folder, by names with `__` for dots; None removes one."""
    path = folder / "model.safetensors"
    weights = {**load_file(path), **{name.replace("__", "."): tensor for name, tensor in weights.items()}}
    save_file({name: tensor for name, tensor in weights.items() if tensor is not None}, path, {"format": "pt"})


def add_classifier(folder):
    """Let the weights of a masked language model also hold those of a classifier of two classes."""
    size = json.loads((folder / "config.json").read_text())["hidden_size"]
    head = {"classifier__weight": torch.randn(2, size), "classifier__bias": torch.randn(2)}
    pooler = {"bert__pooler__dense__weight": torch.eye(size), "bert__pooler__dense__bias": torch.zeros(size)}
    change_weights(folder, **head, **pooler)


def write_complete_repository(folder, **fields):
    """A complete tiny MosaicBERT repository: weights, config, code, tokenizer, card. Returns the model."""
    folder.mkdir(parents=True, exist_ok=True)
    model = tiny_model(**{"vocab_size": write_tokenizer(folder), **fields})
    model.save_pretrained(folder)
    (folder / "README.md").write_text("---\nlicense: apache-2.0\n---\nA test.\n", encoding="utf-8")
    return model


def stock_bert(folder, **fields):
    """A tiny stock BERT with its MLM head, saved; returns it."""
    folder.mkdir()
    sizes = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 64}
    torch.manual_seed(0)
    config = BertConfig(vocab_size=write_tokenizer(folder), initializer_range=0.2, **{**sizes, **fields})
    model = StockBertForMaskedLM(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.2)
    model.save_pretrained(folder)
    return model
