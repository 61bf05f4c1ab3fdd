"""The core attention given to Megatron through its layer spec: packed documents, token trees, and sampling.

Megatron's own attention knows causal masks and a cache of un-rotated keys. Ours takes an explicit mask (left-padded
prompts) or the structure of the rows (packed documents, token trees), under which keys that no query of a block sees
are not touched at all. While sampling it has a cache of rotated keys (see ``megatron.cache``). PyTorch's fused kernels
do the work: scaled_dot_product_attention, and flex_attention for structured rows on a GPU.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from megatron.core.transformer.module import MegatronModule
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

# Queries that attend together: fewer would skip more keys, but every block costs a kernel. Keys are skipped in smaller
# blocks, which must divide these.
QUERY_BLOCK, KEY_BLOCK = 128, 64

Sees = Callable[[Tensor, Tensor | None, Tensor, Tensor], Tensor]
"""May in this row, in this head, this query attend to this key? From indices that broadcast to booleans; the head's is
not read. flex_attention's mask_mod."""


class MaskedAttention(MegatronModule):
    """Scaled dot-product attention under a mask or a structure.

    ``attention_mask``, which nothing else in Megatron reads, is one of

    * integers ``[batch, 3 or 1, sequence]``: the structure of the rows, see ``row_structure``;
    * booleans ``[batch, 1, queries, keys]`` in which True means *may attend* (PyTorch's convention);
    * None: plain causal attention.
    """

    def __init__(self, config, layer_number, attn_mask_type=None, attention_type=None, softmax_scale=None, **_):
        super().__init__(config=config)
        self.softmax_scale = softmax_scale
        self.cache = None  # a megatron.cache.KeyValueCache while sampling

    def forward(self, query, key, value, attention_mask, **_) -> Tensor:
        """``[queries, batch, heads, dim]`` and ``[keys, batch, groups, dim]`` to ``[queries, batch, heads * dim]``."""
        queries, batch, heads, dim = query.shape
        query, key, value = (tensor.permute(1, 2, 0, 3) for tensor in (query, key, value))
        if self.cache is not None:
            key, value = self.cache.append(key, value)
            if self.cache.attends(query):
                output = self.cache.attend(query, attention_mask, self.softmax_scale)
                return output.permute(2, 0, 1, 3).reshape(queries, batch, heads * dim)
        if attention_mask is None or attention_mask.dtype == torch.bool:
            output = _attend(query, key, value, attention_mask, self.softmax_scale)
        else:
            output = structured_attention(query, key, value, attention_mask, self.softmax_scale)
        return output.permute(2, 0, 1, 3).reshape(queries, batch, heads * dim)


def _attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float | None) -> Tensor:
    """``[batch, heads, queries, dim]`` and ``[batch, groups, keys, dim]`` to the former; without a mask causal."""
    return F.scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=mask,
        is_causal=mask is None and query.shape[2] > 1,
        scale=scale,
        enable_gqa=key.shape[1] != query.shape[1],
    )


def row_structure(segment_ids: Tensor, branch_ids: Tensor | None = None, fork_columns: Tensor | None = None) -> Tensor:
    """What each token sees, as one tensor: causal attention within documents, from whose middle branches may fork.

    A token sees what is before it in its document, or in its branch and in its branch's document before the fork. A
    tensor, because Megatron's recomputation hands nothing else to a layer.

    Args:
        segment_ids, branch_ids, fork_columns: ``[batch, sequence]``, see TokenBatch; the latter two are None when
            nothing branches. Padding (segment -1) sees padding only.

    Returns:
        ``[batch, 3, sequence]`` integers, ``[batch, 1, sequence]`` when nothing branches.
    """
    return torch.stack([segment_ids] if branch_ids is None else [segment_ids, branch_ids, fork_columns], 1)


def visibility(structure: Tensor) -> Sees:
    """The structure as a function of indices."""
    segments, *tree = structure.unbind(1)

    def in_document(row: Tensor, head: Tensor | None, query: Tensor, key: Tensor) -> Tensor:
        return (segments[row, query] == segments[row, key]) & (key <= query)

    if not tree:
        return in_document
    branches, forks = tree

    def in_tree(row: Tensor, head: Tensor | None, query: Tensor, key: Tensor) -> Tensor:
        together = branches[row, query] == branches[row, key]
        # A document precedes its branches: what is before the fork is of the document.
        return in_document(row, head, query, key) & (together | (key < forks[row, query]))

    return in_tree


def dense_mask(structure: Tensor, start: int = 0, end: int | None = None, first: int = 0) -> Tensor:
    """The structure as a boolean mask, ``[batch, 1, queries, keys]``: queries ``start`` to ``end``, keys from ``first``
    to ``end``."""
    batch, _, length = structure.shape
    rows, columns = (torch.arange(size, device=structure.device) for size in (batch, end or length))
    return visibility(structure)(rows[:, None, None, None], None, columns[start:, None], columns[first:])


