"""The core attention given to Megatron through its layer spec: any mask, and a key/value cache for sampling.

Megatron's own attention knows causal masks and a cache of un-rotated keys. Ours takes an explicit boolean mask (packed
documents, left-padded prompts, token trees) and keeps rotated keys, so that a decoding step costs one position and a
cached prefix can be shared. It runs PyTorch's scaled_dot_product_attention, which picks a fused kernel.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator

import torch
import torch.nn.functional as F
from megatron.core.transformer.module import MegatronModule
from torch import Tensor, nn


class KeyValueCache:
    """Rotated keys and values of one layer, ``[batch, groups, length, head_dim]``, grown in place.

    Args:
        length: most positions the cache will hold (prompt plus response).
    """

    def __init__(self, length: int):
        self.length = length
        self.used = 0
        self.keys: Tensor | None = None
        self.values: Tensor | None = None

    def append(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Add new positions; returns all keys and values so far."""
        if self.keys is None:
            shape = (*keys.shape[:2], self.length, keys.shape[3])
            self.keys, self.values = keys.new_empty(shape), values.new_empty(shape)
        end = self.used + keys.shape[2]
        self.keys[:, :, self.used : end] = keys
        self.values[:, :, self.used : end] = values
        self.used = end
        return self.keys[:, :, :end], self.values[:, :, :end]

    def select(self, rows: Tensor) -> None:
        """Keep only these batch rows (finished ones leave the batch)."""
        self.keys, self.values = self.keys[rows], self.values[rows]


class MaskedAttention(MegatronModule):
    """Scaled dot-product attention under an explicit mask.

    ``attention_mask`` is a boolean ``[batch, 1, queries, keys]`` tensor in which True means *may attend* (PyTorch's
    convention; nothing else in Megatron reads it), or None for plain causal attention.
    """

    def __init__(self, config, layer_number, attn_mask_type=None, attention_type=None, softmax_scale=None, **_):
        super().__init__(config=config)
        self.softmax_scale = softmax_scale
        self.cache: KeyValueCache | None = None

    def forward(self, query, key, value, attention_mask, **_) -> Tensor:
        """``[queries, batch, heads, dim]`` and ``[keys, batch, groups, dim]`` to ``[queries, batch, heads * dim]``."""
        queries, batch, heads, dim = query.shape
        query, key, value = (tensor.permute(1, 2, 0, 3) for tensor in (query, key, value))
        if self.cache is not None:
            key, value = self.cache.append(key, value)
        output = F.scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=attention_mask,
            is_causal=attention_mask is None and queries > 1,
            scale=self.softmax_scale,
            enable_gqa=key.shape[1] != heads,
        )
        return output.permute(2, 0, 1, 3).reshape(queries, batch, heads * dim)


def document_mask(segment_ids: Tensor) -> Tensor:
    """Causal attention within documents.

    Args:
        segment_ids: ``[batch, sequence]``, one number per document of a row; padding (-1) sees padding only.

    Returns:
        ``[batch, 1, sequence, sequence]`` boolean, True where a query may attend.
    """
    return tree_mask(segment_ids)


def tree_mask(segment_ids: Tensor, branch_ids: Tensor | None = None, fork_columns: Tensor | None = None) -> Tensor:
    """Causal attention within documents, from whose middle branches may fork.

    A token sees what is before it in its document, or in its branch and in its branch's document before the fork.

    Args:
        segment_ids, branch_ids, fork_columns: ``[batch, sequence]``, see TokenBatch; the latter two are None when
            nothing branches.

    Returns:
        ``[batch, 1, sequence, sequence]`` boolean, True where a query may attend.
    """
    same = segment_ids[:, None, :, None] == segment_ids[:, None, None, :]
    visible = same & torch.ones(same.shape[-2:], dtype=torch.bool, device=same.device).tril()
    if branch_ids is None:
        return visible
    together = branch_ids[:, None, :, None] == branch_ids[:, None, None, :]
    # A document precedes its branches: what is before the fork is of the document.
    before_fork = torch.arange(branch_ids.shape[1], device=branch_ids.device) < fork_columns[:, None, :, None]
    return visible & (together | before_fork)


@contextlib.contextmanager
def caching(models: Iterable[nn.Module], length: int) -> Iterator[list[KeyValueCache]]:
    """Give every attention layer of the models a cache of ``length`` positions until the block is left."""
    layers = [module for model in models for module in model.modules() if isinstance(module, MaskedAttention)]
    for layer in layers:
        layer.cache = KeyValueCache(length)
    try:
        yield [layer.cache for layer in layers]
    finally:
        for layer in layers:
            layer.cache = None
