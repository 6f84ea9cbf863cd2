"""Small models and batches that several test files use."""

import torch

from mosaicbert.bert_layers import BertForMaskedLM
from mosaicbert.configuration_bert import BertConfig

VOCAB = 101


def tiny_config(**fields):
    """A config of 2 layers, 12 heads of 4 channels; keyword arguments replace fields."""
    sizes = {"vocab_size": VOCAB, "hidden_size": 48, "num_hidden_layers": 2, "intermediate_size": 40}
    return BertConfig(**{**sizes, "initializer_range": 0.1, **fields})


def tiny_model(model_class=BertForMaskedLM, seed=0, **fields):
    """A randomly initialised model in eval mode; keyword arguments are config fields."""
    torch.manual_seed(seed)
    attention = {"attn_implementation": fields.pop("attn_implementation")} if "attn_implementation" in fields else {}
    model = model_class._from_config(tiny_config(**fields), **attention).eval()
    with torch.no_grad():  # biases and LayerNorms get nontrivial values, so that a swapped one is noticed
        for _, parameter in model.named_parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def ragged_batch(lengths, length=None, seed=0, vocab=VOCAB):
    """input_ids and attention_mask, int64 [B, S], rows filled from the left; padding holds random ids as well, so that
    reading it is noticed."""
    generator = torch.Generator().manual_seed(seed)
    length = length or max(lengths)
    ids = torch.randint(1, vocab, (len(lengths), length), generator=generator)
    mask = (torch.arange(length) < torch.tensor(lengths)[:, None]).long()
    return ids, mask


def holed_batch(seed=0, vocab=VOCAB):
    """input_ids and attention_mask with left padding, holes, an empty row, a single token, and a full row: [6, 24]."""
    ids, mask = ragged_batch([24, 24, 24, 0, 1, 17], seed=seed, vocab=vocab)
    mask[0, :9] = 0
    mask[1, 5:8] = 0
    mask[1, 13] = 0
    mask[4] = mask[4].roll(7)
    return ids, mask


def random_labels(ids, share=0.5, seed=5):
    """Labels for about a share of the positions of `ids`, -100 elsewhere; padding has some as well."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, VOCAB, ids.shape, generator=generator)
    labels[torch.rand(ids.shape, generator=generator) > share] = -100
    return labels


def packed_call(lengths=(5, 1, 8), boundaries=False):
    """One row of concatenated texts, by position ids or by boundaries, and the padded batch of the same texts."""
    ids, mask = ragged_batch(list(lengths))
    flat = ids[mask.bool()][None]
    if boundaries:
        bounds = torch.tensor([0, *lengths]).cumsum(0).int()
        return {"input_ids": flat, "cu_seq_lens_q": bounds, "max_length_q": max(lengths)}, (ids, mask)
    return {"input_ids": flat, "position_ids": torch.cat([torch.arange(n) for n in lengths])[None]}, (ids, mask)
