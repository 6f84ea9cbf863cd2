"""A tokenizer whose rules make texts much longer, which may exhaust the memory, is refused."""

import base64

import pytest
from lib import common, growth
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors


def sequence(*steps):
    return {"type": "Sequence", "normalizers": list(steps)}


def replace(old, new, kind="String"):
    return {"type": "Replace", "pattern": {kind: old}, "content": new}


def table(text):
    return {"type": "Precompiled", "precompiled_charsmap": base64.b64encode(b"\4\0\0\0" + b"tree" + text).decode()}


def template(single, pair):
    return {"type": "TemplateProcessing", "single": single, "pair": pair}


PUBLISHED = {
    "nothing": {},
    "BERT": {"normalizer": {"type": "BertNormalizer"}, "post_processor": template([{}] * 3, [{}] * 5)},
    "CLIP": {"normalizer": sequence({"type": "NFC"}, replace(r"\s+", " ", "Regex"), {"type": "Lowercase"})},
    "Llama 2": {"normalizer": sequence({"type": "Prepend", "prepend": "▁"}, replace(" ", "▁"))},
    "RoBERTa": {"pre_tokenizer": {"type": "ByteLevel"}, "post_processor": {"type": "RobertaProcessing"}},
    "XLM-R": {"normalizer": sequence(table(b"a\0" + b"x" * 33), replace(" {2,}", "▁", "Regex"))},
    "damaged": {"normalizer": {"type": "Precompiled", "precompiled_charsmap": 3}, "pre_tokenizer": [3, {"type": 3}]},
}
GROWING = {
    "multiplying": ("normalizer", sequence(*[replace("a", "aa")] * 5)),
    "nested": ("normalizer", sequence(sequence(replace("a", "b" * 5)), sequence(replace("b", "c" * 5)))),
    "long": ("normalizer", replace("a", "a" * 17)),
    "of bytes": ("normalizer", replace("a", "\u2581" * 6)),
    "decomposed": ("normalizer", replace(" ", "\ufdfa")),
    "anywhere": ("normalizer", replace("", "a" * 16, "Regex")),
    "prepended": ("normalizer", {"type": "Prepend", "prepend": "a" * 16}),
    "table": ("normalizer", table(b"a\0" + b"x" * 65)),
    "tables": ("normalizer", sequence(table(b"aa"), table(b"aa"))),
    "bytes of bytes": ("pre_tokenizer", {"type": "Sequence", "pretokenizers": [{"type": "ByteLevel"}] * 2}),
    "template": ("post_processor", template([], [{}] * 129)),
}


@pytest.mark.parametrize("fields", PUBLISHED.values(), ids=PUBLISHED)
def test_published_tokenizers_pass(fields):
    growth.check_growth(fields)


@pytest.mark.parametrize(("name", "part"), GROWING.values(), ids=GROWING)
def test_a_part_that_makes_texts_much_longer_is_named(name, part):
    with pytest.raises(ValueError, match=f"^its {name} makes texts more than 16 times as long$"):
        growth.check_growth({name: part})


def test_a_loaded_tokenizer_is_judged_by_what_it_does():
    class Loaded:
        backend_tokenizer = Tokenizer(models.WordLevel({"a": 0}, "a"))

    for name, part in (
        ("normalizer", normalizers.Sequence([normalizers.Replace("a", "aa")] * 5)),
        ("pre_tokenizer", pre_tokenizers.Sequence([pre_tokenizers.ByteLevel()] * 2)),
        ("post_processor", processors.TemplateProcessing(["$A"] * 200)),
    ):
        growth.check_backend(Loaded)
        setattr(Loaded.backend_tokenizer, name, part)
        with pytest.raises(ValueError, match=f"^its {name} makes texts"):
            growth.check_backend(Loaded)
        Loaded.backend_tokenizer = Tokenizer(models.WordLevel({"a": 0}, "a"))
    growth.check_backend(object())  # a tokenizer in Python
    Loaded.backend_tokenizer.pre_tokenizer = pre_tokenizers.PreTokenizer.custom(object())  # as RoFormer's
    growth.check_backend(Loaded)
    assert common.check_backend is growth.check_backend
