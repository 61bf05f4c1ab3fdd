"""Which tensors each parameter holds, and which part of them each rank."""

from __future__ import annotations

import pytest
import torch
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec

from nemo_rmt.config import Model
from nemo_rmt.megatron.published import Published, counterparts, published_shapes

MODELS = {
    "before": Model(qk_norm=True),
    "biased": Model(qkv_bias=True),
    "after": Model(norm_position="after", qk_norm=True, qk_norm_span="all_heads"),
}


@pytest.mark.parametrize("name", MODELS)
def test_layers_of_transformer_engine_hold_the_same_tensors(name):
    ours = counterparts(MODELS[name], 300)
    engine = counterparts(MODELS[name].model_copy(update={"layers": "transformer_engine"}), 300)
    assert [entry.tensors for entry in ours] == [entry.tensors for entry in engine]
    # Megatron's own word on how the two kinds call the same parameter.
    renamed = get_gpt_layer_local_spec().submodules.sharded_state_dict_keys_map
    assert len(renamed) == 2
    expected = [entry.parameter for entry in ours]
    for before, after in renamed.items():
        expected = [parameter.replace(f".{before}", f".{after}") for parameter in expected]
    assert [entry.parameter for entry in engine] == expected
    assert (expected != [entry.parameter for entry in ours]) == (MODELS[name].norm_position == "before")


def test_the_output_is_published_unless_it_is_the_embedding():
    tied, untied = (published_shapes(Model(tie_embeddings=tie), 300) for tie in (True, False))
    assert untied == [*tied, ("lm_head.weight", torch.float32, (300, 128))]


@pytest.mark.parametrize("size", [1, 2, 4, 8])
def test_ranks_share_a_dimension_out_and_the_last_hold_padding(size):
    tensor = Published("embedding", (130, 8), split=0, padding=126)  # 256 rows: some ranks have padding alone
    whole = torch.arange(130 * 8).view(130, 8)
    parts = [whole[tensor.local_range(rank, size)] for rank in range(size)]
    assert torch.equal(torch.cat(parts), whole)
    assert all(len(part) == tensor.local_rows(size) == 256 // size for part in parts[: 130 // (256 // size)])
    columns = Published("projection", (8, 16), split=1)
    assert [columns.local_range(rank, size)[1] for rank in range(size)] == [
        slice(16 // size * rank, 16 // size * (rank + 1)) for rank in range(size)
    ]
    assert columns.local_rows(size) == 8


def test_queries_keys_and_values_take_turns_by_group():
    settings = Model(num_layers=1, hidden_size=8, num_attention_heads=4, num_query_groups=2, head_dim=8)
    (entry,) = (each for each in counterparts(settings, 300) if each.parameter.endswith("linear_qkv.weight"))
    # One row for each row of the parameter, that says whose it is: group, then q, k or v.
    parameter = torch.tensor([[group, part] for group in (0, 1) for part in (0, 0, 1, 2) for _ in range(8)])
    queries, keys, values = (part.flatten(0, 1) for part in entry.parts(parameter, tensor_size=1))
    assert queries.tolist() == [[group, 0] for group in (0, 1) for _ in range(16)]
    assert keys.tolist() == [[group, 1] for group in (0, 1) for _ in range(8)]
    assert values.tolist() == [[group, 2] for group in (0, 1) for _ in range(8)]
    (mine, *_) = entry.parts(parameter[32:], tensor_size=2)
    assert mine.flatten(0, 1).tolist() == [[1, 0]] * 16
