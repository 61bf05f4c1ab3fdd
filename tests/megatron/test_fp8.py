"""FP8 settings: what Megatron is told, what is refused, and that sampling is in BF16. FP8 itself is in test_gpu."""

from __future__ import annotations

import importlib.util

import numpy
import pytest
import torch
from pydantic import ValidationError
from tiny_model import VOCAB, tiny_recipe, world

from nemo_rmt.config import Cluster, Model, Parallel, Recipe
from nemo_rmt.errors import UserError
from nemo_rmt.megatron.generation import generate
from nemo_rmt.megatron.layers import require_transformer_engine
from nemo_rmt.megatron.model import build_model, transformer_config


def fp8_model(**keys) -> Model:
    return Model(**{"fp8": "hybrid", "layers": "transformer_engine", "precision": "bf16", **keys})


@pytest.mark.parametrize("fp8", ["hybrid", "e4m3"])
@pytest.mark.parametrize("recipe", ["tensorwise", "delayed", "blockwise"])
def test_megatron_is_told_format_and_scaling_and_keeps_the_weights_in_bf16(fp8, recipe):
    told = transformer_config(fp8_model(fp8=fp8, fp8_recipe=recipe), Parallel())
    assert (told.fp8, told.fp8_recipe, told.fp8_param, told.params_dtype) == (fp8, recipe, False, torch.bfloat16)
    assert (told.fp8_amax_history_len, told.fp8_amax_compute_algo) == (1024, "max")
    assert not told.first_last_layers_bf16


def test_without_fp8_megatron_is_told_nothing_of_it():
    assert transformer_config(Model(fp8_recipe="blockwise", fp8_bf16_layers=(1, 1)), Parallel()).fp8 is None


def test_first_and_last_layers_stay_in_bf16_each_number_its_own():
    told = transformer_config(fp8_model(num_layers=8, fp8_bf16_layers=(0, 3)), Parallel(pipeline=2))
    assert told.first_last_layers_bf16
    assert (told.num_layers_at_start_in_bf16, told.num_layers_at_end_in_bf16) == (0, 3)


def test_more_bf16_layers_at_an_end_than_a_pipeline_stage_has_are_refused():
    model = fp8_model(num_layers=8, fp8_bf16_layers=(1, 3)).model_dump()
    with pytest.raises(ValidationError, match=r"model.fp8_bf16_layers=\(1, 3\).*which has 2 layers: lower"):
        Recipe(model=model, parallel=Parallel(pipeline=4), cluster=Cluster(gpus_per_node=4))


@pytest.fixture
def gpu(monkeypatch):
    """A function that pretends there is Transformer Engine and a GPU of a compute capability."""

    def pretend(*capability: int) -> None:
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)

    return pretend


@pytest.mark.parametrize(
    ("capability", "recipe", "message"),
    [
        (
            (8, 0),
            "tensorwise",
            "fp8=hybrid with model.fp8_recipe=tensorwise needs .* 8.9 .* has 8.0: set model.fp8=null",
        ),
        ((8, 6), "blockwise", "fp8_recipe=blockwise needs .* 9.0 .* has 8.6: set model.fp8=null"),
        ((8, 9), "blockwise", "fp8_recipe=blockwise needs .* 9.0 .* has 8.9: set model.fp8_recipe=tensorwise"),
    ],
)
def test_a_gpu_that_is_too_old_is_refused(gpu, capability, recipe, message):
    gpu(*capability)
    with pytest.raises(UserError, match=message):
        require_transformer_engine(fp8_model(fp8_recipe=recipe))


@pytest.mark.parametrize(
    ("capability", "settings"),
    [
        ((8, 9), fp8_model(fp8_recipe="tensorwise")),
        ((8, 9), fp8_model(fp8_recipe="delayed")),
        ((9, 0), fp8_model(fp8_recipe="blockwise")),
        ((10, 0), fp8_model(fp8_recipe="blockwise")),
        ((8, 0), Model(layers="transformer_engine", fp8_recipe="blockwise")),
    ],
)
def test_a_gpu_that_can_do_it_is_taken(gpu, capability, settings):
    gpu(*capability)
    require_transformer_engine(settings)


@pytest.mark.skipif(torch.cuda.is_available(), reason="refused for want of a GPU")
def test_without_a_gpu_fp8_is_refused_and_never_silently_bf16():
    with world(), pytest.raises(UserError, match="needs a CUDA GPU .*set model.layers=local and model.fp8=null"):
        build_model(fp8_model(), Parallel(), VOCAB)


def test_sampling_switches_fp8_off_and_on_again():
    recipe = tiny_recipe()
    with world():
        chunks = build_model(recipe.model, recipe.parallel, VOCAB)
        chunks[0].config.fp8 = "hybrid"
        seen = []
        layer = chunks[0].decoder.layers[-1]
        layer.register_forward_pre_hook(lambda *_: seen.append(layer.config.fp8))
        generate(chunks, [[5, 6], [7]], numpy.zeros((2, 3)), stop_tokens=frozenset())
    assert seen == [None] * 3
    assert chunks[0].config.fp8 == layer.config.fp8 == "hybrid"
