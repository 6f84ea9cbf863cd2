"""One object that says where packed tokens sit, and the two moves that use it: pack and unpack.

Letters: B batch, S padded length, T real tokens, N sequences.
"""

from dataclasses import dataclass, field
from functools import cached_property
from typing import Callable, Optional

import torch


@dataclass(frozen=True)
class PackedBatch:
    """Where T packed tokens sit in the caller's [B, S] layout, and which of them form one sequence.

    Built once a forward by `pack_padded` or `pack_flattened` and handed down whole.

    Attributes:
        shape: (B, S) of the caller's layout. Sequences are its rows, except for flattened input, where the layout is
            (1, T) and holds all N sequences one after another.
        indices: int64 [T], the place of each token in the flattened layout (row * S + column). None: every place
            holds a token, T = B * S.
        cu_seqlens: int32 [N + 1], where each sequence starts in the T tokens; the last entry is T.
        positions: int64 [T], the column of each token in its own padded row. ALiBi distances are differences of these.
        row_length: exclusive upper bound of `positions`.
        max_seqlen: tokens of the longest sequence.
        has_holes: whether some sequence skips columns between its first and its last token. When False, differences
            of `positions` inside a sequence equal differences of token indices.
        key_mask: bool [B, S], True where a place holds a real token. Only set where padding stays in the T = B * S
            tokens (shapes must not depend on data); None: all T tokens are real.
        known_lengths: tokens of each sequence, where the host knows them already; `lengths` is what to read.
        memory: what `shared` keeps.

    Source: ours.
    """

    shape: tuple[int, int]
    indices: Optional[torch.Tensor]
    cu_seqlens: torch.Tensor
    positions: torch.Tensor
    row_length: int
    max_seqlen: int
    has_holes: bool = False
    key_mask: Optional[torch.Tensor] = None
    known_lengths: Optional[tuple[int, ...]] = None
    memory: dict = field(default_factory=dict, init=False, repr=False, compare=False)

    @property
    def num_sequences(self) -> int:
        """N, the number of sequences, empty ones included."""
        return self.cu_seqlens.shape[0] - 1

    @property
    def lengths(self) -> list[int]:
        """Tokens of each sequence, N Python integers; copied from the device where they are not known."""
        return self.cu_seqlens.diff().tolist() if self.known_lengths is None else list(self.known_lengths)

    @property
    def keeps_padding(self) -> bool:
        """Whether padding was left among the tokens, because shapes must not depend on data."""
        return self.key_mask is not None

    def shared(self, key, make: Callable):
        """What `make` returns, made once and kept under `key`: what all layers of a forward need of this batch."""
        if key not in self.memory:
            self.memory[key] = make()
        return self.memory[key]

    @cached_property
    def reversal(self) -> torch.Tensor:
        """int64 [T]: the token that stands in a token's place when the tokens of each sequence are in reverse order."""
        starts, ends = self.cu_seqlens[:-1].long(), self.cu_seqlens[1:].long()
        total = self.positions.shape[0]
        ends_meet = (starts + ends - 1).repeat_interleave(ends - starts, output_size=total)
        return ends_meet - torch.arange(total, device=ends_meet.device)

    def pack(self, padded: torch.Tensor) -> torch.Tensor:
        """Take the tokens out of the caller's layout.

        Args:
            padded: any dtype, [B, S, ...].

        Returns:
            [T, ...] in the same dtype.
        """
        flat = padded.flatten(0, 1)
        return flat if self.indices is None else flat.index_select(0, self.indices)

    def unpack(self, packed: torch.Tensor) -> torch.Tensor:
        """Put the tokens back into the caller's layout; places without a token become zero.

        Args:
            packed: any dtype, [T, ...].

        Returns:
            [B, S, ...] in the same dtype.
        """
        batch, length = self.shape
        if self.key_mask is not None:
            keep = self.key_mask.flatten().view(-1, *[1] * (packed.dim() - 1))
            packed = packed.masked_fill(~keep, 0)
        elif self.indices is not None:
            places = packed.new_zeros(batch * length, *packed.shape[1:])
            packed = places.index_copy(0, self.indices, packed)
        return packed.unflatten(0, (batch, length))

    def first_tokens(self, packed: torch.Tensor) -> torch.Tensor:
        """The first token of each sequence.

        Args:
            packed: any dtype, [T, ...].

        Returns:
            [N, ...] in the same dtype; zero where a sequence is empty.
        """
        if self.keeps_padding:
            first = self.key_mask.long().argmax(dim=1)
            taken = packed.unflatten(0, self.shape)[torch.arange(self.shape[0], device=first.device), first]
            empty = ~self.key_mask.any(dim=1)
        else:
            padded = torch.cat((packed, packed.new_zeros(1, *packed.shape[1:])))  # the last sequences may be empty
            taken = padded.index_select(0, self.cu_seqlens[:-1].long())
            empty = self.cu_seqlens.diff() == 0
        return taken.masked_fill(empty.view(-1, *[1] * (packed.dim() - 1)), 0)

    @property
    def row_indices(self) -> torch.Tensor:
        """int64 [T]: sequence number * row_length + position, the place of each token in an [N, row_length] layout."""
        lengths = self.cu_seqlens.diff().long()
        sequence = torch.arange(self.num_sequences, device=lengths.device)
        sequence = sequence.repeat_interleave(lengths, output_size=self.positions.shape[0])
        return sequence * self.row_length + self.positions

    def to_rows(self, packed: torch.Tensor) -> torch.Tensor:
        """One zero-padded row a sequence, for a backend that needs rows.

        Args:
            packed: any dtype, [T, ...].

        Returns:
            [N, row_length, ...] in the same dtype.
        """
        if self.num_sequences * self.row_length == packed.shape[0]:
            return packed.unflatten(0, (self.num_sequences, self.row_length))
        rows = packed.new_zeros(self.num_sequences * self.row_length, *packed.shape[1:])
        return rows.index_copy(0, self.row_indices, packed).unflatten(0, (self.num_sequences, self.row_length))

    def from_rows(self, rows: torch.Tensor) -> torch.Tensor:
        """The inverse of `to_rows`: [N, row_length, ...] to [T, ...]."""
        flat = rows.flatten(0, 1)
        return flat if flat.shape[0] == self.positions.shape[0] else flat.index_select(0, self.row_indices)

    def row_mask(self) -> torch.Tensor:
        """bool [N, row_length]: which places of `to_rows` hold a token."""
        if self.keeps_padding:
            return self.key_mask
        return self.to_rows(torch.ones_like(self.positions, dtype=torch.bool))


