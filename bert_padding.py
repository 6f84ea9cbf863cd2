"""Packing: validate a call's inputs, describe the batch, pack and unpack.

Letters: B batch, S padded length, T real tokens, N sequences, R row length, E hidden size.
"""

from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Optional

import torch

from .bert_checks import as_integers, assert_on_device, check_boundaries, check_shape, check_tensor, is_traced, refuse


@dataclass(frozen=True)
class PackedBatch:
    """Which positions of the caller's [B, S] layout the T packed tokens have, and which of them form one sequence.

    Built once per forward by `pack_batch` and passed down whole. Usually padding is dropped, and tokens are [T, ...].
    Where shapes must not depend on data, or padding is kept on request, tokens stay [B, S, ...] and T = B * S.

    Attributes:
        shape: (B, S) of the caller's layout. Sequences are its rows, or parts of its rows for flattened input.
        indices: int64 [T], the position of each token in the flattened layout (row * S + column). None: every position
            holds a token, T = B * S.
        cu_seqlens: int32 [N + 1], where each sequence starts in the T tokens; the last entry is T.
        positions: int64 [T], increasing within a sequence. ALiBi distances are differences of these.
        row_length: R, exclusive upper bound of `positions`.
        max_seqlen: tokens of the longest sequence, or an upper bound where only the device knows.
        has_holes: whether some sequence skips columns between its first and its last token. When False, differences
            of `positions` inside a sequence equal differences of token indices.
        keeps_padding: whether tokens stay [B, S, ...].
        key_mask: bool [B, S], True at real tokens, where padding is kept. None: all T tokens are real.
        documents: int64 [B, S], the number of the sequence that a position belongs to, where padding is kept and a row
            holds several sequences. None: sequences are rows.
        restarts: bool scalar, whether `position_ids` restart within a row, where only the device knows; `cu_seqlens`
            then describes rows only. None: it describes every sequence.
        known_lengths: tokens of each sequence, where the host knows them already; read `lengths`.
    """

    shape: tuple[int, int]
    indices: Optional[torch.Tensor]
    cu_seqlens: torch.Tensor
    positions: torch.Tensor
    row_length: int
    max_seqlen: int
    has_holes: bool = False
    keeps_padding: bool = False
    key_mask: Optional[torch.Tensor] = None
    documents: Optional[torch.Tensor] = None
    restarts: Optional[torch.Tensor] = None
    known_lengths: Optional[tuple[int, ...]] = None

    def to(self, device, non_blocking: bool = False) -> "PackedBatch":
        """The batch on another device; accelerate's hooks call this between layers on different devices."""
        tensors = {f.name: getattr(self, f.name) for f in fields(self)}
        moved = {name: x.to(device, non_blocking=non_blocking) for name, x in tensors.items() if torch.is_tensor(x)}
        return replace(self, **moved)

    @property
    def num_sequences(self) -> int:
        """N, the number of sequences, empty ones included."""
        return self.cu_seqlens.shape[0] - 1

    @property
    def lengths(self) -> list[int]:
        """Tokens of each sequence, N Python integers; copied from the device where the host does not know them."""
        return self.cu_seqlens.diff().tolist() if self.known_lengths is None else list(self.known_lengths)

    @cached_property
    def reversal(self) -> torch.Tensor:
        """int64 [T]: the index of each token once the tokens of each sequence are in reverse order."""
        starts, ends = self.cu_seqlens[:-1].long(), self.cu_seqlens[1:].long()
        total = self.positions.shape[0]
        first_plus_last = (starts + ends - 1).repeat_interleave(ends - starts, output_size=total)
        return first_plus_last - torch.arange(total, device=first_plus_last.device)

    def pack(self, padded: torch.Tensor) -> torch.Tensor:
        """Take the tokens out of the caller's layout: any dtype, [B, S, ...] to [T, ...].

        Where padding is kept, this is `padded` itself.
        """
        if self.keeps_padding:
            return padded
        flat = padded.flatten(0, 1)
        return flat if self.indices is None else flat.index_select(0, self.indices)

    def unpack(self, packed: torch.Tensor) -> torch.Tensor:
        """Put tokens, any dtype [T, ...], back into the caller's layout, [B, S, ...], which is zero elsewhere."""
        if self.keeps_padding:
            if self.key_mask is None:
                return packed
            return packed.masked_fill(~self.key_mask.view(*self.shape, *[1] * (packed.dim() - 2)), 0)
        if self.indices is not None:
            padded = packed.new_zeros(self.shape[0] * self.shape[1], *packed.shape[1:])
            packed = padded.index_copy(0, self.indices, packed)
        # Not unflatten, whose result torch's older ONNX exporter takes for one of a fixed shape.
        return packed.reshape(*self.shape, *packed.shape[1:])

    def first_tokens(self, packed: torch.Tensor) -> torch.Tensor:
        """The first token of each sequence.

        Args:
            packed: floating [T, E], or [B, S, E] where padding is kept.

        Returns:
            [N, E] in the same dtype; zero where a sequence is empty.
        """
        self._check_sequences()
        if self.key_mask is not None:
            if not packed.shape[1]:
                return packed.sum(1)  # zeros: there is no position to take
            first = self.key_mask.long().argmax(dim=1)
            taken = packed[torch.arange(self.shape[0], device=first.device), first]
            return taken.masked_fill(~self.key_mask.any(dim=1)[:, None], 0)
        packed = packed.flatten(0, -2)
        padded = torch.cat((packed, packed.new_zeros(1, packed.shape[-1])))  # the last sequences may be empty
        taken = padded.index_select(0, self.cu_seqlens[:-1].long())
        return taken.masked_fill((self.cu_seqlens.diff() == 0)[:, None], 0)

    def mean_tokens(self, packed: torch.Tensor) -> torch.Tensor:
        """The mean over the tokens of each sequence.

        Args:
            packed: floating [T, E], or [B, S, E] where padding is kept.

        Returns:
            [N, E] in the same dtype, summed in float32 or better; zero where a sequence is empty.
        """
        self._check_sequences()
        precise = packed.to(torch.promote_types(packed.dtype, torch.float32))
        if self.key_mask is not None:
            sums, counts = self.unpack(precise).sum(dim=1), self.key_mask.sum(dim=1)
        else:
            sums = precise.new_zeros(self.num_sequences, precise.shape[-1])
            sums = sums.index_add(0, self.sequence_numbers, precise.flatten(0, -2))
            counts = self.cu_seqlens.diff()
        return (sums / counts.clamp(min=1)[:, None]).to(packed.dtype)

    def _check_sequences(self) -> None:
        """Fail, on the device if necessary, when `cu_seqlens` does not describe every sequence."""
        if self.restarts is not None:
            message = "compiled code needs cu_seq_lens_q to pool texts that only position_ids separate"
            assert_on_device(~self.restarts, message)

    @property
    def sequence_numbers(self) -> torch.Tensor:
        """int64 [T]: the number of the sequence that each token belongs to, from 0."""
        lengths = self.cu_seqlens.diff().long()
        numbers = torch.arange(self.num_sequences, device=lengths.device)
        return numbers.repeat_interleave(lengths, output_size=self.positions.shape[0])

    @property
    def rows(self) -> tuple[int, int]:
        """Number and length of the rows of `to_rows`: (N, R), or (B, S) where padding is kept."""
        return self.shape if self.keeps_padding else (self.num_sequences, self.row_length)

    @property
    def row_indices(self) -> torch.Tensor:
        """int64 [T]: the flat index of each token in an [N, R] layout."""
        return self.sequence_numbers * self.row_length + self.positions

    @property
    def has_full_rows(self) -> bool:
        """Whether every position of `to_rows` holds a token of the flattened T, padding included where it is kept."""
        return self.keeps_padding or self.num_sequences * self.row_length == self.positions.shape[0]

    def to_rows(self, packed: torch.Tensor) -> torch.Tensor:
        """One zero-padded row per sequence, for a backend that needs rows: any dtype, [T, ...] to [*rows, ...]."""
        if self.has_full_rows:
            return packed.reshape(*self.rows, *packed.shape[1:])
        rows = packed.new_zeros(self.num_sequences * self.row_length, *packed.shape[1:])
        return rows.index_copy(0, self.row_indices, packed).reshape(*self.rows, *packed.shape[1:])

    def from_rows(self, rows: torch.Tensor) -> torch.Tensor:
        """The inverse of `to_rows`: [*rows, ...] to [T, ...]."""
        flat = rows.flatten(0, 1)
        return flat if self.has_full_rows else flat.index_select(0, self.row_indices)

    def token_mask(self) -> Optional[torch.Tensor]:
        """bool [*rows], True where a position of `to_rows` holds a real token; None: all do."""
        if self.has_full_rows:
            return self.key_mask
        return self.to_rows(torch.ones_like(self.positions, dtype=torch.bool))

    def attended(self, start: int, end: int) -> Optional[torch.Tensor]:
        """Which keys the queries from `start` to `end` of each row attend to.

        Returns:
            bool [rows, 1 or end - start, row length]; None: every query of a row attends to the whole row.
        """
        mask = self.token_mask()
        mask = None if mask is None else mask[:, None, :]
        if self.documents is None:
            return mask
        together = self.documents[:, start:end, None] == self.documents[:, None, :]
        return together if mask is None else together & mask


