"""What every objective and evaluation is given: rows of tokens, what to predict, and where it counts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from nemo_rmt.errors import UserError


@dataclass
class TokenBatch:
    """Rows of next-token prediction, each tensor ``[batch, sequence]``: ``labels[:, t]`` follows ``tokens[:, t]``."""

    tokens: Tensor
    """int64; what the model reads."""
    labels: Tensor
    """int64; the token that follows each one."""
    loss_mask: Tensor
    """float32; 1 where the label counts, 0 at padding, prompts and document boundaries."""
    segment_ids: Tensor
    """int64; index of the document within the row, -1 at padding. A token attends within its own only."""
    position_ids: Tensor
    """int64; 0 to sequence - 1, unless documents branch."""
    extras: dict[str, Tensor] = field(default_factory=dict)
    """What travels with the tokens, such as reference_logprobs and advantages."""
    branch_ids: Tensor | None = None
    """int64; 0 in a document, 1, 2, ... in the branches of the row's documents. None: nothing branches (see tree)."""
    fork_columns: Tensor | None = None
    """int64; in a branch: it sees the columns of its document before this one. 0 elsewhere; None with branch_ids."""

    @classmethod
    def from_documents(cls, tokens: Tensor, eod: int, document_attention: bool) -> TokenBatch:
        """Rows cut from a stream of documents that each end with ``eod``.

        tokens: ``[batch, sequence + 1]``. With ``document_attention`` each document is a segment of its own and
        the prediction from ``eod`` (a next document's first token) does not count; otherwise a row is one segment.
        """
        inputs, labels = tokens[:, :-1].long().contiguous(), tokens[:, 1:].long().contiguous()
        ends = (inputs == eod).long()
        if document_attention:
            segment_ids, loss_mask = ends.cumsum(1) - ends, (1 - ends).float()
        else:
            segment_ids, loss_mask = torch.zeros_like(ends), torch.ones_like(ends, dtype=torch.float32)
        return cls(inputs, labels, loss_mask, segment_ids, _positions(inputs))

    @classmethod
    def from_examples(
        cls,
        examples: Sequence[tuple[Sequence[int], Sequence[float]]],
        pad: int,
        length: int | None,
        multiple: int = 1,
        key: str = "sequence_length of this stage",
    ) -> TokenBatch:
        """One example per row, padded on the right.

        examples: ``(tokens, mask)`` of equal lengths; the mask says which tokens are to be predicted, so that
        ``mask[t + 1]`` stands at position t, whose label is token t + 1. length: of the rows, None for the longest
        example's; rounded up to ``multiple``. key: the recipe key that bounds ``length``, for the message.
        Raises UserError for an example of more than ``length + 1`` tokens.
        """
        for tokens, mask in examples:
            if len(tokens) < 2 or len(tokens) != len(mask):
                raise ValueError(f"an example is 2 tokens or more and as long a mask, got {len(tokens)}, {len(mask)}")
        longest = max(len(tokens) for tokens, _ in examples) - 1
        if length is not None and longest > length:
            raise UserError(
                f"an example of {longest + 1} tokens does not fit into {length}: raise {key} to at least {longest}"
            )
        width = -(-(longest if length is None else length) // multiple) * multiple
        shape = (len(examples), width)
        inputs, labels = torch.full(shape, pad), torch.full(shape, pad)
        loss_mask, segment_ids = torch.zeros(shape), torch.full(shape, -1)
        for row, (tokens, mask) in enumerate(examples):
            count = len(tokens) - 1
            sequence = torch.as_tensor(tokens, dtype=torch.int64)
            inputs[row, :count], labels[row, :count] = sequence[:-1], sequence[1:]
            loss_mask[row, :count] = torch.as_tensor(mask, dtype=torch.float32)[1:]
            segment_ids[row, :count] = 0
        return cls(inputs, labels, loss_mask, segment_ids, _positions(inputs))

    def num_tokens(self) -> int:
        """How many labels count."""
        return int((self.loss_mask != 0).sum())

    def select(self, rows: Tensor | slice | Sequence[int]) -> TokenBatch:
        """The given rows, with their extras."""
        return self._map(lambda tensor: tensor[rows])

    def narrowed(self, multiple: int) -> TokenBatch:
        """Without the last columns, where they are padding in every row; the width stays a multiple of ``multiple``,
        at least one, unless the batch is narrower."""
        used = (self.segment_ids >= 0).any(0).nonzero()
        width = (int(used[-1]) // multiple + 1) * multiple if len(used) else multiple
        return self._map(lambda tensor: tensor[:, :width])

    def micro_batches(self, size: int) -> list[TokenBatch]:
        """The rows in order, ``size`` at a time. Raises ValueError when they do not divide."""
        rows = self.tokens.shape[0]
        if rows % size:
            raise ValueError(f"{rows} rows do not divide into micro-batches of {size}")
        return [self.select(slice(begin, begin + size)) for begin in range(0, rows, size)]

    def to(self, device: torch.device | str) -> TokenBatch:
        """The batch on another device."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=True))

    def _map(self, change: Callable[[Tensor], Tensor]) -> TokenBatch:
        """A batch of every tensor changed."""
        extras = {name: change(tensor) for name, tensor in self.extras.items()}
        fields = (self.tokens, self.labels, self.loss_mask, self.segment_ids, self.position_ids)
        tree = (None if tensor is None else change(tensor) for tensor in (self.branch_ids, self.fork_columns))
        return TokenBatch(*map(change, fields), extras, *tree)


def _positions(tokens: Tensor) -> Tensor:
    """``0 .. sequence - 1`` for every row, ``[batch, sequence]``."""
    return torch.arange(tokens.shape[1], device=tokens.device).repeat(tokens.shape[0], 1)
