"""Refuse tokenizers that make texts much longer, as a tokenizer's file decides that and so the memory that it takes."""

import base64
import json
import math
import unicodedata

PARTS = ("normalizer", "pre_tokenizer", "post_processor")
# The largest factor by which the file of a tokenizer may let one of its parts lengthen a text. Published models stay
# below 13 (Llama 2: a space becomes a character of three bytes, and one is put before the text).
LARGEST_GROWTH = 16
# Steps that lengthen a text again each time that they occur in one part.
GROWING = ("ByteLevel", "Precompiled", "TemplateProcessing")
# Up to this many pieces of a template, texts and special tokens alike, are no growth.
USUAL_PIECES = 8
# Bytes that a table of characters may make of one character without growth, and at all. NFKC makes up to 33.
USUAL_BYTES, MOST_BYTES = 16, 64


def check_growth(fields: dict) -> None:
    """Raise ValueError if one of the `PARTS` of a tokenizer.json makes texts much longer than they are."""
    for name in PARTS:
        steps = list(_steps(fields.get(name)))
        growing = [step["type"] for step in steps if step["type"] in GROWING]
        if len(set(growing)) < len(growing) or math.prod(map(_growth, steps)) > LARGEST_GROWTH:
            raise ValueError(f"its {name} makes texts more than {LARGEST_GROWTH} times as long")


def check_backend(tokenizer) -> None:
    """Apply `check_growth` to a loaded tokenizer, whatever files it came from."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    for name in PARTS:
        part = getattr(backend, name, None)
        try:
            fields = {} if part is None else json.loads(part.__getstate__())
        except Exception:  # the library's own type, for a step written in Python, which no file can ask for
            continue
        check_growth({name: fields})


def _steps(part):
    """Yield the steps of a part, those of its sequences one by one."""
    if isinstance(part, list):
        for inner in part:
            yield from _steps(inner)
    elif isinstance(part, dict) and isinstance(part.get("type"), str):
        yield part
        for inner in part.values():
            yield from _steps(inner)


def _growth(step: dict) -> float:
    if step["type"] == "Replace":
        pattern = step.get("pattern")
        old = pattern.get("String") if isinstance(pattern, dict) else None
        size = _size(step.get("content"))
        return max(1.0, size / _size(old)) if old else 1.0 + size  # another pattern may match between any two bytes
    if step["type"] == "Prepend":
        return 1.0 + _size(step.get("prepend"))
    if step["type"] == "TemplateProcessing":
        pieces = [len(step[kind]) for kind in ("single", "pair") if isinstance(step.get(kind), list)]
        return max([1.0, *(count / USUAL_PIECES for count in pieces)])
    if step["type"] == "Precompiled":
        longest = max(map(len, _table(step.get("precompiled_charsmap")).split(b"\0")))
        return max(1.0, longest / USUAL_BYTES) if longest <= MOST_BYTES else math.inf
    return 1.0


def _table(text) -> bytes:
    """Return what a table makes of characters: texts with zeros between, stored after an index that states its size."""
    try:
        table = base64.b64decode(text)
    except (TypeError, ValueError):
        return b""  # the library refuses it
    return table[4 + int.from_bytes(table[:4], "little") :]


def _size(text) -> int:
    """Return the bytes of a text that is decomposed, as a later step may do."""
    return len(unicodedata.normalize("NFKD", text).encode("utf-8", "replace")) if isinstance(text, str) else 0
