"""Published architectures against transformers' own: scores, samples and training of imported weights."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from published_models import FAMILIES, ROWS, published
from published_worker import PROMPTS, rows
from small_recipe import small_recipe
from torchrun import run_ranks

from nemo_rmt import config
from nemo_rmt.compatibility import require_compatible
from nemo_rmt.data.tokenizer import Tokenizer
from nemo_rmt.errors import UserError
from nemo_rmt.families import model_from_config
from nemo_rmt.manifest import inspect_checkpoint
from nemo_rmt.megatron.checkpoint import load_weights
from nemo_rmt.megatron.hugging_face import import_checkpoint
from nemo_rmt.megatron.model import build_model
from nemo_rmt.megatron.runtime import distributed
from nemo_rmt.stages.job import StageJob
from nemo_rmt.stages.training import Training
from nemo_rmt.tracking import read_metrics

pytest.importorskip("transformers", reason="transformers is not installed")

HERE = Path(__file__).parent
LAYOUTS = {
    "one_rank": ({}, "none"),
    "tp2_sp": ({"tensor": 2, "sequence": True}, "one_rank"),
    "pp2": ({"pipeline": 2}, "tp2_sp"),
    "pp2_vpp2": ({"pipeline": 2, "virtual_pipeline": 2}, "pp2"),
}


@pytest.fixture(scope="session")
def models(tmp_path_factory, published_folders) -> dict[str, Path]:
    """A folder for each family, with the checkpoint made of it."""
    folders = {family: tmp_path_factory.mktemp(f"{family}_imported") for family in FAMILIES}
    for family, folder in folders.items():
        import_checkpoint(published_folders[family], folder / "checkpoint", "fp32")
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


def test_imported_weights_train_in_a_stage_with_the_tokenizer_beside_them(models, published_folders, tmp_path):
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
        Tokenizer.load(published_folders["olmo2"]).fingerprint,
    )
    assert info.vocab_size == ROWS


def test_a_stage_that_wants_optimizer_states_of_imported_weights_is_refused(models):
    checkpoint, recipe = models["qwen2"] / "checkpoint", small_recipe("unused")
    job = SimpleNamespace(stage="anneal")
    session = SimpleNamespace(job=job, recipe=recipe, settings=recipe.anneal, require_compatible=inspect_checkpoint)
    with pytest.raises(UserError, match="was imported and has no optimizer state: set anneal.resume_optimizer=false"):
        Training(session, checkpoint, with_optimizer=True)


def test_bf16_weights_are_the_rounded_ones(published_folders, tmp_path):
    import_checkpoint(published_folders["qwen2"], tmp_path / "rough", "bf16")
    exact = published("qwen2").model.layers[0].mlp.down_proj.weight
    settings = model_from_config(published_folders["qwen2"]).model_copy(update={"precision": "bf16"})
    with distributed(config.Parallel(), seed=1):
        (model,) = build_model(settings, config.Parallel(), ROWS)
        load_weights(tmp_path / "rough", [model])
    assert torch.equal(model.decoder.layers[0].mlp.linear_fc2.weight, exact.bfloat16())
