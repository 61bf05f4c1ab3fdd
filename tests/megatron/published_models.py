"""Tiny published models of every family, made by transformers."""

from __future__ import annotations

import json
from pathlib import Path

import torch

ROWS = 320
"""Tokens of the published models: more than the tokenizer has, and no multiple of what Megatron pads to."""
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


def published(family: str):
    """A model with weights large enough for every part to matter; norm weights near 1."""
    import transformers

    name, keys = FAMILIES[family]
    torch.manual_seed(1)
    settings = getattr(transformers, f"{name}Config")(**{**SIZES, **keys})
    model = getattr(transformers, f"{name}ForCausalLM")(settings).eval()
    with torch.no_grad():
        for weight_name, weight in model.named_parameters():
            noise = torch.randn_like(weight)
            weight.copy_(1 + 0.3 * noise if "norm" in weight_name else 0.15 * noise)
    return model


def edited(source: Path, target: Path, **changes) -> Path:
    """A folder with a copy of a published config.json with other keys; None removes one."""
    keys = json.loads((source / "config.json").read_text()) | changes
    target.mkdir(exist_ok=True)
    (target / "config.json").write_text(json.dumps({key: value for key, value in keys.items() if value is not None}))
    return target
