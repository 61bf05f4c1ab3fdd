"""Token trees packed into rows, against a packer in plain Python."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nemo_rmt.data.batch import TokenBatch
from nemo_rmt.data.packing import balanced, first_fit_decreasing
from nemo_rmt.data.tree import Branch, TokenTree, pack_trees, split_tree
from nemo_rmt.errors import UserError

PAD = 99
FIELDS = ("tokens", "labels", "loss_mask", "segment_ids", "position_ids", "branch_ids", "fork_columns")


def lists(size: int, values) -> st.SearchStrategy:
    return st.lists(values, min_size=size, max_size=size)


@st.composite
def branches(draw, trunk: int) -> Branch:
    size = draw(st.integers(1, 4))
    old_logprobs = draw(lists(size, st.sampled_from([-3.0, -2.0])))
    extras = {"advantages": draw(st.sampled_from([-1.5, 0.5])), "old_logprobs": old_logprobs}
    mask = [0.0, *draw(lists(size - 1, st.sampled_from([0.0, 1.0])))]
    return Branch(draw(st.integers(0, trunk)), draw(lists(size, st.integers(0, 50))), mask, extras)


@st.composite
def token_trees(draw, most_branches: int = 3) -> TokenTree:
    trunk = draw(st.lists(st.integers(0, 50), min_size=1, max_size=6))
    mask = draw(st.none() | lists(len(trunk), st.sampled_from([0.0, 1.0])))
    return TokenTree(trunk, draw(st.lists(branches(len(trunk)), max_size=most_branches)), mask)


def cells(tree: TokenTree, start: int, segment: int, branches_before: int) -> list[dict]:
    """What each column of a tree whose trunk begins in column ``start`` carries."""
    at_the_end = any(branch.position == len(tree.trunk) for branch in tree.branches)
    found = []
    parts = [(0, 0, tree.trunk, tree.mask or [1.0] * len(tree.trunk), {})]
    parts += [(branches_before + 1 + i, b.position, b.tokens, b.mask, b.extras) for i, b in enumerate(tree.branches)]
    for branch_id, position, tokens, mask, extras in parts:
        for index, token in enumerate(tokens):
            following = index + 1 if index + 1 < len(tokens) else None
            if following is None and (branch_id or not at_the_end):
                continue  # nothing is predicted from it
            counts = 0.0 if following is None else mask[following]
            cell = {
                "tokens": token,
                "labels": PAD if following is None else tokens[following],
                "loss_mask": 0.0 if branch_id else counts,
                "branch_mask": counts if branch_id else 0.0,
                "segment_ids": segment,
                "position_ids": position + index,
                "branch_ids": branch_id,
                "fork_columns": start + position if branch_id else 0,
            }
            for name, values in extras.items():
                values = values if isinstance(values, list) else [values] * len(tokens)
                cell[name] = 0.0 if following is None else values[following]
            found.append(cell)
    return found


def plain_rows(members: list[list[TokenTree]]) -> list[list[dict]]:
    """What each column of rows of these trees carries."""
    rows = []
    for trees in members:
        row, forked = [], 0
        for segment, tree in enumerate(trees):
            row += cells(tree, len(row), segment, forked)
            forked += len(tree.branches)
        rows.append(row)
    return rows


def rows_of(trees: list[TokenTree], length: int, least: int) -> list[list[TokenTree]]:
    """As few rows as first-fit-decreasing finds or ``least``, about equally full if they can be."""
    lengths = [len(tree) for tree in trees]
    rows = first_fit_decreasing(lengths, length)
    rows += [[]] * (least - len(rows))
    even = balanced(lengths, len(rows))
    fit = all(sum(lengths[index] for index in row) <= length for row in even)
    return [[trees[index] for index in row] for row in (even if fit else rows)]


@given(st.lists(token_trees(), min_size=1, max_size=6), st.integers(0, 12), st.sampled_from([1, 4]), st.integers(1, 4))
def test_every_token_lies_where_a_plain_packer_puts_it(trees, spare, multiple, least):
    length = max(1, *map(len, trees)) + spare
    batch, rows = pack_trees(trees, length, PAD, multiple, rows=least), plain_rows(rows_of(trees, length, least))
    width = -(-length // multiple) * multiple
    padding = dict.fromkeys((*FIELDS, *batch.extras), 0) | {"tokens": PAD, "labels": PAD, "segment_ids": -1}
    has_branches = any(tree.branches for tree in trees)
    for name in (*FIELDS, *batch.extras):
        if name in ("branch_ids", "fork_columns") and not has_branches:
            assert getattr(batch, name) is None
            continue
        tensor = batch.extras[name] if name in batch.extras else getattr(batch, name)
        expected = [[cell.get(name, 0) for cell in row] + [padding[name]] * (width - len(row)) for row in rows]
        assert tensor.tolist() == expected, name
        assert tensor.dtype == (torch.float32 if "mask" in name or name in batch.extras else torch.int64), name
    assert set(batch.extras) == {"branch_mask", *(("advantages", "old_logprobs") if has_branches else ())}


def example() -> TokenTree:
    """Trunk 1 2 3 4; after 1 2 two branches, and one at the end; the trunk's 3 is not predicted."""
    instructed = Branch(2, [11, 12, 13], [0, 0, 1], {"advantages": 0.5})
    return TokenTree([1, 2, 3, 4], [instructed, Branch(2, [21, 22], [0, 1], {"advantages": -1.0}),
                                    Branch(4, [31, 32], [0, 1], {"advantages": 2.0})], [1, 1, 0, 1])  # fmt: skip


