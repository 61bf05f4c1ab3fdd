"""Assert on every rank that token trees give the log-probabilities and gradients of separate sequences.

usage: tree_worker.py RECIPE (as JSON)
"""

from __future__ import annotations

import random
import sys

import torch
import torch.distributed as dist

from nemo_rmt.config import Optim, Recipe
from nemo_rmt.data.batch import TokenBatch
from nemo_rmt.data.tree import Branch, TokenTree, pack_trees
from nemo_rmt.megatron.attention import dense_mask, row_structure
from nemo_rmt.megatron.head import TokenScores
from nemo_rmt.megatron.model import build_model
from nemo_rmt.megatron.runtime import distributed
from nemo_rmt.megatron.train_step import TrainedModel
from nemo_rmt.objectives import LossOutput, grpo_loss, ntp_loss

VOCAB, PAD, MULTIPLE = 300, 0, 8
SHORT = ((40, (0, 7, 7, 7, 25, 40)), (12, (5, 5)), (30, (1, 29, 29)), (25, ()))
LONG = ((210, (0, 20, 20, 150, 150, 210)), (64, (5, 60)), (190, (1, 1, 100)), (30, ()))
"""Trunks, most of which share a row, and where branches fork off them: at both ends too."""
TEMPERATURE = 0.8


def random_trees(seed: int = 0, shapes=SHORT, longest: int = 11) -> list[TokenTree]:
    """Trees of these shapes, with branches of one token and more."""
    rng = random.Random(seed)
    draw = lambda count: [rng.randrange(1, VOCAB) for _ in range(count)]  # noqa: E731
    trees = []
    for trunk, positions in shapes:
        branches = []
        for position in positions:
            size = rng.randrange(1, longest + 1)
            mask = [0.0] + [float(rng.random() < 0.8) for _ in range(size - 1)]
            branches.append(Branch(position, draw(size), mask, {"advantages": [rng.gauss(0, 1) for _ in range(size)]}))
        kept = [0.0 if index in positions else 1.0 for index in range(trunk)]
        trees.append(TokenTree(draw(trunk), branches, kept))
    return trees


def separate_sequences(trees: list[TokenTree]) -> TokenBatch:
    """A row for every trunk and, with its prefix copied, every branch, in the trees' order; the same two losses.

    The whole of a branch's row is a branch, so that it has the branches' temperature.
    """
    examples, kinds, advantages = [], [], []
    for tree in trees:
        examples.append((tree.trunk, tree.mask))
        kinds.append(0.0)
        advantages.append([0.0] * len(tree.trunk))
        for branch in tree.branches:
            prefix = [0.0] * branch.position
            tokens, mask = [*tree.trunk[: branch.position], *branch.tokens], [*prefix, *branch.mask]
            examples.append((tokens, mask) if len(tokens) > 1 else ([*tokens, PAD], [0.0, 0.0]))
            kinds.append(1.0)
            advantages.append([*prefix, *branch.extras["advantages"]])
    batch = TokenBatch.from_examples(examples, PAD, None, MULTIPLE)
    kind = torch.tensor(kinds)[:, None]
    batch.branch_ids = kind.long().expand_as(batch.tokens)
    batch.fork_columns = torch.zeros_like(batch.tokens)
    batch.extras["branch_mask"] = batch.loss_mask * kind
    batch.extras["advantages"] = torch.zeros_like(batch.loss_mask)
    batch.loss_mask = batch.loss_mask * (1 - kind)
    for row, values in enumerate(advantages):
        batch.extras["advantages"][row, : len(values) - 1] = torch.tensor(values[1:])
    return batch


def dual_loss(scores: TokenScores, batch: TokenBatch) -> LossOutput:
    """Policy gradient on the branches and next-token prediction on the trunks."""
    extras, logprobs = batch.extras, scores.logprobs
    rl = grpo_loss(logprobs, logprobs.detach(), extras["advantages"], extras["branch_mask"])
    ntp = ntp_loss(logprobs, batch.loss_mask)
    return LossOutput(rl.loss_sum + 0.3 * ntp.loss_sum, rl.num_tokens + ntp.num_tokens, {"rl": rl.metrics["loss"]})


def counted(logprobs: torch.Tensor, batch: TokenBatch) -> torch.Tensor:
    """The log-probabilities that count, row after row: a tree's trunk and branches come in the order of the rows."""
    return logprobs[(batch.loss_mask + batch.extras["branch_mask"]) > 0]


def fresh(recipe: Recipe) -> TrainedModel:
    """A model that does not clip, always with the same weights."""
    torch.manual_seed(5)
    chunks = build_model(recipe.model, recipe.parallel, VOCAB)
    return TrainedModel(chunks, recipe.model, recipe.parallel, Optim(lr=1e-3, clip_grad=0), steps=2)


def skipped(batch: TokenBatch) -> int:
    """How many pairs of a block of 128 tokens and an earlier one share no row in which one sees the other."""
    visible = dense_mask(row_structure(batch.segment_ids, batch.branch_ids, batch.fork_columns)).any(0)[0]
    blocks = [[part.any() for part in rows.split(128, 1)] for rows in visible.split(128)]
    return sum(not blocks[row][column] for row in range(len(blocks)) for column in range(row))


def check(recipe: Recipe, trees: list[TokenTree], length: int) -> None:
    """Scores first, then one step of each; gradients of this rank's own parameters."""
    packed, separate = pack_trees(trees, length, PAD, MULTIPLE), separate_sequences(trees)
    # Rows end in padding: their length is no multiple of what sequence parallelism needs.
    assert len(packed.tokens) == 2 and packed.tokens.shape[1] > length and packed.segment_ids.max() == 2
    rows = len(separate.tokens) // 3
    model, twin = fresh(recipe), fresh(recipe)
    at = {"temperature": TEMPERATURE}
    scores = model.score(packed, 1, **at), twin.score(separate, rows, **at)
    if scores[0] is not None:
        expected = counted(scores[1].logprobs, separate)
        torch.testing.assert_close(counted(scores[0].logprobs, packed), expected, rtol=0, atol=1e-5)
    flat = pack_trees(trees, length, PAD, MULTIPLE)
    flat.branch_ids = flat.fork_columns = None
    unstructured = model.score(flat, 1, **at)
    if unstructured is not None:  # the comparison notices when branches see each other
        assert (counted(unstructured.logprobs, flat) - expected).abs().max() > 1e-2

    found = model.train_step(packed.micro_batches(1), dual_loss, **at)
    reference = twin.train_step(separate.micro_batches(rows), dual_loss, **at)
    for name in ("rl", "grad_norm"):
        assert abs(found[name] - reference[name]) <= 1e-5 * abs(reference[name]), (name, found, reference)
    for chunk, other in zip(model.modules, twin.modules, strict=True):
        theirs = dict(other.named_parameters())
        for name, parameter in chunk.named_parameters():
            gradient, expected = parameter.main_grad, theirs[name].main_grad
            assert expected.norm() > 0, name
            error = (gradient - expected).norm() / expected.norm()
            assert error < 1e-4, f"{name}: gradients differ by {error:.1e} of their norm"


if __name__ == "__main__":
    recipe = Recipe.model_validate_json(sys.argv[1])
    with distributed(recipe.parallel, seed=5):
        check(recipe, random_trees(), 101)
        large = random_trees(shapes=LONG, longest=80)
        assert all(skipped(row) >= 3 for row in pack_trees(large, 517, PAD).micro_batches(1))
        check(recipe, large, 517)
        dist.barrier()
