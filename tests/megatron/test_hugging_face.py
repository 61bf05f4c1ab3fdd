"""Published architectures against transformers' own, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from published_worker import PROMPTS, rows
from small_recipe import small_recipe
from torchrun import run_ranks

from nemo_rmt import config
from nemo_rmt.compatibility import require_compatible
from nemo_rmt.data.tokenizer import Tokenizer, train_tokenizer
from nemo_rmt.errors import UserError
from nemo_rmt.manifest import inspect_checkpoint
from nemo_rmt.megatron.checkpoint import load_weights
from nemo_rmt.megatron.hugging_face import import_checkpoint, model_from_config
from nemo_rmt.megatron.model import build_model
from nemo_rmt.megatron.runtime import distributed
from nemo_rmt.stages.job import StageJob
from nemo_rmt.stages.training import Training
from nemo_rmt.tracking import read_metrics

transformers = pytest.importorskip("transformers", reason="transformers is not installed")

HERE = Path(__file__).parent
ROWS = 320
"""Tokens of the published models: more than the tokenizer has."""
SIZES = {
    "vocab_size": ROWS,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
FAMILIES = {
    "olmo2": ("Olmo2", {"rms_norm_eps": 1e-3, "rope_theta": 500.0}),
    "olmo2_mha": ("Olmo2", {"num_key_value_heads": 4, "tie_word_embeddings": True}),
    "smollm3": ("SmolLM3", {"no_rope_layer_interval": 2}),
    "qwen3": ("Qwen3", {"head_dim": 24, "tie_word_embeddings": False}),
    "qwen2": ("Qwen2", {"tie_word_embeddings": True, "rms_norm_eps": 1e-5}),
    "llama": ("Llama", {"rope_theta": 500.0}),
}
LAYOUTS = {
    "one_rank": ({}, "none"),
    "tp2_sp": ({"tensor": 2, "sequence": True}, "one_rank"),
    "pp2": ({"pipeline": 2}, "tp2_sp"),
    "pp2_vpp2": ({"pipeline": 2, "virtual_pipeline": 2}, "pp2"),
}


def published(family: str):
    """A model with weights large enough for every part to matter; norm weights near 1."""
    name, keys = FAMILIES[family]
    torch.manual_seed(1)
    settings = getattr(transformers, f"{name}Config")(**{**SIZES, **keys})
    model = getattr(transformers, f"{name}ForCausalLM")(settings).eval()
    with torch.no_grad():
        for weight_name, weight in model.named_parameters():
            noise = torch.randn_like(weight)
            weight.copy_(1 + 0.3 * noise if "norm" in weight_name else 0.15 * noise)
    return model


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(["1+2=3; 4*5=20. A few words."] * 50, config.Tokenizer(vocab_size=300), folder)
    return folder


@pytest.fixture(scope="session")
def models(tmp_path_factory, tokenizer) -> dict[str, Path]:
    """A folder for each family: the published model, and the checkpoint made of it."""
    folders = {}
    for family in FAMILIES:
        folders[family] = folder = tmp_path_factory.mktemp(family)
        published(family).save_pretrained(folder / "published")
        Tokenizer.load(tokenizer).save(folder / "published")
        import_checkpoint(folder / "published", folder / "checkpoint", "fp32")
    return folders


@pytest.fixture(scope="session")
def measured(models) -> dict[str, dict[str, dict]]:
    """What came out of each layout, by family."""
    found = {}
    for layout, (keys, earlier) in LAYOUTS.items():
        parallel = config.Parallel(**keys)
        ranks = parallel.tensor * parallel.pipeline
        folders = map(str, models.values())
        run_ranks(HERE / "published_worker.py", ranks, layout, parallel.model_dump_json(), earlier, *folders)
        found[layout] = {family: json.loads((models[family] / f"{layout}.json").read_text()) for family in FAMILIES}
    return found


cases = pytest.mark.parametrize(("layout", "family"), [(layout, family) for layout in LAYOUTS for family in FAMILIES])


@cases
def test_logprobs_loss_and_gradient_norm_equal_transformers(measured, layout, family):
    model, batch, found = published(family), rows(), measured[layout][family]
    logprobs = model(batch.tokens).logits.log_softmax(-1).gather(2, batch.labels[..., None])[..., 0]
    (-logprobs.mean()).backward()
    gradient = torch.stack([weight.grad.norm() for weight in model.parameters()]).norm()
    torch.testing.assert_close(torch.tensor(found["logprobs"]), logprobs.detach(), rtol=0, atol=1e-5)
    assert found["steps"][0] == pytest.approx([-logprobs.mean().item(), gradient.item()], rel=1e-5)


@cases
@torch.no_grad()
def test_greedy_sampling_with_the_cache_follows_transformers_without_one(measured, layout, family):
    model, found = published(family), measured[layout][family]
    for prompt, tokens, logprobs in zip(PROMPTS, found["tokens"], found["sampled"], strict=True):
        sequence = torch.tensor([prompt + tokens])
        expected = model(sequence, use_cache=False).logits[0, len(prompt) - 1 : -1].log_softmax(-1).max(-1)
        assert tokens == expected.indices.tolist()
        assert logprobs == pytest.approx(expected.values.tolist(), abs=1e-4)


@pytest.mark.parametrize("layout", [layout for layout in LAYOUTS if layout != "one_rank"])
def test_training_goes_on_from_another_layouts_checkpoint_as_on_one_rank(measured, layout):
    for family in FAMILIES:
        expected, found = measured["one_rank"][family]["steps"], measured[layout][family]
        assert expected[0] != pytest.approx(expected[1], rel=1e-3)
        assert found["steps"][1] == pytest.approx(expected[1], rel=1e-4), family
        assert found["resumed"] == pytest.approx(expected[1], rel=1e-4), family


def test_imported_weights_train_in_a_stage_with_the_tokenizer_beside_them(models, tmp_path):
    checkpoint = models["olmo2"] / "checkpoint"
    recipe = small_recipe(
        str(tmp_path),
        model=json.loads((checkpoint / "manifest.json").read_text())["model"],
        tokenizer={"path": str(checkpoint / "tokenizer"), "vocab_size": 300},
        anneal={"steps": 2, "objective": "uniform", "resume_optimizer": False},
    )
    data, anneal = (tmp_path / "iteration_000" / name / "stage.yaml" for name in ("data", "anneal"))
    StageJob(stage="data", iteration=0, recipe=recipe).save(data)
    inputs = {"data": "iteration_000/data", "checkpoint": str(checkpoint)}
    StageJob(stage="anneal", iteration=0, inputs=inputs, recipe=recipe).save(anneal)
    run_ranks(HERE / "stages_worker.py", 1, str(tmp_path / "out.json"), str(data), str(anneal))
    steps = read_metrics(anneal.parent / "metrics.jsonl")
    assert len(steps) == 2 and steps[1]["train/loss"] < steps[0]["train/loss"]
    info = require_compatible(
        anneal.parent / "checkpoints/step_00000002",
        recipe.model,
        Tokenizer.load(checkpoint / "tokenizer").vocab_size,
        Tokenizer.load(models["olmo2"] / "published").fingerprint,
    )
    assert info.vocab_size == ROWS


def test_a_stage_that_wants_optimizer_states_of_imported_weights_is_refused(models):
    checkpoint, recipe = models["qwen2"] / "checkpoint", small_recipe("unused")
    job = SimpleNamespace(stage="anneal")
    session = SimpleNamespace(job=job, recipe=recipe, settings=recipe.anneal, require_compatible=inspect_checkpoint)
    with pytest.raises(UserError, match="was imported and has no optimizer state: set anneal.resume_optimizer=false"):
        Training(session, checkpoint, with_optimizer=True)


def test_bf16_weights_are_the_rounded_ones(models, tmp_path):
    import_checkpoint(models["qwen2"] / "published", tmp_path / "rough", "bf16")
    exact = published("qwen2").model.layers[0].mlp.down_proj.weight
    settings = model_from_config(models["qwen2"] / "published").model_copy(update={"precision": "bf16"})
    with distributed(config.Parallel(), seed=1):
        (model,) = build_model(settings, config.Parallel(), ROWS)
        load_weights(tmp_path / "rough", [model])
    assert torch.equal(model.decoder.layers[0].mlp.linear_fc2.weight, exact.bfloat16())


def edited(models, family: str, target: Path, **changes) -> Path:
    """A copy of a published config.json with other keys; None removes one."""
    keys = json.loads((models[family] / "published/config.json").read_text()) | changes
    target.mkdir(exist_ok=True)
    (target / "config.json").write_text(json.dumps({key: value for key, value in keys.items() if value is not None}))
    return target


def test_a_published_configuration_becomes_our_keys(models):
    keys = model_from_config(models["olmo2"] / "published").model_dump()
    expected = {"norm_position": "after", "qk_norm": True, "qk_norm_span": "all_heads", "tie_embeddings": False}
    expected |= {"num_layers": 4, "num_query_groups": 2, "norm_epsilon": 1e-3, "rope_base": 500.0, "vocab_size": ROWS}
    assert {key: keys[key] for key in expected} == expected
    keys = model_from_config(models["smollm3"] / "published").model_dump()
    assert (keys["rope_skip_interval"], keys["rope_base"], keys["tie_embeddings"]) == (2, 2e6, True)
    keys = model_from_config(models["qwen3"] / "published").model_dump()
    assert (keys["head_dim"], keys["qk_norm"], keys["qk_norm_span"], keys["qkv_bias"]) == (24, True, "head", False)


def test_keys_as_earlier_transformers_wrote_them_mean_the_same(models, tmp_path):
    old = edited(models, "smollm3", tmp_path, rope_parameters=None, rope_theta=7e5, no_rope_layers=None)
    settings = model_from_config(old)
    assert (settings.rope_base, settings.rope_skip_interval) == (7e5, 2)
    listed = edited(models, "smollm3", tmp_path, no_rope_layers=[1, 1, 1, 1], tie_word_embeddings=None)
    assert model_from_config(listed).rope_skip_interval is None and model_from_config(listed).tie_embeddings


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architectures": ["Qwen3MoeForCausalLM"]}, "architectures=Qwen3MoeForCausalLM is not supported; these are"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}}, "rope scaling is not supported"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}, "rope_parameters": None}, "rope scaling is not supported"),
        ({"attention_bias": True}, "attention_bias=true .* is not supported"),
        ({"mlp_bias": True}, "mlp_bias=true is not supported"),
        ({"use_sliding_window": True}, "use_sliding_window=true is not supported"),
        ({"layer_types": ["full_attention", "sliding_attention"] * 2}, "sliding attention in layer_types"),
        ({"hidden_act": "gelu"}, "hidden_act=gelu is not supported"),
        ({"no_rope_layers": [1, 0, 0, 1]}, "no_rope_layers=.* zeros must come at one regular interval"),
        ({"quantization_config": {"bits": 4}}, "quantization_config is not supported"),
        ({"hidden_size": None}, "lacks hidden_size"),
        ({"num_attention_heads": 3}, "describes a model that is not supported"),
    ],
)
def test_what_the_model_cannot_do_is_refused_by_name(models, tmp_path, changes, message):
    with pytest.raises(UserError, match=message):
        model_from_config(edited(models, "smollm3", tmp_path, **changes))


def test_wrong_folders_are_refused_and_leave_nothing(models, tokenizer, tmp_path):
    source, target = models["qwen3"] / "published", tmp_path / "checkpoint"
    with pytest.raises(UserError, match="config.json cannot be read .* give the folder of a Hugging Face model"):
        import_checkpoint(tmp_path / "nowhere", target, "fp32")
    with pytest.raises(UserError, match="precision=fp16 is not one of fp32, bf16"):
        import_checkpoint(source, target, "fp16")
    with pytest.raises(UserError, match="target=.* exists"):
        import_checkpoint(source, tmp_path, "fp32")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_hidden_layers": 5, "layer_types": None}, "has no tensor model.layers.4.*its weights do not belong"),
        (
            {"num_hidden_layers": 3, "layer_types": None},
            "has tensors that this architecture does not use: model.layers",
        ),
        ({"intermediate_size": 80}, "have shape .* config.json makes them"),
        ({"architectures": ["Qwen2ForCausalLM"]}, r"has no tensor .*q_proj\.bias"),
    ],
)
def test_weights_of_another_model_are_refused(models, tokenizer, tmp_path, changes, message):
    source = edited(models, "qwen3", tmp_path / "source", **changes)
    (source / "model.safetensors").symlink_to(models["qwen3"] / "published/model.safetensors")
    Tokenizer.load(tokenizer).save(source)
    with pytest.raises(UserError, match=message):
        import_checkpoint(source, tmp_path / "checkpoint", "fp32")
    (source / "model.safetensors").unlink()
    with pytest.raises(UserError, match="has no model.safetensors: download the model again"):
        import_checkpoint(source, tmp_path / "checkpoint", "fp32")
    assert not (tmp_path / "checkpoint").exists()