def pack_padded(attention_mask: Optional[torch.Tensor], shape: tuple[int, int], device, traced: bool) -> PackedBatch:
    """Describe a padded batch.

    Args:
        attention_mask: bool or any integer or float dtype, [B, S], on `device`; nonzero marks a real token. None: all
            are real.
        shape: (B, S).
        device: device of the tokens.
        traced: True while shapes must not depend on data (torch.compile, export): padding then stays among the
            tokens and `key_mask` marks it.

    Returns:
        The batch. Reads three numbers a row back to the host, once, unless there is no mask or `traced` is set.
    """
    batch, length = shape
    if attention_mask is not None and not traced and attention_mask.device.type == "cpu" and attention_mask.all():
        attention_mask = None  # a device would have to wait for the answer
    if attention_mask is None or traced:
        key_mask = None
        if traced:
            every = torch.ones(shape, dtype=torch.bool, device=device)
            key_mask = every if attention_mask is None else attention_mask != 0
        return PackedBatch(
            shape=shape,
            indices=None,
            cu_seqlens=torch.arange(batch + 1, dtype=torch.int32, device=device) * length,
            positions=torch.arange(length, device=device).repeat(batch),
            row_length=length,
            max_seqlen=length,
            key_mask=key_mask,
            known_lengths=None if traced else (length,) * batch,
        )
    keep = attention_mask != 0
    columns = torch.arange(length, device=device)
    first = torch.where(keep, columns, length).amin(dim=1) if length else columns.new_zeros(batch)
    last = torch.where(keep, columns, -1).amax(dim=1) if length else columns.new_zeros(batch)
    lengths = keep.sum(dim=1)
    host_lengths, host_first, host_last = torch.stack((lengths, first, last)).tolist()
    total = sum(host_lengths)
    cu_seqlens = torch.zeros(batch + 1, dtype=torch.int32, device=device)
    cu_seqlens[1:] = lengths.cumsum(0)
    indices = None if total == batch * length else keep.flatten().nonzero().flatten()
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


def pack_flattened(cu_seqlens: torch.Tensor, max_seqlen: Optional[int], total: int) -> PackedBatch:
    """Describe sequences that arrive concatenated as one row [1, T].

    Args:
        cu_seqlens: int32 or int64 [N + 1], on the tokens' device; where each sequence starts, ending with T.
        max_seqlen: tokens of the longest sequence, or None to read it from `cu_seqlens` (one copy to the host).
        total: T.

    Returns:
        The batch; its layout is (1, T).
    """
    cu_seqlens = cu_seqlens.to(torch.int32)
    lengths = cu_seqlens.diff()
    starts = cu_seqlens[:-1].long().repeat_interleave(lengths.long(), output_size=total)
    known_lengths = None
    if cu_seqlens.device.type == "cpu" or max_seqlen is None:
        known_lengths = tuple(lengths.tolist())
        max_seqlen = max(known_lengths, default=0)
    return PackedBatch(
        shape=(1, total),
        indices=None,
        cu_seqlens=cu_seqlens,
        positions=torch.arange(total, device=cu_seqlens.device) - starts,
        row_length=max_seqlen,
        max_seqlen=max_seqlen,
        known_lengths=known_lengths,
    )
