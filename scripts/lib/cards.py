"""The card (README.md) of a model that a script makes."""

import re
import string
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Optional

from .cli import LICENSE_NAME
from .common import LARGEST_CARD, file_inside, read_json

if TYPE_CHECKING:
    from huggingface_hub import EvalResult

# Code that loads and uses a model, for the tasks with a pipeline and for the others.
PIPELINE = """from transformers import pipeline

model = pipeline("{task}", model="REPOSITORY", trust_remote_code=True{options})
assert "Wqkv" in str(model.model), "this is stock BERT: trust_remote_code=True is missing"
print({call})"""
LOADED = """from transformers import {auto}, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("REPOSITORY")
model = {auto}.from_pretrained("REPOSITORY", trust_remote_code=True)
assert "Wqkv" in str(model), "this is stock BERT: trust_remote_code=True is missing\""""
EMBEDDINGS = """
For sentence embeddings take the mean of `last_hidden_state` over real tokens, or let sentence-transformers do it:
`SentenceTransformer("REPOSITORY", trust_remote_code=True)`.
"""
# The Hub's task for models whose class has a name with this ending.
TASKS = {
    "ForMaskedLM": "fill-mask",
    "ForSequenceClassification": "text-classification",
    "ForTokenClassification": "token-classification",
    "ForQuestionAnswering": "question-answering",
    "ForMultipleChoice": "multiple-choice",
}
HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")


def hub_task(config: dict) -> str:
    """Return the Hub's task for a model, from the fields of its config.json."""
    names = config.get("architectures")
    name = names[0] if isinstance(names, list) and names else ""
    return next((task for end, task in TASKS.items() if str(name).endswith(end)), "feature-extraction")


def usage(config: dict, pairs: bool = False) -> str:
    """Write the Python code that predicts with a model, in which REPOSITORY stands for the model's id.

    Args:
        config: fields of its config.json.
        pairs: whether it reads pairs of texts.
    """
    task, options = hub_task(config), ""
    if task == "fill-mask":
        return PIPELINE.format(task=task, options="", call='model(f"One word is a {model.tokenizer.mask_token}.")')
    if task == "token-classification":
        return PIPELINE.format(task=task, options=', aggregation_strategy="simple"', call='model("A text.")')
    if task == "text-classification":
        texts = '[{"text": "A text.", "text_pair": "Its pair."}]' if pairs else '["A text.", "Another text."]'
        if config.get("problem_type") == "regression":
            options = ', function_to_apply="none"'
        elif config.get("problem_type") == "multi_label_classification":
            options = ", top_k=None"
        return PIPELINE.format(task=task, options=options, call=f"model({texts})")
    head = next((end for end, named in TASKS.items() if named == task), "")
    return LOADED.format(auto=f"AutoModel{head}")


def labels_of(config: dict) -> list[str]:
    """List the labels that a config names; none if they are only numbered."""
    labels = config.get("id2label")
    names = [str(name) for name in labels.values()] if isinstance(labels, dict) else []
    return [] if all(re.fullmatch(r"LABEL_\d+", name) for name in names) else names


def in_markdown(text: str) -> str:
    """Put a text on one line, with an escape before each character that means something in Markdown."""
    return re.sub(r"([\\`*_{}\[\]<>()#!|~])", r"\\\1", " ".join(text.split()))


def write_card(
    target: Path,
    made: str,
    source: Optional[str] = None,
    folder: Optional[Path] = None,
    revision: Optional[str] = None,
    license: Optional[str] = None,
    title: Optional[str] = None,
    notes: str = "",
    template: str = "card_template.md",
    metadata: Optional[dict] = None,
    pairs: bool = False,
    results: Sequence["EvalResult"] = (),
    **fields: str,
) -> None:
    """Write the README.md of a model.

    Args:
        target: the new model's folder; its config.json tells its task.
        made: how it was made, in Markdown.
        source: Hub id, folder or file of the original model; only the name of a local path is shown. None: the model
            was trained from random weights.
        folder: may hold the source's own README.md.
        revision: commit of the source, None if unknown.
        license: identifier such as `apache-2.0`; None: the one in the source's card, or `unknown`.
        title: None: the name of the source.
        notes: Markdown for the end.
        template: name of the template beside this file.
        metadata: for the card's head, in addition to that of every model here or instead of it.
        pairs: whether it reads pairs of texts.
        results: scores, for the card's head.
        **fields: other fields of the template.
    """
    import yaml
    from huggingface_hub.repocard_data import eval_results_to_model_index

    is_hub_id = source is not None and not Path(source).exists()
    name = "random weights" if source is None else source if is_hub_id else Path(source).resolve().name
    name = re.sub(r"[^\w .+/-]", "_", name)  # foreign names must stay plain text in Markdown and YAML
    stated = stated_metadata(folder) if folder is not None else {}
    license = license or stated.get("license") or "unknown"
    config = read_json(target / "config.json") if (target / "config.json").is_file() else {}
    title = title or ("MosaicBERT" if source is None else f"{name.split('/')[-1]} as MosaicBERT")
    common = {"library_name": "transformers", "pipeline_tag": hub_task(config), "tags": ["mosaicbert", "custom_code"]}
    metadata = {**common, **(metadata or {})}
    base = name if is_hub_id else stated.get("base_model")
    metadata |= {"base_model": base} if base else {}
    metadata |= {"license": license} if license != "unknown" else {}
    if results:
        metadata["model-index"] = eval_results_to_model_index(title, list(results))
    if source is None:
        origin = "none: trained from random weights"
    else:
        origin = f"[{name}](https://huggingface.co/{name})" if is_hub_id else f"`{name}`, a local file or folder"
    more = EMBEDDINGS if hub_task(config) in ("fill-mask", "feature-extraction") else ""
    labels = labels_of(config)
    if labels:
        more += f"\nIts labels are {', '.join(map(in_markdown, labels))}.\n"
    text = string.Template(Path(__file__).with_name(template).read_text(encoding="utf-8")).substitute(
        fields,
        metadata=yaml.safe_dump(metadata, sort_keys=True).strip(),
        title=title,
        source=origin,
        revision=f"`{revision}`" if revision else "unknown",
        license=license,
        made=made,
        usage=usage(config, pairs),
        more=more,
        notes=f"\n{notes.strip()}\n" if notes else "",
    )
    (target / "README.md").write_text(text.rstrip() + "\n", encoding="utf-8")


def stated_metadata(folder: Path) -> dict[str, str]:
    """Read `license` and `base_model` from the card in a folder, without values that are not identifiers."""
    import yaml
    from huggingface_hub import metadata_load

    card = folder / "README.md"
    if not card.is_file() or card.stat().st_size > LARGEST_CARD:
        return {}
    try:
        stated = metadata_load(file_inside(folder, "README.md"))
    except (ValueError, yaml.YAMLError, RecursionError):
        return {}
    kinds = {"license": LICENSE_NAME, "base_model": HUB_ID}
    found = {name: stated.get(name) for name in kinds} if isinstance(stated, dict) else {}
    return {name: value for name, value in found.items() if isinstance(value, str) and kinds[name].fullmatch(value)}