def structured_attention(
    query: Tensor, key: Tensor, value: Tensor, structure: Tensor, scale: float | None = None
) -> Tensor:
    """Attention of whole rows under their structure.

    Args:
        query: ``[batch, heads, sequence, dim]``.
        key, value: ``[batch, groups, sequence, dim]``.
        structure: see ``row_structure``.
        scale: of the scores; None is 1/√dim.

    Returns:
        As ``query``.
    """
    if query.shape[2] <= QUERY_BLOCK:
        return _attend(query, key, value, _derived(structure, dense_mask), scale)
    # flex_attention needs the compiler, and heads of at least 16 numbers.
    if query.is_cuda and query.shape[3] >= 16 and os.environ.get("TORCH_COMPILE_DISABLE") != "1":
        return _attend_by_flex(query, key, value, structure, scale)
    return _attend_in_blocks(query, key, value, structure, scale)


class Block(NamedTuple):
    """What a block of queries sees."""

    keys: list[slice]
    """The columns of whole blocks of keys of which any of its queries, in any row, sees any."""
    mask: Tensor
    """0 for each of their keys that a query sees, else -inf: ``[batch, 1, queries, keys]``. Numbers, because the kernel
    would turn booleans into them in every layer, and keep them for backward."""


def _attend_in_blocks(query: Tensor, key: Tensor, value: Tensor, structure: Tensor, scale: float | None) -> Tensor:
    """Each block of queries with the blocks of keys that it sees; rows of one document each as a whole."""
    blocks = _derived(structure, lambda rows: _blocks(rows, query.dtype))
    if blocks is None:
        return _attend(query, key, value, None, scale)
    outputs = []
    for part, block in zip(query.split(QUERY_BLOCK, 2), blocks, strict=True):
        seen = (_columns(tensor, block.keys) for tensor in (key, value))
        outputs.append(_attend(part, *seen, block.mask, scale))
    return torch.cat(outputs, 2)


def _columns(tensor: Tensor, columns: list[slice], dim: int = 2) -> Tensor:
    """Some columns of a tensor, of which ``dim`` is their dimension; uncopied where they are next to each other."""
    parts = [tensor.narrow(dim, each.start, each.stop - each.start) for each in columns]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim)


def _blocks(structure: Tensor, dtype: torch.dtype) -> list[Block] | None:
    """The blocks of queries, in order, with masks of this type; None where each row is one document."""
    segments, length = structure[:, 0], structure.shape[2]
    opens = F.pad(segments[:, 1:] != segments[:, :-1], (1, 0))
    if structure.shape[1] == 1 and not opens.any():
        return None
    # A block sees nothing before the document of its first query: looking there would cost as much as the square of
    # the row's length.
    columns = torch.arange(length, device=structure.device)
    begins = torch.where(opens, columns, 0).cummax(1).values[:, ::QUERY_BLOCK].amin(0).tolist()
    blocks = []
    for start, begin in zip(range(0, length, QUERY_BLOCK), begins, strict=True):
        first, end = begin // KEY_BLOCK * KEY_BLOCK, min(start + QUERY_BLOCK, length)
        mask = dense_mask(structure, start, end, first)
        seen = [part.any() for part in mask.flatten(0, 2).any(0).split(KEY_BLOCK)]
        keys: list[slice] = []
        for column, wanted in zip(range(first, end, KEY_BLOCK), seen, strict=True):
            if wanted and keys and keys[-1].stop == column:
                keys[-1] = slice(keys[-1].start, min(column + KEY_BLOCK, end))
            elif wanted:
                keys.append(slice(column, min(column + KEY_BLOCK, end)))
        mask = _columns(mask, [slice(each.start - first, each.stop - first) for each in keys], 3)
        added = torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(~mask, -torch.inf)
        blocks.append(Block(keys, added))
    return blocks


def _attend_by_flex(query: Tensor, key: Tensor, value: Tensor, structure: Tensor, scale: float | None) -> Tensor:
    """The same by flex_attention, which generates a kernel that skips blocks."""
    return _compiled()(
        query,
        key,
        value,
        block_mask=_derived(structure, _block_mask),
        scale=scale,
        enable_gqa=key.shape[1] != query.shape[1],
    )


@functools.cache
def _compiled() -> Callable[..., Tensor]:
    """Compiled for the shapes that occur, at its first calls; uncompiled it would hold every score at once."""
    return torch.compile(flex_attention)


def _block_mask(structure: Tensor) -> BlockMask:
    """flex_attention's form of the structure."""
    batch, _, length = structure.shape
    return create_block_mask(
        visibility(structure), batch, None, length, length, device=structure.device, BLOCK_SIZE=QUERY_BLOCK
    )


def _derived(structure: Tensor, derive: Callable[[Tensor], object]) -> object:
    """What follows from a structure; kept with the tensor, so that the layers of a forward share it."""
    if not hasattr(structure, "derived"):
        structure.derived = derive(structure)
    return structure.derived
