"""Published architectures: a Hugging Face config.json as our model section, and back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from nemo_rmt.config import Model
from nemo_rmt.errors import UserError

ARCHITECTURES: dict[str, dict[str, Any]] = {
    "LlamaForCausalLM": {},
    "Olmo2ForCausalLM": {"norm_position": "after", "qk_norm": True, "qk_norm_span": "all_heads"},
    "Qwen2ForCausalLM": {"qkv_bias": True},
    "Qwen3ForCausalLM": {"qk_norm": True},
    "SmolLM3ForCausalLM": {"tie_embeddings": True, "rope_base": 2e6, "rope_skip_interval": 4},
}
"""What each means, and what its config.json means by a key that it leaves out, where that is not LlamaForCausalLM's."""

DEFAULTS: dict[str, Any] = {"tie_embeddings": False, "rope_base": 10_000.0, "rope_skip_interval": None}
"""LlamaForCausalLM's meaning of such keys."""

KEYS = {
    "num_layers": "num_hidden_layers",
    "hidden_size": "hidden_size",
    "num_attention_heads": "num_attention_heads",
    "ffn_hidden_size": "intermediate_size",
    "vocab_size": "vocab_size",
    "norm_epsilon": "rms_norm_eps",
    "max_position": "max_position_embeddings",
}
"""Our names of the keys that every config.json must have."""

SHAPE = {"norm_position": "before", "qk_norm": False, "qk_norm_span": "head", "qkv_bias": False}
"""What LlamaForCausalLM is, of the keys that tell the architectures apart."""

TORCH_NAMES = {"fp32": "float32", "bf16": "bfloat16"}


def model_from_config(folder: Path) -> Model:
    """The model section for a folder's config.json.

    Raises UserError when the folder has none, its model does what ours cannot, or brings code of its own.
    """
    file = Path(folder) / "config.json"
    raw = read_object(file, "give the folder of a Hugging Face model")
    names = raw.get("architectures")
    name = names[0] if isinstance(names, list) and names else names
    if "auto_map" in raw:
        raise UserError(
            f"{file} has auto_map: architectures={name} brings code of its own (trust_remote_code), which is never "
            f"run: choose a model of {', '.join(ARCHITECTURES)}"
        )
    if name not in ARCHITECTURES:
        raise UserError(f"{file}: architectures={name} is not supported; these are: {', '.join(ARCHITECTURES)}")
    _refuse_unsupported(raw, file)
    if missing := [theirs for theirs in KEYS.values() if raw.get(theirs) is None]:
        raise UserError(f"{file} lacks {', '.join(missing)}: give the folder of a whole Hugging Face model")
    rope = raw.get("rope_parameters") or {}
    keys = DEFAULTS | ARCHITECTURES[name] | {ours: raw[theirs] for ours, theirs in KEYS.items()}
    keys["num_query_groups"] = raw.get("num_key_value_heads") or raw["num_attention_heads"]
    for ours, given in {
        "head_dim": raw.get("head_dim"),
        "init_std": raw.get("initializer_range"),
        "tie_embeddings": raw.get("tie_word_embeddings"),
        "rope_base": rope.get("rope_theta", raw.get("rope_theta")),
        "rope_skip_interval": raw.get("no_rope_layer_interval"),
    }.items():
        keys[ours] = keys.get(ours) if given is None else given
    if raw.get("no_rope_layers") is not None:
        keys["rope_skip_interval"] = _skip_interval(raw["no_rope_layers"], raw["num_hidden_layers"], file)
    try:
        return Model.model_validate({key: value for key, value in keys.items() if value is not None})
    except ValidationError as error:
        raise UserError(f"{file} describes a model that is not supported: {error}") from None


