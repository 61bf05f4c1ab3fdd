"""The large recipes' models, built through Megatron on the meta device, have as many parameters as published."""

from __future__ import annotations

import pytest
import torch
from nemo_rmt.recipes import build
from tiny_model import world

from nemo_rmt.config import Parallel
from nemo_rmt.megatron.cpu import redirected
from nemo_rmt.megatron.model import LogprobGPT, transformer_config

PUBLISHED = {
    "olmo2_1b": 1_484_916_736,
    "smollm3_3b": 3_075_098_624,
    "qwen3_14b": 14_768_307_200,
    "r1_distill_qwen_14b": 14_770_033_664,
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_large_recipes_model_has_the_published_number_of_parameters(name):
    settings = build(name).model
    with world(), redirected(), torch.device("meta"):
        model = LogprobGPT(settings, transformer_config(settings, Parallel()), settings.vocab_size, None)
        assert sum(parameter.numel() for parameter in model.parameters()) == PUBLISHED[name]
