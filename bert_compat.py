"""Loading, tying and saving across releases of transformers; each seam names the release that needs it."""

import inspect
import re

import torch
from transformers import AttentionInterface, PreTrainedModel


def asked_attention(config):
    """The attention implementation that was requested, or None; transformers keeps it under a private name."""
    return getattr(config, "_attn_implementation_internal", None)


def ask_attention(config, name: str) -> None:
    """Set the attention implementation of a config, past transformers' own check of the name."""
    config._attn_implementation_internal = name


def reserve_attention_names(*names: str) -> None:
    """Make transformers accept these attention implementations, which raise ValueError in any other architecture."""

    def refuse(*args, **kwargs):
        raise ValueError(f"attn_implementation must be one that this architecture has; {names} are MosaicBERT's")

    for name in names:
        AttentionInterface.register(name, refuse)


class CompatiblePreTrainedModel(PreTrainedModel):
    """A `PreTrainedModel` that loads, ties and saves alike on every supported release."""

    auto_map: dict  # what a saved config says about its code, whatever the model was loaded from

    def tie_weights(self, *args, **kwargs):
        """Let decoder and word embedding share the tensor that a file holds; it may hold both if they are equal."""
        decoder, embedding = self.get_output_embeddings(), self.get_input_embeddings()
        tied = decoder is not None and self.config.tie_word_embeddings
        # Before 5.0 an embedding whose weight is only in the file as the decoder's stays on the meta device.
        if tied and embedding.weight.is_meta and not decoder.weight.is_meta:
            embedding.weight = decoder.weight
        # 5.3 takes a decoder that is not in the file, and so still on the meta device, for one that is.
        if tied and decoder.weight.is_meta and not embedding.weight.is_meta and kwargs.get("missing_keys") is not None:
            kwargs["missing_keys"].update(self._tied_weights_keys)
        super().tie_weights(*args, **kwargs)
        # 5.0 leaves them apart when a file holds both keys, as every published file does. Where the two differ, the
        # decoder was trained apart (the published code lost the tie on loading), and its numbers are kept.
        if tied and not embedding.weight.is_meta and torch.equal(decoder.weight, embedding.weight):
            decoder.weight = embedding.weight

    def save_pretrained(self, save_directory, *args, **kwargs):
        """Save weights, config and code: a complete repository. Arguments are those of transformers' method."""
        self.config.auto_map = dict(self.auto_map)
        # 5.0 saves the LayerNorms of a loaded model as gamma and beta, which its Trainer skips when it resumes.
        if "save_original_format" in inspect.signature(PreTrainedModel.save_pretrained).parameters:
            kwargs.setdefault("save_original_format", False)
        # Sharded weights are gathered one by one, so a tied pair arrives as two equal tensors.
        weights = dict(kwargs.get("state_dict") or {})
        tied = self._tied_weights_keys if self.config.tie_word_embeddings else None
        for copy, kept in (tied or {}).items():
            if copy in weights and kept in weights and torch.equal(weights[copy], weights[kept]):
                del weights[copy]
                kwargs["state_dict"] = weights
        # FSDP gives a sharded model a class of torch's own, whose code would be saved instead of ours.
        kinds = type(self).__mro__
        if kinds[1].__name__ != "FSDPModule":
            return super().save_pretrained(save_directory, *args, **kwargs)
        self.__class__ = kinds[2]
        try:
            return super().save_pretrained(save_directory, *args, **kwargs)
        finally:
            self.__class__ = kinds[0]

    @classmethod
    def from_pretrained(cls, *args, output_loading_info: bool = False, **kwargs):
        """Load a checkpoint; arguments are those of transformers' method.

        Raises:
            ValueError: the checkpoint lacks weights of the embeddings or of the encoder (a head may be new).
        """
        model, info = super().from_pretrained(*args, output_loading_info=True, **kwargs)
        refuse_incomplete(info["missing_keys"], info["unexpected_keys"])
        return (model, info) if output_loading_info else model


def refuse_incomplete(missing, unexpected) -> None:
    """Raise ValueError when `missing` keys of a checkpoint belong to the embeddings or the encoder."""
    missing = sorted(key for key in missing if key.removeprefix("bert.").startswith(("embeddings.", "encoder.")))
    if not missing:
        return
    layers = sorted({int(number) for key in missing for number in re.findall(r"encoder\.layer\.(\d+)\.", key)})
    where = f", layers {', '.join(map(str, layers))} among them" if layers else ""
    message = (
        "the checkpoint is not a MosaicBERT, is incomplete, or num_hidden_layers is too large: "
        f"{len(missing)} tensors of the encoder are missing from the weights{where} ({shortened(missing)})"
    )
    unexpected = sorted(unexpected)
    raise ValueError(message + (f" and holds unknown ones ({shortened(unexpected)})" if unexpected else ""))


def shortened(names: list[str]) -> str:
    """The first eight of some names, separated by commas."""
    return ", ".join(names[:8]) + (", …" if len(names) > 8 else "")