def pack_batch(
    input_ids: Optional[torch.Tensor] = None,
    attention_mask: Optional[torch.Tensor] = None,
    token_type_ids: Optional[torch.Tensor] = None,
    position_ids: Optional[torch.Tensor] = None,
    inputs_embeds: Optional[torch.Tensor] = None,
    cu_seq_lens_q: Optional[torch.Tensor] = None,
    max_length_q: Optional[int] = None,
    keep_padding: bool = False,
) -> PackedBatch:
    """Check the shapes of a call's arguments (see `BertModel.forward`) and describe the batch.

    Args:
        keep_padding: keep tokens [B, S, ...], as is always done while torch traces.

    Returns:
        The batch. Without `attention_mask` and `position_ids`, and with `max_length_q` where there is
        `cu_seq_lens_q`, nothing is copied to the host.

    Raises:
        TypeError: an argument is not a tensor.
        ValueError: both or neither of `input_ids` and `inputs_embeds`; a wrong rank, shape, dtype or mask; boundaries
            or positions that do not fit the tokens.
    """
    if (input_ids is None) == (inputs_embeds is None):
        given = "neither" if input_ids is None else "both"
        raise ValueError(f"exactly one of input_ids and inputs_embeds must be given, got {given}")
    name, tokens, rank = ("input_ids", input_ids, 2) if inputs_embeds is None else ("inputs_embeds", inputs_embeds, 3)
    check_tensor(name, tokens)
    if tokens.dim() != rank:
        raise ValueError(f"{name} must have {rank} dimensions [B, S{', E' * (rank - 2)}], got {list(tokens.shape)}")
    shape, device = tuple(tokens.shape[:2]), tokens.device
    for other, tensor in (("attention_mask", attention_mask), ("token_type_ids", token_type_ids)):
        if tensor is not None:
            check_shape(other, tensor, shape)
    # Integers on an accelerator are not checked, as in `check_ids`; masks that are added to scores are floating.
    if attention_mask is not None and not is_traced() and (device.type == "cpu" or attention_mask.is_floating_point()):
        wrong = (attention_mask != 0) & (attention_mask != 1)
        refuse("attention_mask", attention_mask, wrong, "be 1 at tokens and 0 at padding")
    if position_ids is not None:
        position_ids = as_integers("position_ids", position_ids)
        if tuple(position_ids.shape) != (1, shape[1]):  # one row serves all
            check_shape("position_ids", position_ids, shape)
    keep_padding = keep_padding or is_traced()
    if cu_seq_lens_q is not None:
        if attention_mask is not None or shape[0] != 1:
            raise ValueError(
                "cu_seq_lens_q describes one row [1, T] without attention_mask, got "
                f"{'a mask' if attention_mask is not None else 'no mask'} and {name} of shape {list(tokens.shape)}"
            )
        check_boundaries(cu_seq_lens_q, max_length_q, shape[1])
        return pack_flattened(cu_seq_lens_q.to(device), max_length_q, shape, keep_padding)
    if position_ids is not None:
        restarts = position_ids[:, 1:] != position_ids[:, :-1] + 1  # [B or 1, S - 1]
        if attention_mask is not None:  # ignore the values at padding
            real = attention_mask != 0
            restarts = restarts & real[:, 1:] & real[:, :-1]
        if is_traced():
            return pack_rows(attention_mask, shape, device, restarts)
        if restarts.any():
            if attention_mask is not None and not real.all():
                raise ValueError("position_ids restart within a row of a batch with padding; give each text a row")
            starts = torch.nn.functional.pad(restarts, (1, 0), value=True).expand(shape)
            wrong = starts & (position_ids != position_ids[:, :1])
            refuse("position_ids", position_ids.expand(shape), wrong, "rise by 1 or restart as their row starts")
            starts = starts.flatten().nonzero().flatten()
            bounds = torch.cat((starts, starts.new_tensor([shape[0] * shape[1]])))
            return pack_flattened(bounds, None, shape, keep_padding)
    return pack_rows(attention_mask, shape, device) if keep_padding else pack_padded(attention_mask, shape, device)


