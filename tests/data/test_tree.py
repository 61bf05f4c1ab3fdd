"""Token trees packed into rows, against a packer in plain Python."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

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
    """What each token of a tree whose trunk begins in column ``start`` carries."""
    found = []
    parts = [(0, 0, tree.trunk, tree.mask or [1.0] * len(tree.trunk), {})]
    parts += [(branches_before + 1 + i, b.position, b.tokens, b.mask, b.extras) for i, b in enumerate(tree.branches)]
    for branch_id, position, tokens, mask, extras in parts:
        for index, token in enumerate(tokens):
            following = index + 1 if index + 1 < len(tokens) else None
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


def plain_rows(trees: list[TokenTree], length: int) -> list[list[dict]]:
    """First-fit."""
    rows: list[list[dict]] = []
    for tree in trees:
        row = next((row for row in rows if len(row) + len(tree) <= length), None)
        if row is None:
            rows.append(row := [])
        segment = row[-1]["segment_ids"] + 1 if row else 0
        row += cells(tree, len(row), segment, max((cell["branch_ids"] for cell in row), default=0))
    return rows


@given(st.lists(token_trees(), min_size=1, max_size=6), st.integers(0, 12), st.sampled_from([1, 4]), st.integers(1, 4))
def test_every_token_lies_where_a_plain_packer_puts_it(trees, spare, multiple, least):
    length = max(map(len, trees)) + spare
    batch, rows = pack_trees(trees, length, PAD, multiple, rows=least), plain_rows(trees, length)
    width = -(-length // multiple) * multiple
    padding = dict.fromkeys((*FIELDS, *batch.extras), 0) | {"tokens": PAD, "labels": PAD, "segment_ids": -1}
    rows += [[]] * (least - len(rows))
    for name in (*FIELDS, *batch.extras):
        tensor = batch.extras[name] if name in batch.extras else getattr(batch, name)
        expected = [[cell.get(name, 0) for cell in row] + [padding[name]] * (width - len(row)) for row in rows]
        assert tensor.tolist() == expected, name
        assert tensor.dtype == (torch.float32 if "mask" in name or name in batch.extras else torch.int64), name
    has_branches = any(tree.branches for tree in trees)
    assert set(batch.extras) == {"branch_mask", *(("advantages", "old_logprobs") if has_branches else ())}


def example() -> TokenTree:
    """Trunk 1 2 3 4; after 1 2 two branches, and one at the end; the trunk's 3 is not predicted."""
    instructed = Branch(2, [11, 12, 13], [0, 0, 1], {"advantages": 0.5})
    return TokenTree([1, 2, 3, 4], [instructed, Branch(2, [21, 22], [0, 1], {"advantages": -1.0}),
                                    Branch(4, [31, 32], [0, 1], {"advantages": 2.0})], [1, 1, 0, 1])  # fmt: skip


def test_an_example_by_hand():
    batch = pack_trees([example()], 12, PAD)
    assert batch.tokens.tolist() == [[1, 2, 3, 4, 11, 12, 13, 21, 22, 31, 32, PAD]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 2, 3, 4, 2, 3, 4, 5, 0]]
    assert batch.labels.tolist() == [[2, 3, 4, PAD, 12, 13, PAD, 22, PAD, 32, PAD, PAD]]
    assert batch.loss_mask.tolist() == [[1, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0]]
    assert batch.extras["branch_mask"].tolist() == [[0, 0, 0, 0, 0, 1, 0, 1, 0, 1, 0, 0]]
    assert batch.extras["advantages"].tolist() == [[0, 0, 0, 0, 0.5, 0.5, 0, -1, 0, 2, 0, 0]]
    assert batch.branch_ids.tolist() == [[0, 0, 0, 0, 1, 1, 1, 2, 2, 3, 3, 0]]
    assert batch.fork_columns.tolist() == [[0, 0, 0, 0, 2, 2, 2, 2, 2, 4, 4, 0]]
    assert batch.num_tokens() == 2


def test_rows_are_as_long_as_the_longest_tree_when_no_length_is_given():
    short = TokenTree([1, 2], [])
    assert pack_trees([short, example()], None, PAD, multiple=4).tokens.shape == (2, 12)


def test_trees_survive_micro_batches_selection_and_moves():
    batch = pack_trees([example(), TokenTree([5, 6, 7], []), example()], 11, PAD, rows=4)
    for part, rows in [*zip(batch.micro_batches(2), ([0, 1], [2, 3]), strict=True), (batch.select([2, 0]), [2, 0])]:
        for name in FIELDS:
            assert torch.equal(getattr(part.to("cpu"), name), getattr(batch, name)[rows])
        assert torch.equal(part.extras["branch_mask"], batch.extras["branch_mask"][rows])


def test_a_tree_that_does_not_fit_names_the_key_to_raise():
    with pytest.raises(UserError, match="a tree of 11 tokens .* 4 and 3 branches. does not fit into 10: raise rmt.seq"):
        pack_trees([TokenTree([1], []), example()], 10, PAD, key="rmt.sequence_length")


@given(token_trees(most_branches=8), st.integers(0, 8))
def test_the_parts_of_a_tree_train_the_same_and_fit(tree, spare):
    length = len(tree.trunk) + max((len(branch.tokens) for branch in tree.branches), default=0) + spare
    parts = split_tree(tree, length)
    assert all(len(part) <= length for part in parts)
    assert [id(branch) for part in parts for branch in part.branches] == [id(branch) for branch in tree.branches]
    assert (parts[0].trunk, parts[0].mask) == (tree.trunk, tree.mask)
    for part in parts[1:]:
        assert part.trunk == tree.trunk[: max(1, *(branch.position for branch in part.branches))]
        assert part.mask == [0.0] * len(part.trunk)
    for part, following in zip(parts, parts[1:], strict=False):  # no tree that has room is left
        branch = following.branches[0]
        trunk = max(len(part.trunk), branch.position)
        assert trunk + sum(len(each.tokens) for each in [*part.branches, branch]) > length


def test_a_tree_that_fits_is_not_split():
    tree = example()
    assert split_tree(tree, 11) == [tree] and split_tree(tree, 11)[0] is tree


def test_a_split_example_by_hand():
    first, second, third = split_tree(example(), 7, key="rmt.sequence_length")
    assert ([branch.tokens for branch in first.branches], first.mask) == ([[11, 12, 13]], [1, 1, 0, 1])
    assert (second.trunk, [branch.tokens for branch in second.branches]) == ([1, 2], [[21, 22]])
    assert (third.trunk, [branch.tokens for branch in third.branches]) == ([1, 2, 3, 4], [[31, 32]])
    at_the_beginning = TokenTree([1, 2], [Branch(0, [5, 6], [0, 1]) for _ in range(3)])
    assert [part.trunk for part in split_tree(at_the_beginning, 4)] == [[1, 2], [1], [1]]


def test_a_trunk_and_a_branch_that_do_not_fit_name_the_key_to_raise():
    with pytest.raises(
        UserError, match="a trunk of 4 tokens and a branch of 3 do not fit into 6: raise rmt.seq.* 7, or"
    ):
        split_tree(example(), 6, key="rmt.sequence_length")
    with pytest.raises(UserError, match="a trunk of 3 tokens"):
        split_tree(TokenTree([1, 2, 3], []), 2)


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
