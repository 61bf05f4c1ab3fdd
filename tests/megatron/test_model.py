"""The model against arithmetic, and against the same architecture written in plain torch."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from dense_masks import document_mask
from tiny_model import VOCAB, random_batch, tiny_recipe, world

from nemo_rmt.config import Model
from nemo_rmt.errors import UserError
from nemo_rmt.megatron.model import VOCAB_MULTIPLE, build_model

OPTIONS = [
    {},
    {"qk_norm": True, "qkv_bias": True},
    {"tie_embeddings": False, "qkv_bias": True, "num_query_groups": 4},
    {"head_dim": 24, "qk_norm": True, "num_query_groups": 1, "rope_base": 500.0, "norm_epsilon": 1e-3},
]


@pytest.fixture(scope="module", autouse=True)
def alone():
    with world():
        yield


def built(options: dict, seed: int = 1):
    """The recipe's model section and a model with weights large enough for every option to matter."""
    recipe = tiny_recipe(model=options)
    torch.manual_seed(seed)
    (model,) = build_model(recipe.model, recipe.parallel, VOCAB)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn_like(parameter)
            parameter.copy_((1 + 0.3 * noise if "norm" in name else 0.2 * noise).to(parameter.dtype))
    return recipe.model, model


def shapes(settings: Model) -> dict[str, tuple[int, ...]]:
    """Every parameter by arithmetic, under Megatron's names."""
    hidden, inner, vocab = settings.hidden_size, settings.ffn_hidden_size, 384
    head = settings.head_dim or hidden // settings.num_attention_heads
    heads, groups = settings.num_attention_heads, settings.num_query_groups
    found = {"embedding.word_embeddings.weight": (vocab, hidden), "decoder.final_layernorm.weight": (hidden,)}
    for layer in range(settings.num_layers):
        own = {
            "input_layernorm.weight": (hidden,),
            "self_attention.linear_qkv.weight": ((heads + 2 * groups) * head, hidden),
            "self_attention.linear_proj.weight": (hidden, heads * head),
            "pre_mlp_layernorm.weight": (hidden,),
            "mlp.linear_fc1.weight": (2 * inner, hidden),
            "mlp.linear_fc2.weight": (hidden, inner),
        }
        if settings.qkv_bias:
            own["self_attention.linear_qkv.bias"] = ((heads + 2 * groups) * head,)
        if settings.qk_norm:
            own |= {f"self_attention.{which}_layernorm.weight": (head,) for which in "qk"}
        found |= {f"decoder.layers.{layer}.{name}": shape for name, shape in own.items()}
    if not settings.tie_embeddings:
        found["output_layer.weight"] = (vocab, hidden)
    return found


@pytest.mark.parametrize("options", OPTIONS)
def test_the_parameters_are_those_of_the_architecture(options):
    settings, model = built(options)
    found = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    assert found == shapes(settings)
    assert VOCAB_MULTIPLE == 128
    assert sum(parameter.numel() for parameter in model.parameters()) == sum(map(math.prod, shapes(settings).values()))