def test_an_example_by_hand():
    batch = pack_trees([example()], 9, PAD)
    assert batch.tokens.tolist() == [[1, 2, 3, 4, 11, 12, 21, 31, PAD]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 2, 3, 2, 4, 0]]
    assert batch.labels.tolist() == [[2, 3, 4, PAD, 12, 13, 22, 32, PAD]]
    assert batch.loss_mask.tolist() == [[1, 0, 1, 0, 0, 0, 0, 0, 0]]
    assert batch.extras["branch_mask"].tolist() == [[0, 0, 0, 0, 0, 1, 1, 1, 0]]
    assert batch.extras["advantages"].tolist() == [[0, 0, 0, 0, 0.5, 0.5, -1, 2, 0]]
    assert batch.branch_ids.tolist() == [[0, 0, 0, 0, 1, 1, 2, 3, 0]]
    assert batch.fork_columns.tolist() == [[0, 0, 0, 0, 2, 2, 2, 4, 0]]
    assert batch.num_tokens() == 2


def test_the_last_token_of_a_trunk_that_nothing_forks_behind_is_a_label_only():
    batch = pack_trees([TokenTree([1, 2, 3], [Branch(2, [7, 8], [0, 1])], [0, 0, 1])], None, PAD)
    assert batch.tokens.tolist() == [[1, 2, 7]] and batch.labels.tolist() == [[2, 3, 8]]
    assert batch.loss_mask.tolist() == [[0, 1, 0]] and batch.extras["branch_mask"].tolist() == [[0, 0, 1]]


@given(st.lists(st.lists(st.integers(0, 50), min_size=2, max_size=9), min_size=1, max_size=8))
def test_sequences_without_branches_are_rows_of_examples_put_together(sequences):
    masks = [[float(token % 2) for token in sequence] for sequence in sequences]
    packed = pack_trees([TokenTree(*pair[:1], [], pair[1]) for pair in zip(sequences, masks, strict=True)], 9, PAD)
    alone = TokenBatch.from_examples(list(zip(sequences, masks, strict=True)), PAD, 9)

    def told(batch: TokenBatch) -> list:
        """Of every sequence the columns, the shortest first."""
        found = []
        for row in range(len(batch.tokens)):
            for segment in range(int(batch.segment_ids[row].max()) + 1):
                own = batch.segment_ids[row] == segment
                fields = (batch.tokens, batch.labels, batch.loss_mask, batch.position_ids)
                found.append([tensor[row][own].tolist() for tensor in fields])
        return sorted(found)

    assert told(packed) == told(alone) and packed.branch_ids is None


@given(token_trees())
def test_a_trees_pairs_are_those_its_columns_see(tree):
    batch = pack_trees([tree], max(1, len(tree)), PAD)
    seen = batch.position_ids + 1  # a token sees all that precedes it in the sequence it stands for, and itself
    assert tree.attended == int(seen[batch.segment_ids == 0].sum())


def test_rows_are_as_long_as_the_longest_tree_when_no_length_is_given():
    short = TokenTree([1, 2], [])
    assert pack_trees([short, example()], None, PAD, multiple=4).tokens.shape == (2, 8)


