"""Token trees: a document and the responses that branch off it, laid out so that the document is computed once.

A row holds whole trees: the trunk's tokens, then each branch's. A branch sees its trunk before its fork and itself, at
the positions it would have as a sequence of its own, so that every log-probability and gradient is that of separate
sequences. ``megatron.attention.row_structure`` says who sees whom. A tree without branches is a plain sequence, so that
rows of trees are also what packs sequences.

What nothing is predicted from has no column: the last token of a branch, and that of a trunk unless a branch forks
behind it, are labels only, as in rows of plain sequences.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain, repeat

import numpy
import torch
from numpy.typing import DTypeLike, NDArray
from torch import Tensor

from nemo_rmt.data.batch import TokenBatch
from nemo_rmt.data.packing import balanced, first_fit_decreasing
from nemo_rmt.errors import UserError

BRANCH_MASK = "branch_mask"
"""The name in ``TokenBatch.extras`` of the branches' mask."""

Values = float | Sequence[float]
"""One number for all tokens, or one for each."""


@dataclass
class Branch:
    """An instruction and its response, read after ``trunk[:position]``. Raises ValueError when fields disagree."""

    position: int
    """How many tokens of the trunk it sees, 0 to all: it forks before the trunk's token of this index."""
    tokens: Sequence[int]
    """Instruction and response."""
    mask: Sequence[float]
    """As long as tokens: 1 for those to predict. The first would be predicted from the trunk: always 0."""
    extras: Mapping[str, Values] = field(default_factory=dict)
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

    @property
    def columns(self) -> int:
        """Columns it takes in a row."""
        return len(self.tokens) - 1


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

    @property
    def trunk_columns(self) -> int:
        """Columns the trunk takes in a row."""
        return max(len(self.trunk) - 1, max((branch.position for branch in self.branches), default=0))

    def __len__(self) -> int:
        """Columns it takes in a row."""
        return self.trunk_columns + sum(branch.columns for branch in self.branches)

    @property
    def num_tokens(self) -> int:
        """Tokens of the trunk and all branches."""
        return len(self.trunk) + sum(len(branch.tokens) for branch in self.branches)

    @property
    def attended(self) -> int:
        """Pairs of columns of which one attends to the other, each to itself included."""
        in_branches = sum(each.columns * (2 * each.position + each.columns + 1) for each in self.branches)
        return (self.trunk_columns * (self.trunk_columns + 1) + in_branches) // 2