def plain_logits(settings: Model, weights: dict[str, torch.Tensor], tokens, positions, visible) -> torch.Tensor:
    """Llama, Qwen2 and Qwen3's forward: ``[batch, sequence]`` tokens to ``[batch, sequence, vocabulary]`` logits."""
    heads, groups = settings.num_attention_heads, settings.num_query_groups
    size = settings.head_dim or settings.hidden_size // heads
    batch, sequence = tokens.shape

    def norm(x, weight):
        return x / (x.square().mean(-1, keepdim=True) + settings.norm_epsilon).sqrt() * weight

    frequencies = settings.rope_base ** (-torch.arange(0, size, 2) / size)
    angles = positions[..., None, None] * frequencies  # [batch, sequence, 1, size / 2]

    def rotate(x):
        first, second = x.chunk(2, dim=-1)
        cos, sin = angles.cos(), angles.sin()
        return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)

    x = weights["embedding.word_embeddings.weight"][tokens]
    for layer in range(settings.num_layers):
        own = {name.split(f"layers.{layer}.")[1]: w for name, w in weights.items() if f"layers.{layer}." in name}
        bias = own.get("self_attention.linear_qkv.bias")
        qkv = F.linear(norm(x, own["input_layernorm.weight"]), own["self_attention.linear_qkv.weight"], bias)
        # Megatron's order: for each group its query heads, then its key, then its value
        qkv = qkv.view(batch, sequence, groups, heads // groups + 2, size)
        query = qkv[:, :, :, :-2].reshape(batch, sequence, heads, size)
        key, value = qkv[:, :, :, -2], qkv[:, :, :, -1]
        if settings.qk_norm:
            query = norm(query, own["self_attention.q_layernorm.weight"])
            key = norm(key, own["self_attention.k_layernorm.weight"])
        query, key = rotate(query), rotate(key)
        key, value = (each.repeat_interleave(heads // groups, dim=2) for each in (key, value))
        scores = torch.einsum("bqhd,bkhd->bhqk", query, key) / math.sqrt(size)
        shares = scores.masked_fill(~visible, -math.inf).softmax(-1)
        mixed = torch.einsum("bhqk,bkhd->bqhd", shares, value).reshape(batch, sequence, heads * size)
        x = x + F.linear(mixed, own["self_attention.linear_proj.weight"])
        gate, up = F.linear(norm(x, own["pre_mlp_layernorm.weight"]), own["mlp.linear_fc1.weight"]).chunk(2, dim=-1)
        x = x + F.linear(F.silu(gate) * up, own["mlp.linear_fc2.weight"])
    output = "embedding.word_embeddings.weight" if settings.tie_embeddings else "output_layer.weight"
    return F.linear(norm(x, weights["decoder.final_layernorm.weight"]), weights[output])[..., :VOCAB]


@pytest.mark.parametrize("options", OPTIONS)
def test_scores_and_logits_equal_an_independent_implementation(options):
    settings, model = built(options)
    batch = random_batch(3, sequence=20)
    batch.position_ids = batch.position_ids + torch.tensor([[0], [7], [30]])  # any positions, not only from 0
    visible = document_mask(batch.segment_ids)
    weights = {name: value.detach().double() for name, value in model.named_parameters()}
    expected = plain_logits(settings, weights, batch.tokens, batch.position_ids, visible)
    with torch.no_grad():
        scores = model(batch.tokens, batch.position_ids, visible, batch.labels, with_entropy=True)
        logits = model(batch.tokens, batch.position_ids, visible)
    logprobs = expected.log_softmax(-1)
    close = {"rtol": 0, "atol": 1e-5}
    torch.testing.assert_close(scores.logprobs.double(), logprobs.gather(2, batch.labels[..., None])[..., 0], **close)
    torch.testing.assert_close(scores.entropy.double(), -(logprobs.exp() * logprobs).sum(-1), **close)
    assert torch.equal(scores.hits.bool(), logprobs.argmax(-1) == batch.labels)
    torch.testing.assert_close(logits.double(), expected[:, -1], **close)


def test_no_mask_means_causal_attention():
    _, model = built({})
    batch = random_batch(2)
    causal = document_mask(torch.zeros_like(batch.tokens))
    with torch.no_grad():
        masked, unmasked = (model(batch.tokens, batch.position_ids, mask, batch.labels) for mask in (causal, None))
    torch.testing.assert_close(unmasked.logprobs, masked.logprobs, rtol=0, atol=1e-5)


def test_a_shift_of_all_positions_changes_nothing():
    _, model = built({})
    batch = random_batch(2)
    mask = document_mask(batch.segment_ids)
    with torch.no_grad():
        here, there = (model(batch.tokens, batch.position_ids + by, mask, batch.labels) for by in (0, 100))
    torch.testing.assert_close(there.logprobs, here.logprobs, rtol=0, atol=1e-4)


def test_bf16_is_close_to_fp32():
    settings, exact = built({"qk_norm": True})
    (rough,) = build_model(settings.model_copy(update={"precision": "bf16"}), tiny_recipe().parallel, VOCAB)
    rough.load_state_dict(exact.state_dict())
    assert {parameter.dtype for parameter in rough.parameters()} == {torch.bfloat16}
    batch = random_batch(4)
    mask = document_mask(batch.segment_ids)
    with torch.no_grad():
        expected, found = (m(batch.tokens, batch.position_ids, mask, batch.labels) for m in (exact, rough))
    assert found.logprobs.dtype == torch.float32
    difference = (found.logprobs - expected.logprobs).abs()
    assert 0 < difference.mean() < 0.05 and difference.max() < 0.5


def test_initial_weights_depend_on_the_seed_alone_and_have_the_asked_spread():
    recipe = tiny_recipe(model={"init_std": 0.05})
    models = []
    for seed in (3, 3, 4):
        torch.manual_seed(seed)
        models += build_model(recipe.model, recipe.parallel, VOCAB)
    same, again, other = (model.embedding.word_embeddings.weight for model in models)
    assert torch.equal(same, again) and not torch.equal(same, other)
    assert float(same.detach().std()) == pytest.approx(0.05, rel=0.05)


@pytest.mark.skipif(torch.cuda.is_available(), reason="refused for want of a GPU")
def test_transformer_engine_is_refused_without_a_gpu():
    recipe = tiny_recipe(model={"layers": "transformer_engine"})
    with pytest.raises(UserError, match="model.layers=transformer_engine needs a CUDA GPU.*set model.layers=local"):
        build_model(recipe.model, recipe.parallel, VOCAB)


def test_padding_sees_itself_only_and_no_query_sees_nothing():
    mask = document_mask(torch.tensor([[0, 0, 1, 1, -1, -1]]))[0, 0]
    assert mask.tolist() == [
        [True, False, False, False, False, False],
        [True, True, False, False, False, False],
        [False, False, True, False, False, False],
        [False, False, True, True, False, False],
        [False, False, False, False, True, False],
        [False, False, False, False, True, True],
    ]