def test_trees_survive_micro_batches_selection_and_moves():
    batch = pack_trees([example(), TokenTree([5, 6, 7], []), example()], 10, PAD, rows=4)
    for part, rows in [*zip(batch.micro_batches(2), ([0, 1], [2, 3]), strict=True), (batch.select([2, 0]), [2, 0])]:
        for name in FIELDS:
            assert torch.equal(getattr(part.to("cpu"), name), getattr(batch, name)[rows])
        assert torch.equal(part.extras["branch_mask"], batch.extras["branch_mask"][rows])


def test_a_tree_that_does_not_fit_names_the_key_to_raise():
    with pytest.raises(
        UserError, match="a tree of 11 tokens .* 4 and 3 branches. does not fit into 7: raise rmt.seq.* 8"
    ):
        pack_trees([TokenTree([1], []), example()], 7, PAD, key="rmt.sequence_length")


@given(token_trees(most_branches=8), st.integers(0, 8))
def test_the_parts_of_a_tree_train_the_same_and_fit(tree, spare):
    length = tree.trunk_columns + max((branch.columns for branch in tree.branches), default=0) + spare
    parts = split_tree(tree, length)
    assert all(len(part) <= length for part in parts)
    assert [id(branch) for part in parts for branch in part.branches] == [id(branch) for branch in tree.branches]
    assert (parts[0].trunk, parts[0].mask) == (tree.trunk, tree.mask)
    for part in parts[1:]:
        assert part.trunk == tree.trunk[: max(1, *(branch.position for branch in part.branches))]
        assert part.mask == [0.0] * len(part.trunk)
    for index, (part, following) in enumerate(zip(parts, parts[1:], strict=False)):  # no tree that has room is left
        branches = [*part.branches, following.branches[0]]
        trunk = max(0 if index else len(tree.trunk) - 1, *(branch.position for branch in branches))
        assert trunk + sum(branch.columns for branch in branches) > length


def test_a_tree_that_fits_is_not_split():
    tree = example()
    assert split_tree(tree, 8) == [tree] and split_tree(tree, 8)[0] is tree


def test_a_split_example_by_hand():
    first, second = split_tree(example(), 6, key="rmt.sequence_length")
    assert ([branch.tokens for branch in first.branches], first.mask) == ([[11, 12, 13], [21, 22]], [1, 1, 0, 1])
    assert (second.trunk, [branch.tokens for branch in second.branches]) == ([1, 2, 3, 4], [[31, 32]])
    assert second.mask == [0, 0, 0, 0]
    at_the_beginning = TokenTree([1, 2, 3], [Branch(0, [5, 6], [0, 1]) for _ in range(6)])
    assert [(part.trunk, len(part.branches)) for part in split_tree(at_the_beginning, 3)] == [
        ([1, 2, 3], 1), ([1], 3), ([1], 2)]  # fmt: skip


def test_a_trunk_and_a_branch_that_do_not_fit_name_the_key_to_raise():
    with pytest.raises(
        UserError, match="a trunk of 4 tokens and a branch of 3 do not fit into 5: raise rmt.seq.* 6, or"
    ):
        split_tree(example(), 5, key="rmt.sequence_length")
    with pytest.raises(UserError, match="a sequence of 4 tokens does not fit into 2: .* at least 3"):
        split_tree(TokenTree([1, 2, 3, 4], []), 2)


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: Branch(0, [], []), "a branch is 1 token or more"),
        (lambda: Branch(0, [1, 2], [0]), "as long a mask, got 2, 1"),
        (lambda: Branch(0, [1, 2], [1, 1]), "its mask must begin with 0"),
        (lambda: Branch(0, [1, 2], [0, 1], {"old": [1.0]}), "extras.'old'. of a branch of 2 tokens has 1 values"),
        (lambda: Branch(0, [1], [0], {"branch_mask": 1.0}), "is Branch.mask"),
        (lambda: TokenTree([], []), "a trunk is 1 token or more"),
        (lambda: TokenTree([1, 2], [], [1]), "got 2, 1"),
        (lambda: TokenTree([1, 2], [Branch(3, [1], [0])]), "forks at 3 of a trunk of 2"),
        (lambda: TokenTree([1, 2], [Branch(-1, [1], [0])]), "forks at -1"),
        (lambda: pack_trees([], 4, PAD), "no trees"),
        (lambda: pack_trees([example(), TokenTree([1], [Branch(0, [1], [0])])], 20, PAD), "the same extras"),
    ],
)
def test_fields_that_disagree_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
