"""Token trees: a document and the responses that branch off it, laid out so that the document is computed once.

A row holds whole trees: the trunk's tokens, then each branch's. A branch sees its trunk before its fork and itself, at
the positions it would have as a sequence of its own, so that every log-probability and gradient is that of separate
sequences. ``megatron.attention.row_structure`` says who sees whom.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from nemo_rmt.data.batch import TokenBatch
from nemo_rmt.errors import UserError

BRANCH_MASK = "branch_mask"
"""The name in ``TokenBatch.extras`` of the branches' mask."""


@dataclass
class Branch:
    """An instruction and its response, read after ``trunk[:position]``. Raises ValueError when fields disagree."""

    position: int
    """How many tokens of the trunk it sees, 0 to all: it forks before the trunk's token of this index."""
    tokens: Sequence[int]
    """Instruction and response."""
    mask: Sequence[float]
    """As long as tokens: 1 for those to predict. The first would be predicted from the trunk: always 0."""
    extras: Mapping[str, float | Sequence[float]] = field(default_factory=dict)
    """What travels with the tokens: one number for all, or one for each, such as the sampler's log-probabilities."""

    def __post_init__(self) -> None:
        if not self.tokens or len(self.tokens) != len(self.mask):
            found = f"{len(self.tokens)}, {len(self.mask)}"
            raise ValueError(f"a branch is 1 token or more and as long a mask, got {found}")
        if self.mask[0]:
            raise ValueError("a branch's first token has no prediction of its own: its mask must begin with 0")
        if BRANCH_MASK in self.extras:
            raise ValueError(f"a branch's mask is Branch.mask, not extras[{BRANCH_MASK!r}]")
        for name, values in self.extras.items():
            if not isinstance(values, (int, float)) and len(values) != len(self.tokens):
                raise ValueError(f"extras[{name!r}] of a branch of {len(self.tokens)} tokens has {len(values)} values")


@dataclass
class TokenTree:
    """A document and what branches off it. Raises ValueError when fields disagree."""

    trunk: Sequence[int]
    """The document's tokens."""
    branches: Sequence[Branch]
    """In any order; several may fork at one position."""
    mask: Sequence[float] | None = None
    """As long as the trunk: 1 for tokens that count for next-token prediction (the first never does); None: all. Where
    a branch is rewarded for predicting a trunk token, that token can be masked out here."""

    def __post_init__(self) -> None:
        if not self.trunk or (self.mask is not None and len(self.mask) != len(self.trunk)):
            found = f"{len(self.trunk)}, {'none' if self.mask is None else len(self.mask)}"
            raise ValueError(f"a trunk is 1 token or more and as long a mask, or none, got {found}")
        for branch in self.branches:
            if not 0 <= branch.position <= len(self.trunk):
                raise ValueError(f"a branch forks at {branch.position} of a trunk of {len(self.trunk)} tokens")

    def __len__(self) -> int:
        """Tokens of the trunk and all branches."""
        return len(self.trunk) + sum(len(branch.tokens) for branch in self.branches)