def config_json(settings: Model, vocab_size: int, *, eos: int, pad: int | None = None) -> dict[str, Any]:
    """The config.json of a model section, from which ``model_from_config`` makes an equal one.

    vocab_size: tokens the model predicts over, without padding. eos, pad: token ids.

    Raises UserError, naming the keys, when the model is none of ARCHITECTURES.
    """
    name = _architecture(settings)
    keys: dict[str, Any] = {theirs: getattr(settings, ours) for ours, theirs in KEYS.items()}
    keys |= {
        "architectures": [name],
        "model_type": name.removesuffix("ForCausalLM").lower(),
        "vocab_size": vocab_size,
        "num_key_value_heads": settings.num_query_groups,
        "head_dim": settings.head_dim or settings.hidden_size // settings.num_attention_heads,
        "hidden_act": "silu",
        "initializer_range": settings.init_std,
        "tie_word_embeddings": settings.tie_embeddings,
        # The one is read by transformers from 5 on, the other by older ones.
        "rope_parameters": {"rope_type": "default", "rope_theta": settings.rope_base},
        "rope_theta": settings.rope_base,
        "attention_bias": False,
        "mlp_bias": False,
        "attention_dropout": 0.0,
        "use_cache": True,
        "bos_token_id": None,  # left out, a number of the family's own is put in its place
        "eos_token_id": eos,
        "pad_token_id": pad,
        "torch_dtype": TORCH_NAMES[settings.precision],
    }
    if settings.rope_skip_interval is not None:
        interval = settings.rope_skip_interval
        keys["no_rope_layer_interval"] = interval
        keys["no_rope_layers"] = [int((layer + 1) % interval != 0) for layer in range(settings.num_layers)]
    return keys


def read_object(file: Path, remedy: str) -> dict[str, Any]:
    """A JSON file that holds an object. Raises UserError, which ends in ``remedy``, when there is none."""
    try:
        raw = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{file} cannot be read ({error}): {remedy}") from None
    if not isinstance(raw, dict):
        raise UserError(f"{file} cannot be read (it is no JSON object): {remedy}")
    return raw


def _architecture(settings: Model) -> str:
    """The architecture that has a model section's parts."""
    skipping = settings.rope_skip_interval is not None
    given = {key: getattr(settings, key) for key in SHAPE}
    if not settings.qk_norm:
        given["qk_norm_span"] = SHAPE["qk_norm_span"]  # says nothing
    for name, means in ARCHITECTURES.items():
        if given == SHAPE | {key: means[key] for key in SHAPE if key in means}:
            if skipping == ("rope_skip_interval" in means):
                return name
    asked = {key: value for key, value in given.items() if value != SHAPE[key]}
    asked |= {"rope_skip_interval": settings.rope_skip_interval} if skipping else {}
    raise UserError(
        f"no published architecture has {', '.join(f'model.{key}={value}' for key, value in asked.items())} together: "
        f"there are {', '.join(ARCHITECTURES)}"
    )


def _refuse_unsupported(raw: dict[str, Any], file: Path) -> None:
    """Raise UserError that names the first key asking for what our model does not have."""
    rope = {**(raw.get("rope_scaling") or {}), **(raw.get("rope_parameters") or {})}
    found = {
        "rope scaling": rope.get("rope_type", rope.get("type", "default")) != "default",
        "partial_rotary_factor": raw.get("partial_rotary_factor", rope.get("partial_rotary_factor", 1.0)) != 1.0,
        "attention_bias=true (a bias on the output projection too)": raw.get("attention_bias"),
        "mlp_bias=true": raw.get("mlp_bias"),
        "use_sliding_window=true": raw.get("use_sliding_window"),
        "sliding attention in layer_types": any(kind != "full_attention" for kind in raw.get("layer_types") or []),
        f"hidden_act={raw.get('hidden_act')}": raw.get("hidden_act", "silu") != "silu",
        "quantization_config": raw.get("quantization_config"),
    }
    for what, asked in found.items():
        if asked:
            raise UserError(f"{file}: {what} is not supported: choose another model")


def _skip_interval(flags: list[int], layers: int, file: Path) -> int | None:
    """rope_skip_interval from no_rope_layers, in which 0 says that a layer has no rotary positions."""
    flags = [int(bool(flag)) for flag in flags[:layers]]
    interval = flags.index(0) + 1 if 0 in flags else None
    if flags != [int(interval is None or (layer + 1) % interval != 0) for layer in range(layers)]:
        raise UserError(f"{file}: no_rope_layers={flags} is not supported: zeros must come at one regular interval")
    return interval
