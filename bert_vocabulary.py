"""Slots of a padded vocabulary without a token: never predicted, and made tokens when a tokenizer gains some."""

from typing import Optional

import torch
from torch import nn

from .bert_checks import is_traced

# Decoder bias of a vocabulary slot without a token: finite in every dtype, and no softmax leaves anything of it.
DEAD_SLOT_BIAS = -10_000.0


class PaddedVocabulary:
    """What a model with a decoder [V, E] and its bias [V] does about slots without a token; a mixin."""

    @torch.no_grad()
    def silence_dead_slots(self, num_tokens: int) -> None:
        """Make sure that vocabulary slots without a token are never predicted.

        The bias of a dead slot becomes -10,000: its probability is zero in every dtype, and so is its gradient. Dead
        slots below `num_tokens` become tokens.

        Args:
            num_tokens: entries of the tokenizer's vocabulary; slots from here to `vocab_size` are dead.

        Raises:
            ValueError: there are more tokens than slots.
        """
        bias = self.get_output_embeddings().bias
        if not 0 < num_tokens <= len(bias):
            raise ValueError(f"num_tokens must lie in [1, {len(bias)}], the model's vocabulary, got {num_tokens}")
        bias[num_tokens:] = DEAD_SLOT_BIAS
        bias[:num_tokens].masked_fill_(bias[:num_tokens] < DEAD_SLOT_BIAS / 2, 0.0)

    @torch.no_grad()
    def revive_slots(self, labels: torch.Tensor) -> None:
        """Make tokens of the dead slots that training labels name.

        A text holds them, so they were added to the tokenizer within the padded vocabulary, where nothing had to be
        resized. Nothing waits for the device.

        Args:
            labels: int64, -100 for none.
        """
        slots = labels.flatten().clamp(0, self.config.vocab_size - 1)  # labels outside are refused with the loss
        for name, bias in self.get_output_embeddings().named_parameters():  # an adapter may wrap the decoder
            if name.split(".")[-1] != "bias":
                continue
            held = bias.index_select(0, slots)
            # Dead biases are moved, not set: processes that see a token sooner or later agree on what training added.
            moved = torch.where(held < DEAD_SLOT_BIAS / 2, held - held.new_tensor(DEAD_SLOT_BIAS), held)
            bias.index_copy_(0, slots, moved)

    def check_slots(self, logits: torch.Tensor, labels: torch.Tensor) -> None:
        """Raise ValueError when a label names a dead slot; on the CPU only, as `check_ids`.

        Args:
            logits: floating [..., V].
            labels: int64 [...], -100 for none.
        """
        if labels.device.type != "cpu" or is_traced() or not labels.numel():
            return
        scores = logits.detach().gather(-1, labels.clamp(min=0)[..., None])[..., 0]
        dead = (scores < DEAD_SLOT_BIAS / 2) & (labels != -100)
        if dead.any():
            raise ValueError(
                f"labels must be tokens, got {labels[dead][0].item()}, a dead slot of the padded vocabulary; after "
                "adding tokens to a tokenizer, call model.resize_token_embeddings(len(tokenizer))"
            )

    def resize_token_embeddings(
        self, new_num_tokens: Optional[int] = None, pad_to_multiple_of: Optional[int] = None, *args, **kwargs
    ) -> nn.Embedding:
        """Change the vocabulary; slots that padding adds are dead, and dead slots that become tokens start as new ones.

        Args:
            new_num_tokens: entries of the tokenizer's vocabulary; None: as many as there are.
            pad_to_multiple_of: the vocabulary size becomes a multiple of this; None: no dead slots.
            *args, **kwargs: see transformers' method.

        Returns:
            The word embedding.
        """
        if new_num_tokens is None and pad_to_multiple_of is None:
            return super().resize_token_embeddings()
        # Half way to the dead bias: a low precision rounds it.
        num_tokens = int((self.get_output_embeddings().bias > DEAD_SLOT_BIAS / 2).nonzero().max()) + 1
        if num_tokens < self.config.vocab_size:  # transformers draws new rows from all old ones: dead ones go first
            super().resize_token_embeddings(num_tokens)
        num_tokens = num_tokens if new_num_tokens is None else new_num_tokens
        embeddings = super().resize_token_embeddings(num_tokens, pad_to_multiple_of, *args, **kwargs)
        self.silence_dead_slots(num_tokens)
        return embeddings