def pack_padded(attention_mask: Optional[torch.Tensor], shape: tuple[int, int], device) -> PackedBatch:
    """Describe a padded batch whose padding is dropped.

    With a mask, three numbers per row are copied to the host, once.

    Args:
        attention_mask: bool or any integer or float dtype, [B, S], on `device`; 1 marks a real token. None: all are
            real.
        shape: (B, S).
        device: device of the tokens.
    """
    batch, length = shape
    if attention_mask is not None and attention_mask.device.type == "cpu" and attention_mask.all():
        attention_mask = None  # on an accelerator this would force a synchronization
    if attention_mask is None:
        return replace(pack_rows(None, shape, device), keeps_padding=False, known_lengths=(length,) * batch)
    keep = attention_mask != 0
    columns = torch.arange(length, device=device)
    first = torch.where(keep, columns, length).amin(dim=1) if length else columns.new_zeros(batch)
    last = torch.where(keep, columns, -1).amax(dim=1) if length else columns.new_zeros(batch)
    lengths = keep.sum(dim=1)
    host_lengths, host_first, host_last = torch.stack((lengths, first, last)).tolist()
    cu_seqlens = torch.zeros(batch + 1, dtype=torch.int32, device=device)
    cu_seqlens[1:] = lengths.cumsum(0)
    indices = None if sum(host_lengths) == batch * length else keep.flatten().nonzero().flatten()
    return PackedBatch(
        shape=shape,
        indices=indices,
        cu_seqlens=cu_seqlens,
        positions=columns.repeat(batch) if indices is None else indices % length,
        row_length=length,
        max_seqlen=max(host_lengths, default=0),
        has_holes=any(n and end - start + 1 != n for n, start, end in zip(host_lengths, host_first, host_last)),
        known_lengths=tuple(host_lengths),
    )


