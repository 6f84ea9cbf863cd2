"""Model folders that several test files start from."""

import json

from models import tiny_model

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
WORDS = "the a cat dog bird sat ran flew on under over mat tree house and then it was big small red".split()


def write_tokenizer(folder, words=WORDS):
    """A BERT tokenizer of `SPECIAL` and `words`; returns how many entries it has."""
    vocabulary = [*SPECIAL, *words]
    (folder / "vocab.txt").write_text("\n".join(vocabulary) + "\n", encoding="utf-8")
    special = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    content = {"tokenizer_class": "BertTokenizer", "do_lower_case": True, "mask_token": "[MASK]", **special}
    (folder / "tokenizer_config.json").write_text(json.dumps(content), encoding="utf-8")
    return len(vocabulary)


def write_complete_repository(folder, **fields):
    """A complete tiny MosaicBERT repository: weights, config, code, tokenizer, card. Returns the model."""
    folder.mkdir(parents=True, exist_ok=True)
    model = tiny_model(**{"vocab_size": write_tokenizer(folder), **fields})
    model.save_pretrained(folder)
    (folder / "README.md").write_text("---\nlicense: apache-2.0\n---\nA test.\n", encoding="utf-8")
    return model
