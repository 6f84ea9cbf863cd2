"""Find references in a model repository's JSON files that make a loader run code or read files from elsewhere.

With `trust_remote_code=True`, transformers runs any code that a repository's files name, even in another repository. A
converted or pushed repository names only its own code.
"""

import re
from collections.abc import Collection, Iterator

# Fields that name a file may lead out of the repository too: `vocab_file`, `fast_tokenizer_files`, …
FILE_FIELD = re.compile(r".*_files?")
# Fields that choose an implementation: a plain word names one of transformers or of this code, `owner/name` is fetched.
IMPLEMENTATION_FIELDS = ("attn_implementation", "experts_implementation")
CODE_FIELDS = (
    "auto_map",
    "auto_mapping",
    "compression_config",
    "custom_generate",
    "custom_pipelines",
    "kernel_config",
    "quantization_config",
    "transformers_weights",
    "use_kernels",
)
# `owner/name--module.Class`, as transformers names a class of another repository or folder.
FOREIGN_CLASS = re.compile(r"\S--\w+\.\w+")


def foreign_references(content, own_modules: Collection[str] = (), path: str = "") -> Iterator[str]:
    """Find references that lead out of a repository.

    Args:
        content: of a JSON file, or a part of it.
        own_modules: the repository's own Python modules, which `auto_map` may name.
        path: of `content` in the file.

    Yields:
        Path and value of each reference.
    """
    if isinstance(content, dict):
        for name, value in content.items():
            inner = f"{path}.{name}" if path else str(name)
            if name == "auto_map":
                yield from _foreign_classes(value, own_modules, inner)
            elif value is not None and _is_code(name, value):
                yield f"{inner}: {value!r}"
            else:
                yield from foreign_references(value, own_modules, inner)
    elif isinstance(content, list):
        for number, value in enumerate(content):
            yield from foreign_references(value, own_modules, f"{path}[{number}]")
    elif _is_foreign(content):
        yield f"{path}: {content!r}"


def without_references(content):
    """Copy the content of a JSON file, or what a loader made of it, without the fields that name code or files."""
    if isinstance(content, dict):
        kept = {name: value for name, value in content.items() if not _is_code(str(name), value)}
        return {name: without_references(value) for name, value in kept.items() if not _is_foreign(value)}
    if isinstance(content, list):
        return [without_references(value) for value in content if not _is_foreign(value)]
    return content


def _is_foreign(value) -> bool:
    return isinstance(value, str) and FOREIGN_CLASS.search(value) is not None


def _is_code(name: str, value) -> bool:
    if name.strip("_").removesuffix("_internal") in IMPLEMENTATION_FIELDS:
        return not (isinstance(value, str) and value.isidentifier())
    return name in CODE_FIELDS or FILE_FIELD.fullmatch(name) is not None


def _foreign_classes(value, own_modules: Collection[str], path: str) -> Iterator[str]:
    """Find foreign references in the value of `auto_map`: a class, or a list or dict of classes and nulls."""
    if isinstance(value, dict):
        for name, inner in value.items():
            yield from _foreign_classes(inner, own_modules, f"{path}.{name}")
    elif isinstance(value, list):
        for inner in value:
            yield from _foreign_classes(inner, own_modules, path)
    elif value is not None:
        module, dot, _ = value.partition(".") if isinstance(value, str) else ("", "", "")
        if not dot or module not in own_modules:
            yield f"{path}: {value!r}"
