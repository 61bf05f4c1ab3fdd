"""Token batches: every label under the token before it, nothing counted that cannot be predicted."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nemo_rmt.data.batch import TokenBatch
from nemo_rmt.errors import UserError

EOD = 0


def test_documents_become_segments_that_end_with_their_eod():
    batch = TokenBatch.from_documents(torch.tensor([[5, 6, EOD, 7, EOD, EOD, 8, 9]]), EOD, document_attention=True)
    assert batch.tokens.tolist() == [[5, 6, EOD, 7, EOD, EOD, 8]]
    assert batch.labels.tolist() == [[6, EOD, 7, EOD, EOD, 8, 9]]
    assert batch.segment_ids.tolist() == [[0, 0, 0, 1, 1, 2, 3]]
    assert batch.loss_mask.tolist() == [[1, 1, 0, 1, 0, 0, 1]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 4, 5, 6]]
    assert batch.num_tokens() == 4


def test_without_document_attention_a_row_is_one_segment_and_all_counts():
    batch = TokenBatch.from_documents(torch.tensor([[5, EOD, 6, EOD]]), EOD, document_attention=False)
    assert batch.segment_ids.tolist() == [[0, 0, 0]]
    assert batch.loss_mask.tolist() == [[1, 1, 1]]


@given(st.lists(st.lists(st.integers(0, 3), min_size=6, max_size=6), min_size=1, max_size=4))
def test_no_counted_label_lies_in_another_segment(rows):
    tokens = torch.tensor(rows)
    batch = TokenBatch.from_documents(tokens, EOD, document_attention=True)
    following = TokenBatch.from_documents(torch.cat((tokens, tokens[:, :1]), 1), EOD, True).segment_ids[:, 1:]
    assert torch.equal(batch.loss_mask == 1, batch.segment_ids == following)


def test_an_examples_mask_moves_to_where_its_token_is_predicted():
    batch = TokenBatch.from_examples([([1, 2, 3, 4], [0, 0, 1, 0.5]), ([5, 6], [0, 1])], pad=9, length=None)
    assert batch.tokens.tolist() == [[1, 2, 3], [5, 9, 9]]
    assert batch.labels.tolist() == [[2, 3, 4], [6, 9, 9]]
    assert batch.loss_mask.tolist() == [[0, 1, 0.5], [1, 0, 0]]
    assert batch.segment_ids.tolist() == [[0, 0, 0], [0, -1, -1]]
    assert batch.num_tokens() == 3


@pytest.mark.parametrize("length, multiple, width", [(None, 1, 3), (None, 4, 4), (3, 1, 3), (5, 1, 5), (5, 4, 8)])
def test_rows_have_the_asked_width(length, multiple, width):
    batch = TokenBatch.from_examples([([1, 2, 3, 4], [0, 1, 1, 1])], pad=9, length=length, multiple=multiple)
    tensors = (batch.tokens, batch.labels, batch.loss_mask, batch.segment_ids, batch.position_ids)
    assert [tuple(tensor.shape) for tensor in tensors] == [(1, width)] * 5
    assert [tensor.dtype for tensor in tensors] == [torch.int64, torch.int64, torch.float32, torch.int64, torch.int64]


def test_a_too_long_example_names_the_key_to_raise():
    with pytest.raises(UserError, match="5 tokens does not fit into 3: raise sft.sequence_length to at least 4"):
        TokenBatch.from_examples([([1] * 5, [1] * 5)], pad=9, length=3, key="sft.sequence_length")


@pytest.mark.parametrize("example", [([1], [1]), ([1, 2], [1])])
def test_an_example_that_predicts_nothing_is_refused(example):
    with pytest.raises(ValueError, match="an example is 2 tokens or more"):
        TokenBatch.from_examples([example], pad=9, length=None)


def test_rows_travel_with_their_extras():
    batch = TokenBatch.from_documents(torch.arange(1, 25).view(4, 6), EOD, True)
    batch.extras["advantages"] = batch.tokens.float() * 2
    parts = batch.micro_batches(2)
    assert torch.equal(torch.cat([part.tokens for part in parts]), batch.tokens)
    for part in [*parts, batch.select([3, 0]), batch.select(torch.tensor([1]))]:
        assert torch.equal(part.extras["advantages"], part.tokens.float() * 2)
    assert torch.equal(batch.select([3, 0]).labels, batch.labels[[3, 0]])
    with pytest.raises(ValueError, match="4 rows do not divide into micro-batches of 3"):
        batch.micro_batches(3)
