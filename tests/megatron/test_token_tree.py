"""Token trees against separate sequences: what each token sees, and Megatron's own model at every layout."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from dense_masks import document_mask, tree_mask
from small_recipe import small_recipe
from torchrun import run_ranks
from tree_worker import random_trees

from nemo_rmt.data.tree import pack_trees

WORKER = Path(__file__).with_name("tree_worker.py")
LAYOUTS = {
    "one_rank": {},
    "tp2_sp": {"tensor": 2, "sequence": True},
    "pp2": {"pipeline": 2},
    "tp2_pp2": {"tensor": 2, "pipeline": 2},
    "recompute": {"tensor": 2, "sequence": True, "recompute": "full"},
}


@pytest.mark.parametrize("seed", range(5))
def test_every_token_sees_what_it_would_see_in_a_sequence_of_its_own(seed):
    trees = random_trees(seed)
    batch = pack_trees(trees, sum(map(len, trees)), pad=0)
    mask = tree_mask(batch.segment_ids, batch.branch_ids, batch.fork_columns)[0, 0]
    column = 0
    for tree in trees:
        # the last token of a branch is a label only
        read = tree.trunk[: tree.trunk_columns]
        for prefix, tokens in [([], read), *((tree.trunk[: b.position], b.tokens[:-1]) for b in tree.branches)]:
            for index in range(len(tokens)):
                seen = mask[column].nonzero()[:, 0]
                assert batch.tokens[0, seen].tolist() == [*prefix, *tokens[: index + 1]]
                assert batch.position_ids[0, seen].tolist() == list(range(len(prefix) + index + 1))
                column += 1
    assert column == batch.tokens.shape[1]


def test_without_branches_the_mask_is_that_of_documents():
    segments = torch.tensor([[0, 0, 1, 1, 2, -1], [0, 1, 1, 1, -1, -1]])
    nothing = torch.zeros_like(segments)
    assert torch.equal(tree_mask(segments, nothing, nothing), document_mask(segments))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_logprobs_and_gradients_equal_separate_sequences(layout):
    parallel = LAYOUTS[layout]
    ranks = parallel.get("tensor", 1) * parallel.get("pipeline", 1)
    recipe = small_recipe("unused", parallel=parallel, cluster={"gpus_per_node": ranks})
    run_ranks(WORKER, ranks, recipe.model_dump_json())
