"""FLOPs of training on a token, against the sum over a model's matrix products."""

from __future__ import annotations

import pytest

from nemo_rmt.config import Model
from nemo_rmt.model_flops import forward_flops, training_flops

SHAPE = dict(num_layers=3, hidden_size=64, num_attention_heads=4, num_query_groups=2, ffn_hidden_size=96)


@pytest.mark.parametrize("head_dim", [16, 32])
@pytest.mark.parametrize("tied", [True, False])
def test_training_takes_6_flops_a_weight_of_a_product_and_12_lhqt_for_attention(head_dim, tied):
    model, vocabulary, context = Model(**SHAPE, head_dim=head_dim, tie_embeddings=tied), 1000, 128
    products = [
        (64, 4 * head_dim),  # queries
        (64, 2 * head_dim),  # keys
        (64, 2 * head_dim),  # values
        (4 * head_dim, 64),  # output
        (64, 96),  # gate
        (64, 96),  # up
        (96, 64),  # down
    ]
    weights = 3 * sum(rows * columns for rows, columns in products) + 64 * vocabulary
    attention = 12 * 3 * 4 * head_dim * context
    assert training_flops(model, vocabulary, context) == 6 * weights + attention


def test_the_backward_takes_twice_the_forward():
    model = Model(**SHAPE)
    assert training_flops(model, 1000, 128) == 3 * sum(forward_flops(model, 1000, 128))
