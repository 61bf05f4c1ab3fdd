"""Attention of structured rows, block by block and by flex_attention, against one dense mask."""

from __future__ import annotations

import math
from unittest import mock

import pytest
import torch
from dense_masks import tree_mask
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_model import random_batch, tiny_recipe, trained, world
from torch import Tensor
from torch.nn.attention import flex_attention
from tree_worker import LONG, dual_loss, random_trees

from nemo_rmt.config import Optim
from nemo_rmt.data.batch import TokenBatch
from nemo_rmt.data.tree import Branch, TokenTree, pack_trees
from nemo_rmt.megatron import attention, train_step
from nemo_rmt.megatron.attention import QUERY_BLOCK, dense_mask, row_structure, structured_attention


def structure_of(batch: TokenBatch) -> Tensor:
    return row_structure(batch.segment_ids, batch.branch_ids, batch.fork_columns)


@st.composite
def structures(draw, longest: int = 3 * QUERY_BLOCK + 40) -> Tensor:
    """Rows of trees, or of documents without branches, with and without padding at their ends."""
    length = draw(st.integers(QUERY_BLOCK // 2, longest))
    random = draw(st.randoms(use_true_random=False))
    if draw(st.booleans()):
        starts = torch.tensor([[random.random() < 0.02 for _ in range(length)] for _ in range(2)])
        return row_structure(starts.cumsum(1))
    trees, room = [], random.randint(length, 3 * length)
    while room > 0 and len(trees) < 30:
        trunk = random.randint(1, length - length // 3)
        branches, left = [], random.randint(0, length - trunk)
        while left > 0:
            size = random.randint(1, left)
            branches.append(Branch(random.randint(0, trunk), [1] * size, [0.0] * size))
            left -= size
        trees.append(TokenTree([1] * trunk, branches))
        room -= len(trees[-1])
    return structure_of(pack_trees(trees, length, pad=0))


def heads(structure: Tensor, count: int, groups: int, dim: int = 8) -> tuple[Tensor, Tensor, Tensor]:
    """Random query, key and value, with gradient."""
    batch, _, length = structure.shape
    generator = torch.Generator().manual_seed(length)
    shapes = [(batch, number, length, dim) for number in (count, groups, groups)]
    return tuple(torch.randn(shape, generator=generator).requires_grad_() for shape in shapes)


def densely(query: Tensor, key: Tensor, value: Tensor, structure: Tensor, scale: float | None = None) -> Tensor:
    """The formula, over all keys."""
    key, value = (tensor.repeat_interleave(query.shape[1] // key.shape[1], 1) for tensor in (key, value))
    scores = query @ key.transpose(2, 3) * (scale or 1 / math.sqrt(query.shape[3]))
    return scores.masked_fill(~dense_mask(structure), -math.inf).softmax(-1) @ value


@settings(max_examples=40, deadline=None)
@given(structures(), st.sampled_from([(4, 2), (3, 1), (2, 2)]), st.sampled_from([None, 0.5]))
def test_attention_in_blocks_equals_attention_under_a_dense_mask(structure, counts, scale):
    tensors = heads(structure, *counts)
    outputs = [attend(*tensors, structure, scale) for attend in (structured_attention, densely)]
    upstream = torch.randn(outputs[0].shape, generator=torch.Generator().manual_seed(0))
    found, expected = (torch.autograd.grad(output, tensors, upstream) for output in outputs)
    torch.testing.assert_close(outputs[0], outputs[1], rtol=0, atol=1e-5)
    # all three together: where every token sees itself alone, queries and keys have no gradient to compare with
    size = torch.stack([theirs.norm() for theirs in expected]).norm()
    for ours, theirs in zip(found, expected, strict=True):
        assert (ours - theirs).norm() <= 1e-5 * size


def test_keys_that_no_query_of_a_block_sees_are_not_touched():
    one = QUERY_BLOCK
    longer = [1] * (one + 1)  # the last token is a label only
    tree = TokenTree(longer, [Branch(one // 2, longer, [0.0] * len(longer)) for _ in range(3)])
    structure = structure_of(pack_trees([tree], None, pad=0))
    query, key, value = (tensor.detach() for tensor in heads(structure, 2, 2))
    for tensor in (key, value):
        tensor[:, :, one // 2 : one] = math.nan  # the trunk after the forks
        tensor[:, :, 2 * one : 3 * one] = math.nan  # the second branch
    broken = structured_attention(query, key, value, structure).isnan().any(-1)[0, 0]
    blocks = [part.any().item() for part in broken.split(one)]
    assert blocks == [True, False, True, False]


def test_a_row_of_one_block_takes_one_kernel():
    structure = row_structure(torch.zeros(3, QUERY_BLOCK, dtype=torch.long))
    with mock.patch.object(
        attention.F, "scaled_dot_product_attention", wraps=attention.F.scaled_dot_product_attention
    ) as kernel:
        structured_attention(*heads(structure, 2, 1), structure)
    assert kernel.call_count == 1


@pytest.mark.parametrize("sequence", [24, QUERY_BLOCK + 24])
def test_the_layers_of_a_forward_share_what_follows_from_the_structure(sequence):
    with world(), mock.patch.object(attention, "dense_mask", wraps=dense_mask) as derived:
        trained(tiny_recipe()).score(random_batch(2, sequence), 2)
    assert derived.call_count == math.ceil(sequence / QUERY_BLOCK)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@settings(max_examples=5, deadline=None)
@given(structures())
def test_flex_attention_has_the_structure_too(structure):
    batch, _, length = structure.shape
    visible = dense_mask(structure)
    sees = attention.visibility(structure)
    assert torch.equal(flex_attention.create_mask(sees, batch, None, length, length, device="cpu"), visible)
    query, key, value = (tensor.detach() for tensor in heads(structure, 4, 2, dim=16))
    # Not compiled, which would take a minute on a CPU.
    compiled = mock.patch.object(attention, "_compiled", lambda: flex_attention.flex_attention)
    with compiled, torch._dynamo.config.patch(disable=False):
        found = attention._attend_by_flex(query, key, value, structure, 0.3)
    torch.testing.assert_close(found, densely(query, key, value, structure, 0.3), rtol=0, atol=1e-5)
    blocks = structure.derived.to_dense()[0, 0].bool()
    expected = [[part.any().item() for part in rows.split(QUERY_BLOCK, 1)] for rows in visible[0, 0].split(QUERY_BLOCK)]
    assert blocks.tolist() == expected


def scores_and_gradients() -> tuple[Tensor, dict[str, Tensor]]:
    """Of long trees, under a model whose heads are as small as flex_attention takes them."""
    recipe = tiny_recipe(model={"hidden_size": 64, "max_position": 512})
    batch = pack_trees(random_trees(shapes=LONG, longest=80), 517, pad=0).to(torch.cuda.current_device())
    model = trained(recipe, Optim(lr=1e-2, clip_grad=0))
    logprobs = model.score(batch, 2).logprobs
    model.train_step(batch.micro_batches(1), dual_loss)
    return logprobs, {name: value.main_grad.clone() for name, value in model.modules[0].named_parameters()}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU on this machine")
def test_flex_attention_in_the_model_equals_a_dense_mask(monkeypatch):
    monkeypatch.delenv("TORCH_COMPILE_DISABLE", raising=False)
    flex = mock.patch.object(attention, "_attend_by_flex", wraps=attention._attend_by_flex)
    with world(), torch._dynamo.config.patch(disable=False), flex as used:
        logprobs, gradients = scores_and_gradients()
        assert used.call_count == 2 * 3  # two layers, one batch to score and two to train on
        monkeypatch.setattr(train_step, "row_structure", tree_mask)
        expected, expected_gradients = scores_and_gradients()
        assert used.call_count == 2 * 3
    torch.testing.assert_close(logprobs, expected, rtol=0, atol=1e-5)
    for name, value in expected_gradients.items():
        assert (gradients[name] - value).norm() <= 1e-4 * value.norm(), name
