"""The card (README.md) of a model that a script makes."""

import re
import string
from pathlib import Path
from typing import Optional

from .common import LARGEST_CARD, LICENSE_NAME, file_inside


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
    **fields: str,
) -> None:
    """Write the README.md of a model.

    Args:
        target: the new model's folder.
        made: how it was made, one sentence of Markdown.
        source: Hub id, folder or file of the model that it was made from; of a local path only the name is told. None:
            it was trained from random weights.
        folder: where the source's own README.md may lie.
        revision: commit of the source, None when unknown.
        license: identifier such as `apache-2.0`; None: what the source's card says, or `unknown`.
        title: None: the name of the source.
        notes: Markdown to end with.
        template: name of the template beside this file.
        metadata: what the Hub reads, beside or instead of what is said of every model here.
        **fields: what else the template asks for.

    Raises:
        ValueError: `license` is no identifier.
    """
    import yaml

    if license is not None and not LICENSE_NAME.fullmatch(license):
        raise ValueError(f"license: expected an identifier such as apache-2.0, got {license!r}")
    is_hub_id = source is not None and not Path(source).exists()
    name = "random weights" if source is None else source if is_hub_id else Path(source).resolve().name
    name = re.sub(r"[^\w .+/-]", "_", name)  # foreign names must stay plain text in Markdown and YAML
    stated = stated_license(folder) if folder is not None and license is None else None
    license = license or stated or "unknown"
    metadata = {"library_name": "transformers", "tags": ["mosaicbert"], **(metadata or {})}
    if is_hub_id:
        metadata["base_model"] = name
    if license != "unknown":
        metadata["license"] = license
    if source is None:
        origin = "none: trained from random weights"
    else:
        origin = f"[{name}](https://huggingface.co/{name})" if is_hub_id else f"`{name}`, a local file or folder"
    text = string.Template(Path(__file__).with_name(template).read_text(encoding="utf-8")).substitute(
        fields,
        metadata=yaml.safe_dump(metadata, sort_keys=True).strip(),
        title=title or ("MosaicBERT" if source is None else f"{name.split('/')[-1]} as MosaicBERT"),
        source=origin,
        revision=f"`{revision}`" if revision else "unknown",
        license=license,
        made=made,
        notes=f"\n{notes.strip()}\n" if notes else "",
    )
    (target / "README.md").write_text(text.rstrip() + "\n", encoding="utf-8")


def stated_license(folder: Path) -> Optional[str]:
    """The licence that the card in a folder states, or None where there is no identifier."""
    import yaml
    from huggingface_hub import metadata_load

    card = folder / "README.md"
    if not card.is_file() or card.stat().st_size > LARGEST_CARD:
        return None
    try:
        stated = metadata_load(file_inside(folder, "README.md"))
    except (ValueError, yaml.YAMLError, RecursionError):
        return None
    license = stated.get("license") if isinstance(stated, dict) else None
    return license if isinstance(license, str) and LICENSE_NAME.fullmatch(license) else None
