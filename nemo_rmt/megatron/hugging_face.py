"""Published weights in: a Hugging Face folder's config.json as our model section, its safetensors as a checkpoint."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from safetensors import SafetensorError, safe_open
from torch import Tensor

from nemo_rmt.compatibility import IMPORTED, model_vocab_size
from nemo_rmt.config import Model, Parallel
from nemo_rmt.data.tokenizer import Tokenizer
from nemo_rmt.errors import UserError
from nemo_rmt.megatron.checkpoint import save_weights
from nemo_rmt.megatron.model import LogprobGPT, build_model
from nemo_rmt.megatron.runtime import distributed
from nemo_rmt.megatron.writing import complete_draft

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

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")


def model_from_config(folder: Path) -> Model:
    """The model section for a folder's config.json.

    Raises UserError when the folder has none, or its model does what ours cannot.
    """
    file = Path(folder) / "config.json"
    try:
        raw = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{file} cannot be read ({error}): give the folder of a Hugging Face model") from None
    name = (raw.get("architectures") or [None])[0]
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


class PublishedTensors:
    """A folder's safetensors, read one tensor at a time. Raises UserError when files are missing or damaged."""

    def __init__(self, folder: Path):
        self.folder = Path(folder)
        index = self.folder / "model.safetensors.index.json"
        names = {"model.safetensors"}
        if index.is_file():
            try:
                names = set(json.loads(index.read_text())["weight_map"].values())
            except (ValueError, KeyError) as error:
                raise UserError(f"{index} is damaged ({error!r}): download it again") from None
        self.files = {}
        for name in sorted(names):
            if not (self.folder / name).is_file():
                raise UserError(f"{self.folder} has no {name}: download the model again, with its safetensors files")
            try:
                opened = safe_open(self.folder / name, framework="pt")
            except SafetensorError as error:
                raise UserError(f"{self.folder / name} is damaged ({error}): download it again") from None
            self.files.update(dict.fromkeys(opened.keys(), opened))
        self.unread = set(self.files)

    def __getitem__(self, name: str) -> Tensor:
        if name not in self.files:
            raise UserError(f"{self.folder} has no tensor {name}: its weights do not belong to its config.json")
        self.unread.discard(name)
        return self.files[name].get_tensor(name)


@torch.no_grad()
def load_published(folder: Path, settings: Model, model: LogprobGPT) -> None:
    """Copy a folder's weights into a whole model, tensor by tensor.

    Raises UserError when they are not those that ``settings``, made of its config.json, asks for.
    """
    tensors = PublishedTensors(folder)
    if settings.tie_embeddings:
        tensors.unread.discard("lm_head.weight")  # a copy
    for name, parameter in model.named_parameters():
        found = published_weight(name, settings, tensors)
        rows = settings.vocab_size if name in VOCABULARY else parameter.shape[0]
        if found.shape != (rows, *parameter.shape[1:]):
            raise UserError(
                f"{folder}: the weights of {name} have shape {tuple(found.shape)}, config.json makes them "
                f"{(rows, *parameter.shape[1:])}: the weights do not belong to it"
            )
        parameter[:rows].copy_(found)
        parameter[rows:].zero_()
    if unread := sorted(name for name in tensors.unread if not name.endswith("rotary_emb.inv_freq")):
        raise UserError(f"{folder} has tensors that this architecture does not use: {', '.join(unread[:5])}")


VOCABULARY = {
    "embedding.word_embeddings.weight": "model.embed_tokens.weight",
    "output_layer.weight": "lm_head.weight",
}
"""Parameters with a row for each token, and padding."""

IN_LAYER = {
    "input_layernorm": "input_layernorm",
    "pre_mlp_layernorm": "post_attention_layernorm",
    "self_attention.linear_proj": "self_attn.o_proj",
    "self_attention.linear_proj.norm": "post_attention_layernorm",
    "self_attention.q_layernorm": "self_attn.q_norm",
    "self_attention.k_layernorm": "self_attn.k_norm",
    "mlp.linear_fc2": "mlp.down_proj",
    "mlp.linear_fc2.norm": "post_feedforward_layernorm",
}
"""Modules of a layer that have one published counterpart."""


def published_weight(name: str, settings: Model, tensors: PublishedTensors) -> Tensor:
    """What a parameter of the whole model, under Megatron's name, holds in a published model."""
    if name in VOCABULARY:
        return tensors[VOCABULARY[name]]
    if name == "decoder.final_layernorm.weight":
        return tensors["model.norm.weight"]
    _, _, number, rest = name.split(".", 3)
    module, kind = rest.rsplit(".", 1)
    layer = f"model.layers.{number}."
    if module == "mlp.linear_fc1":
        return torch.cat([tensors[f"{layer}mlp.{part}_proj.{kind}"] for part in ("gate", "up")])
    if module == "self_attention.linear_qkv":
        # Megatron's order: for each group its query heads, then its key, then its value.
        groups = settings.num_query_groups
        parts = [tensors[f"{layer}self_attn.{part}_proj.{kind}"] for part in "qkv"]
        return torch.cat([part.unflatten(0, (groups, -1)) for part in parts], dim=1).flatten(0, 1)
    return tensors[f"{layer}{IN_LAYER[module]}.{kind}"]


def import_checkpoint(source: Path, target: Path, precision: str) -> None:
    """Make a checkpoint, without optimizer state, of a Hugging Face folder; its tokenizer goes to ``target/tokenizer``.

    precision: of the weights written, fp32 or bf16.

    Raises UserError when the folder is not that of a model we support, or ``target`` exists.
    """
    source, target = Path(source), Path(target)
    if precision not in ("fp32", "bf16"):
        raise UserError(f"precision={precision} is not one of fp32, bf16")
    if target.exists():
        raise UserError(f"target={target} exists: give a new folder, or delete it")
    settings = model_from_config(source).model_copy(update={"precision": precision})
    if not (source / "tokenizer.json").is_file():
        raise UserError(f"source={source} has no tokenizer.json: download the model again, with its tokenizer")
    tokenizer = Tokenizer.load(source)
    vocab_size = model_vocab_size(settings, tokenizer.vocab_size)
    identity = {
        "stage": IMPORTED,
        "iteration": 0,
        "step": 0,
        "model": settings.model_dump(mode="json"),
        "vocab_size": vocab_size,
        "tokenizer": tokenizer.fingerprint,
    }
    draft = target.with_name(f"{target.name}.tmp")
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir(parents=True)
    with distributed(Parallel(), seed=0):
        (model,) = build_model(settings, Parallel(), vocab_size, initialize=False)
        load_published(source, settings, model)
        save_weights(draft, [model])
    (draft / "tokenizer").mkdir()
    for name in TOKENIZER_FILES:
        if (source / name).is_file():
            shutil.copy(source / name, draft / "tokenizer" / name)
    complete_draft(draft, target, identity, {})
    print(f"wrote {target}: set pretrain.checkpoint={target} and tokenizer.path={target / 'tokenizer'}")