def pack_trees(
    trees: Sequence[TokenTree],
    length: int | None,
    pad: int,
    multiple: int = 1,
    rows: int = 1,
    key: str = "sequence_length of this stage",
) -> TokenBatch:
    """Trees into rows, each into the first that has room for it, in their order.

    The two losses stay apart. ``loss_mask`` is next-token prediction's on the trunks, so that whatever trains on
    documents trains on trees unchanged; ``extras["branch_mask"]`` marks the branches' tokens, where their other extras
    count too. A mask or an extra of token t + 1 stands where that token is predicted, at t; the last tokens of a trunk
    and of a branch predict nothing. ``segment_ids`` counts the row's trees, ``branch_ids`` its branches from 1.

    length: most tokens of a row, None for the longest tree's; the width is that, rounded up to ``multiple``. rows: at
    least as many, the last ones padding only (every data-parallel rank needs as many micro-batches). key: the recipe
    key that bounds ``length``, for the message.
    Raises UserError for a tree longer than ``length``, ValueError for no trees or branches that carry different extras.
    """
    if not trees:
        raise ValueError("there are no trees to pack")
    longest = max(len(tree) for tree in trees)
    length = longest if length is None else length
    if longest > length:
        tree = max(trees, key=len)
        raise UserError(
            f"a tree of {longest} tokens (a trunk of {len(tree.trunk)} and {len(tree.branches)} branches) does not fit "
            f"into {length}: raise {key} to at least {longest}, or use fewer or shorter branches"
        )
    branches = [branch for tree in trees for branch in tree.branches]
    names = set(branches[0].extras) if branches else set()
    if any(set(branch.extras) != names for branch in branches):
        raise ValueError(f"all branches must carry the same extras; the first has {sorted(names)}")
    packed = _first_fit(trees, length)
    batch = _empty((max(rows, len(packed)), -(-length // multiple) * multiple), pad, names)
    for row, members in enumerate(packed):
        column = forked = 0
        for segment, tree in enumerate(members):
            start = column
            predictions = _place(batch, row, start, tree.trunk, segment, position=0)
            _fill(batch.loss_mask, row, predictions, 1.0 if tree.mask is None else tree.mask)
            column += len(tree.trunk)
            for branch in tree.branches:
                predictions = _place(batch, row, column, branch.tokens, segment, branch.position)
                for name, values in {**branch.extras, BRANCH_MASK: branch.mask}.items():
                    _fill(batch.extras[name], row, predictions, values)
                forked += 1
                end = column + len(branch.tokens)
                batch.branch_ids[row, column:end] = forked
                batch.fork_columns[row, column:end] = start + branch.position
                column = end
    return batch


def split_tree(tree: TokenTree, length: int, key: str = "sequence_length of this stage") -> list[TokenTree]:
    """A tree as several of at most ``length`` tokens that train the same; one that fits is returned as it is.

    The branches keep their order. The first tree has the whole trunk and its mask; the others repeat as much of the
    trunk as their branches see, with a mask of zeros.
    key: the recipe key that bounds ``length``, for the message. Raises UserError when the trunk and one branch do not
    fit.
    """
    if len(tree) <= length:
        return [tree]
    longest = max((len(branch.tokens) for branch in tree.branches), default=0)
    if len(tree.trunk) + longest > length:
        raise UserError(
            f"a trunk of {len(tree.trunk)} tokens and a branch of {longest} do not fit into {length}: raise {key} to "
            f"at least {len(tree.trunk) + longest}, or use shorter documents or branches"
        )
    parts: list[list[Branch]] = [[]]
    seen, room = len(tree.trunk), length - len(tree.trunk)  # tokens of the last part's trunk, and those left beside it
    for branch in tree.branches:
        room -= len(branch.tokens) + max(branch.position - seen, 0)
        seen = max(seen, branch.position)
        if room < 0:
            parts.append([])
            seen = max(branch.position, 1)
            room = length - seen - len(branch.tokens)
        parts[-1].append(branch)
    trees = [TokenTree(tree.trunk, parts[0], tree.mask)]
    for part in parts[1:]:
        seen = max(1, *(branch.position for branch in part))
        trees.append(TokenTree(tree.trunk[:seen], part, [0.0] * seen))
    return trees


def _first_fit(trees: Sequence[TokenTree], length: int) -> list[list[TokenTree]]:
    """The rows' trees."""
    packed: list[list[TokenTree]] = []
    room: list[int] = []
    for tree in trees:
        row = next((row for row, left in enumerate(room) if len(tree) <= left), len(room))
        if row == len(room):
            packed.append([])
            room.append(length)
        packed[row].append(tree)
        room[row] -= len(tree)
    return packed


def _empty(shape: tuple[int, int], pad: int, names: set[str]) -> TokenBatch:
    """Rows of padding."""
    return TokenBatch(
        tokens=torch.full(shape, pad),
        labels=torch.full(shape, pad),
        loss_mask=torch.zeros(shape),
        segment_ids=torch.full(shape, -1),
        position_ids=torch.zeros(shape, dtype=torch.int64),
        extras={name: torch.zeros(shape) for name in sorted({*names, BRANCH_MASK})},
        branch_ids=torch.zeros(shape, dtype=torch.int64),
        fork_columns=torch.zeros(shape, dtype=torch.int64),
    )


def _place(batch: TokenBatch, row: int, start: int, tokens: Sequence[int], segment: int, position: int) -> slice:
    """Write a trunk or a branch; returns the columns that predict its second to last tokens."""
    end = start + len(tokens)
    batch.tokens[row, start:end] = torch.as_tensor(tokens, dtype=torch.int64)
    batch.labels[row, start : end - 1] = batch.tokens[row, start + 1 : end]
    batch.segment_ids[row, start:end] = segment
    batch.position_ids[row, start:end] = torch.arange(position, position + len(tokens))
    return slice(start, end - 1)


def _fill(target: Tensor, row: int, predictions: slice, values: float | Sequence[float]) -> None:
    """Write one number, or those of the tokens from the second on, where the tokens are predicted."""
    values = torch.as_tensor(values, dtype=torch.float32)
    target[row, predictions] = values[1:] if values.dim() else values
