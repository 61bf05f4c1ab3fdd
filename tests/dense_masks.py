"""What tokens see as dense boolean masks ``[batch, 1, sequence, sequence]``, to compare with."""

from __future__ import annotations

from torch import Tensor

from nemo_rmt.megatron.attention import dense_mask, row_structure


def document_mask(segment_ids: Tensor) -> Tensor:
    """Causal within documents."""
    return dense_mask(row_structure(segment_ids))


def tree_mask(segment_ids: Tensor, branch_ids: Tensor, fork_columns: Tensor) -> Tensor:
    """Causal within documents and branches; a branch sees its document before the fork."""
    return dense_mask(row_structure(segment_ids, branch_ids, fork_columns))