def pack_flattened(
    cu_seqlens: torch.Tensor, max_seqlen: Optional[int], shape: tuple[int, int], keep_padding: bool = False
) -> PackedBatch:
    """Describe sequences that arrive concatenated, without padding between them.

    Args:
        cu_seqlens: int32 or int64 [N + 1], on the tokens' device; where each sequence starts, ending with T.
        max_seqlen: tokens of the longest sequence, or None to read it from `cu_seqlens` (one copy to the host).
        shape: (B, S) of the tokens, B * S = T.
        keep_padding: keep tokens [B, S, ...] and copy nothing to the host.
    """
    total = shape[0] * shape[1]
    cu_seqlens = cu_seqlens.to(torch.int32)
    token = torch.arange(total, device=cu_seqlens.device)
    sequence = torch.searchsorted(cu_seqlens[1:].contiguous(), token, right=True)
    known_lengths = None
    if keep_padding:
        max_seqlen = total if max_seqlen is None else max_seqlen
    elif cu_seqlens.device.type == "cpu" or max_seqlen is None:
        known_lengths = tuple(cu_seqlens.diff().tolist())
        max_seqlen = max(known_lengths, default=0)
    return PackedBatch(
        shape=shape,
        indices=None,
        cu_seqlens=cu_seqlens,
        positions=token - cu_seqlens.long().index_select(0, sequence),
        row_length=max_seqlen,
        max_seqlen=max_seqlen,
        keeps_padding=keep_padding,
        documents=sequence.view(shape) if keep_padding else None,
        known_lengths=known_lengths,
    )


def pack_rows(
    attention_mask: Optional[torch.Tensor], shape: tuple[int, int], device, restarts: Optional[torch.Tensor] = None
) -> PackedBatch:
    """Describe a padded batch whose padding is kept; no shape depends on data.

    Args:
        restarts: bool [B or 1, S - 1], where a row starts a new sequence; the others are those of `pack_padded`.
    """
    batch, length = shape
    documents = None
    if restarts is not None:
        documents = torch.nn.functional.pad(restarts.long().cumsum(dim=1), (1, 0)).expand(shape)
    return PackedBatch(
        shape=shape,
        indices=None,
        cu_seqlens=torch.arange(batch + 1, dtype=torch.int32, device=device) * length,
        positions=torch.arange(length, device=device).repeat(batch),
        row_length=length,
        max_seqlen=length,
        keeps_padding=True,
        key_mask=None if attention_mask is None else attention_mask != 0,
        documents=documents,
        restarts=None if restarts is None else restarts.any(),
    )
