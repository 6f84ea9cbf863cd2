"""A small vocabulary and text made of it, for tests of training."""

import json

import numpy as np
from folders import write_tokenizer
from transformers import AutoTokenizer

WORDS = [first + second for first in "bcdfghjk" for second in "aeiou"]


def make_tokenizer(folder):
    """A BERT tokenizer of `WORDS`, 45 entries, that is also in `folder`."""
    write_tokenizer(folder, WORDS)
    return AutoTokenizer.from_pretrained(folder)


def write_corpus(path, documents=60):
    """Documents of 5 to 300 words as JSON lines; returns `path`."""
    generator = np.random.default_rng(0)
    texts = [" ".join(generator.choice(WORDS, generator.integers(5, 300))) for _ in range(documents)]
    path.write_text("\n".join(json.dumps({"id": i, "text": text}) for i, text in enumerate(texts)))
    return path
