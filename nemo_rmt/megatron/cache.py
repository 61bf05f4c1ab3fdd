"""Key/value caches for sampling: of rotated keys, so that a decoding step costs one position.

Rows that follow prefixes of the same document (a trunk) share its keys and values: they are computed once and never
copied. A row attends to its trunk before its fork and to its own positions, each part by itself; the parts are joined
as in flash decoding. Rows with the same prompt are one row until its first token is drawn, see ``Caches.select``.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn

from nemo_rmt.megatron.attention import MaskedAttention

# Scores of one layer's queries that exist at once, 1 GiB in float32: long prompts go through in pieces.
MAX_SCORES = 2**28


class Forks:
    """Where a batch's rows fork off their trunks, laid out as a grid of trunks × slots; one for all layers.

    Args:
        trunks: index of each row's trunk, ``[rows]``, every one from 0 on used.
        positions: tokens of it that the row follows, ``[rows]``.
        length: positions of a trunk.
    """

    def __init__(self, trunks: Tensor, positions: Tensor, length: int):
        self.trunks, self.positions, self.length = trunks, positions, length
        counts = torch.bincount(trunks)
        self.shape = len(counts), int(counts.max())
        # Rows in the order of their trunks, numbered within each.
        order = trunks.argsort(stable=True)
        slots = torch.arange(len(trunks), device=trunks.device) - (counts.cumsum(0) - counts)[trunks[order]]
        cells = trunks[order] * self.shape[1] + slots
        self.cells = torch.empty_like(trunks).scatter_(0, order, cells)
        # A cell without a row holds row 0; nothing reads what comes out of it.
        self.rows = trunks.new_zeros(self.shape[0] * self.shape[1]).scatter_(0, cells, order)
        self.hidden = torch.arange(length, device=trunks.device) >= positions[self.rows].view(*self.shape, 1)

    def select(self, rows: Tensor) -> tuple[Forks, Tensor]:
        """Those of the given rows (indices), and the trunks left (indices)."""
        kept, trunks = self.trunks[rows].unique(return_inverse=True)
        return Forks(trunks, self.positions[rows], self.length), kept

    def to_grid(self, tensor: Tensor) -> Tensor:
        """``[rows, groups, n, dim]`` to ``[trunks, groups, slots, n, dim]``."""
        return tensor[self.rows].unflatten(0, self.shape).transpose(1, 2)

    def to_rows(self, grid: Tensor) -> Tensor:
        """The inverse of ``to_grid``."""
        return grid.transpose(1, 2).flatten(0, 1)[self.cells]


class KeyValueCache:
    """Rotated keys and values of one layer, ``[batch, groups, length, head_dim]``, grown in place.

    Beside them, once ``Caches.fork`` was called, those of the trunks, ``[trunks, groups, length, head_dim]``.

    Args:
        length: most positions the cache will hold (prompt plus response).
    """

    def __init__(self, length: int):
        self.length = length
        self.used = 0
        self.keys: Tensor | None = None
        self.values: Tensor | None = None
        self.forks: Forks | None = None
        self.trunk_keys: Tensor | None = None
        self.trunk_values: Tensor | None = None

    def append(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Add new positions; returns all keys and values so far, a trunk's excepted."""
        if self.keys is None:
            shape = (*keys.shape[:2], self.length, keys.shape[3])
            self.keys, self.values = keys.new_empty(shape), values.new_empty(shape)
        end = self.used + keys.shape[2]
        self.keys[:, :, self.used : end] = keys
        self.values[:, :, self.used : end] = values
        self.used = end
        return self.keys[:, :, :end], self.values[:, :, :end]

    def select(self, rows: Tensor, length: int) -> None:
        """Keep the given rows (indices, as often as they are to be there), with room for ``length`` positions."""
        shape = (len(rows), self.keys.shape[1], length, self.keys.shape[3])
        for name in ("keys", "values"):
            old = getattr(self, name)
            new = old.new_empty(shape)
            new[:, :, : self.used] = old[rows, :, : self.used]
            setattr(self, name, new)
        self.length = length

    def attends(self, query: Tensor) -> bool:
        """Whether ``attend`` is for this query, not a fused kernel: to trunks, and where that is the faster of two
        exact ways."""
        return self.forks is not None or (query.shape[2] == 1 and query.dtype == torch.float32)

    def attend(self, query: Tensor, mask: Tensor | None, scale: float | None) -> Tensor:
        """Attention to the trunks, if there are any, and to the rows' own positions.

        Args:
            query: ``[rows, heads, queries, head_dim]``.
            mask: of the rows' own positions, boolean ``[rows, 1, queries, used]``, True where a query may attend; None:
                everywhere.
            scale: of the scores; None is 1/√head_dim.

        Returns:
            As ``query``.
        """
        scale = query.shape[3] ** -0.5 if scale is None else scale
        keys, values = self.keys[:, :, : self.used], self.values[:, :, : self.used]
        if self.forks is None:
            return _attend_to_own(query, keys, values, mask, scale)
        rows, heads, _, dim = query.shape
        at_once = max(1, MAX_SCORES // (rows * heads * (self.used + self.forks.length)))
        parts = query.split(at_once, 2)
        hidden_keys = [None] * len(parts) if mask is None else (~mask[:, :, None]).split(at_once, 3)
        pieces = []
        for part, hidden in zip(parts, hidden_keys, strict=True):
            scaled = part.float() * scale
            grouped = scaled.reshape(rows, keys.shape[1], -1, *scaled.shape[2:])
            own = _partial_attention(grouped, keys, values, hidden).flatten(2, 3)
            cells = self.forks.to_grid(grouped.flatten(2, 3))
            beyond = self.forks.hidden[:, None, :, None]
            trunk = self.forks.to_rows(_partial_attention(cells, self.trunk_keys, self.trunk_values, beyond))
            pieces.append(_joined(own, trunk).reshape(rows, heads, -1, dim))
        return torch.cat(pieces, 2).to(query.dtype)


def _attend_to_own(query: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """Attention of one query per row in two products, with the heads of a group as the rows of one matrix."""
    grouped = (query * scale).reshape(*keys.shape[:2], -1, keys.shape[3])
    scores = grouped @ keys.transpose(2, 3)
    if mask is not None:
        scores.masked_fill_(~mask, float("-inf"))
    return (scores.softmax(-1) @ values).reshape(query.shape)


def _partial_attention(query: Tensor, keys: Tensor, values: Tensor, hidden: Tensor | None) -> Tensor:
    """Attention to some of the keys, to be joined with the rest; in float32, as fused kernels have it.

    Args:
        query: scaled, float32, ``[batch, groups, m, n, dim]``.
        keys, values: ``[batch, groups, length, dim]``.
        hidden: boolean, broadcast over ``[batch, groups, m, n, length]``; None: nothing is.

    Returns:
        Sum of exp(score - peak) · value, sum of exp(score - peak), peak: ``[batch, groups, m, n, dim + 2]``.
    """
    scores = (query.flatten(2, 3) @ keys.transpose(2, 3).float()).unflatten(2, query.shape[2:4])
    if hidden is not None:
        # Finite: a row may have no key here, and its peak then weighs nothing in the join.
        scores.masked_fill_(hidden, torch.finfo(scores.dtype).min)
    peak = scores.amax(-1, keepdim=True)
    weights = scores.sub_(peak).exp_()
    sums = (weights.flatten(2, 3) @ values.float()).unflatten(2, query.shape[2:4])
    return torch.cat([sums, weights.sum(-1, keepdim=True), peak], -1)


def _joined(one: Tensor, other: Tensor) -> Tensor:
    """Attention to the keys of two parts, ``[..., dim]``."""
    peak = torch.maximum(one[..., -1:], other[..., -1:])
    both = one[..., :-1] * (one[..., -1:] - peak).exp() + other[..., :-1] * (other[..., -1:] - peak).exp()
    return both[..., :-1] / both[..., -1:]


class Caches:
    """The caches of all layers of this process."""

    def __init__(self, layers: list[KeyValueCache]):
        self.layers = layers

    def fork(self, trunks: Tensor, positions: Tensor, length: int) -> None:
        """Make what is cached the trunks of a batch of new rows, which hold ``length`` positions of their own at most.

        trunks, positions: see Forks.
        """
        forks = Forks(trunks, positions, self.layers[0].used)
        for layer in self.layers:
            layer.trunk_keys, layer.trunk_values = layer.keys[:, :, : layer.used], layer.values[:, :, : layer.used]
            layer.keys = layer.values = None
            layer.used, layer.length, layer.forks = 0, length, forks

    def select(self, rows: Tensor, length: int | None = None) -> None:
        """Keep these rows of the batch (indices), and the trunks they follow. A row may be there several times.

        length: room for as many positions; None: as before.
        """
        for layer in self.layers:
            layer.select(rows, layer.length if length is None else length)
        old = self.layers[0].forks
        if old is None:
            return
        forks, kept = old.select(rows)
        for layer in self.layers:
            layer.forks = forks
            if forks.shape[0] < old.shape[0]:
                layer.trunk_keys, layer.trunk_values = layer.trunk_keys[kept], layer.trunk_values[kept]


@contextlib.contextmanager
def caching(models: Iterable[nn.Module], length: int) -> Iterator[Caches]:
    """Give every attention layer of the models a cache of ``length`` positions until the block is left."""
    layers = [module for model in models for module in model.modules() if isinstance(module, MaskedAttention)]
    for layer in layers:
        layer.cache = KeyValueCache(length)
    try:
        yield Caches([layer.cache for layer in layers])
    finally:
        for layer in layers:
            layer.cache = None