def pack_trees(
    trees: Sequence[TokenTree],
    length: int | None,
    pad: int,
    multiple: int = 1,
    rows: int = 1,
    key: str = "sequence_length of this stage",
) -> TokenBatch:
    """Trees into as few rows as first-fit-decreasing finds, or ``rows`` if that is more.

    Where it can be, the rows are about equally full, so that little is left of their padding when they are narrowed; a
    row has its trees in their order. ``segment_ids`` counts the row's trees, ``branch_ids`` its branches from 1; where
    no tree has a branch, it and ``fork_columns`` are None.

    The two losses stay apart. ``loss_mask`` is next-token prediction's on the trunks, so that whatever trains on
    documents trains on trees unchanged; ``extras["branch_mask"]`` marks the branches' tokens, where their other extras
    count too. A mask or an extra of token t + 1 stands where that token is predicted, at t.

    length: most columns of a row, None for the longest tree's; the width is that, rounded up to ``multiple``. rows: at
    least as many, some of which may be padding only (every data-parallel rank needs as many micro-batches). key: the
    recipe key that bounds ``length``, for the message.
    Raises UserError for a tree longer than ``length``, ValueError for no trees or branches that carry different extras.
    """
    if not trees:
        raise ValueError("there are no trees to pack")
    lengths = [len(tree) for tree in trees]
    length = max(lengths) if length is None else length
    if max(lengths) > length:
        tree = trees[lengths.index(max(lengths))]
        raise UserError(
            f"a tree of {tree.num_tokens} tokens (a trunk of {len(tree.trunk)} and {len(tree.branches)} branches) does "
            f"not fit into {length}: raise {key} to at least {len(tree)}, or use fewer or shorter branches"
        )
    branches = [branch for tree in trees for branch in tree.branches]
    names = set(branches[0].extras) if branches else set()
    if any(set(branch.extras) != names for branch in branches):
        raise ValueError(f"all branches must carry the same extras; the first has {sorted(names)}")

    members = first_fit_decreasing(lengths, length)
    even = balanced(lengths, max(rows, len(members)))
    if all(sum(lengths[index] for index in row) <= length for row in even):
        members = even
    packed = [[trees[index] for index in row] for row in members]
    cells = _Cells(packed, (len(even), -(-length // multiple) * multiple))
    parts = [part for row in packed for tree in row for part in (tree, *tree.branches)]
    extras: dict[str, list[Values]] = {
        name: [part.extras[name] if isinstance(part, Branch) else 0.0 for part in parts] for name in names
    }
    extras[BRANCH_MASK] = [part.mask if isinstance(part, Branch) else 0.0 for part in parts]
    on_trunks = [0.0 if isinstance(part, Branch) else 1.0 if part.mask is None else part.mask for part in parts]
    return TokenBatch(
        tokens=cells.filled(cells.tokens, pad),
        labels=cells.filled(cells.following(cells.tokens, pad), pad),
        loss_mask=cells.predictions(on_trunks),
        segment_ids=cells.filled(cells.segments, -1),
        position_ids=cells.filled(cells.positions, 0),
        extras={name: cells.predictions(values) for name, values in sorted(extras.items())},
        branch_ids=cells.filled(cells.branches, 0) if branches else None,
        fork_columns=cells.filled(cells.forks, 0) if branches else None,
    )


def split_tree(tree: TokenTree, length: int, key: str = "sequence_length of this stage") -> list[TokenTree]:
    """A tree as several of at most ``length`` columns that train the same; one that fits is returned as it is.

    The branches keep their order. The first tree has the whole trunk and its mask; the others repeat as much of the
    trunk as their branches see, with a mask of zeros.
    key: the recipe key that bounds ``length``, for the message. Raises UserError when the trunk and one branch do not
    fit.
    """
    if len(tree) <= length:
        return [tree]
    longest = max(tree.branches, key=lambda branch: branch.columns, default=None)
    needed = tree.trunk_columns + (longest.columns if longest else 0)
    if needed > length:
        found = f"a sequence of {len(tree.trunk)} tokens does"
        if longest:
            found = f"a trunk of {len(tree.trunk)} tokens and a branch of {len(longest.tokens)} do"
        raise UserError(f"{found} not fit into {length}: raise {key} to at least {needed}, or use shorter ones")
    parts: list[list[Branch]] = [[]]
    seen, used = len(tree.trunk) - 1, 0  # columns of the last part's trunk and branches
    for branch in tree.branches:
        if max(seen, branch.position) + used + branch.columns > length:
            parts.append([])
            seen = used = 0
        seen, used = max(seen, branch.position), used + branch.columns
        parts[-1].append(branch)
    trees = [TokenTree(tree.trunk, parts[0], tree.mask)]
    for part in parts[1:]:
        seen = max(1, *(branch.position for branch in part))
        trees.append(TokenTree(tree.trunk[:seen], part, [0.0] * seen))
    return trees


class _Cells:
    """Where the tokens of packed trees lie in rows of this shape, and what each carries.

    Arrays have an entry for every token, those without a column included: row after row, tree after tree, each one's
    trunk and then its branches, its *parts*.
    """

    def __init__(self, packed: list[list[TokenTree]], shape: tuple[int, int]) -> None:
        parts: list[Sequence[int]] = []
        places = []  # of each part: columns, its first cell, and what is below by name
        for row, trees in enumerate(packed):
            column = forked = 0
            for segment, tree in enumerate(trees):
                start, columns = column, tree.trunk_columns
                parts.append(tree.trunk)
                places.append((columns, row * shape[1] + start, segment, 0, 0, 0))
                column += columns
                for forked, branch in enumerate(tree.branches, start=forked + 1):
                    fork = start + branch.position
                    parts.append(branch.tokens)
                    places.append((branch.columns, row * shape[1] + column, segment, branch.position, forked, fork))
                    column += branch.columns
        self.shape = shape
        self.sizes = numpy.array([len(part) for part in parts])
        self.last = self.sizes.cumsum() - 1
        self.tokens = self._flat(parts, numpy.int64)
        columns, first, self.segments, begins, self.branches, self.forks = numpy.repeat(places, self.sizes, axis=0).T
        inside = numpy.arange(len(self.tokens)) - numpy.repeat(self.last - self.sizes + 1, self.sizes)
        self.positions = begins + inside
        self.kept = inside < columns
        self.cells = (first + inside)[self.kept]

    def filled(self, values: NDArray, fill: float) -> Tensor:
        """Rows of the tokens' values, and ``fill`` where there is no token."""
        cells = numpy.full(self.shape, fill, values.dtype)
        cells.reshape(-1)[self.cells] = values[self.kept]
        return torch.from_numpy(cells)

    def following(self, values: NDArray, fill: float) -> NDArray:
        """For each token the value of the one after it; ``fill`` for the last of a part."""
        shifted = numpy.roll(values, -1)
        shifted[self.last] = fill
        return shifted

    def predictions(self, values: Iterable[Values]) -> Tensor:
        """Rows of the parts' values where the tokens they belong to are predicted, 0 elsewhere."""
        pairs = zip(values, self.sizes.tolist(), strict=True)
        each = [repeat(value, size) if isinstance(value, (int, float)) else value for value, size in pairs]
        return self.filled(self.following(self._flat(each, numpy.float32), 0.0), 0.0)

    def _flat(self, parts: Iterable[Iterable[float]], dtype: DTypeLike) -> NDArray:
        """The parts' values, joined."""
        return numpy.fromiter(chain.from_iterable(parts), dtype, int(self.last[-1]) + 1)
