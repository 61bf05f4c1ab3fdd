"""vLLM as the sampler of the model in training: how it starts."""

from __future__ import annotations

import functools
import importlib.util
import json
from collections.abc import Callable
from pathlib import Path

from nemo_rmt.config import Model, Recipe
from nemo_rmt.errors import UserError
from nemo_rmt.families import config_json
from nemo_rmt.megatron.model import LogprobGPT
from nemo_rmt.megatron.published import published_stream
from nemo_rmt.megatron.runtime import Layout, gather_over_ranks
from nemo_rmt.rollout.vllm.engine import Replicas, VLLMEngine
from nemo_rmt.rollout.vllm.process import logprobs_mode

CPU_HEAD_SIZES = (32, 64, 80, 96, 112, 128, 160, 192, 224, 256, 512)
"""Those that vLLM's attention on a CPU has (0.32); it would fail at the first response."""


def model_folder(settings: Model, vocab_size: int, *, eos: int, folder: Path, write: bool) -> Path:
    """The folder vLLM reads the architecture from, with a config.json and no weights. write: on one rank alone.

    Raises UserError when no architecture that vLLM knows is this model's. All ranks call it.
    """
    config = config_json(settings, vocab_size, eos=eos)
    if write:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    gather_over_ranks(None)  # it is there
    return folder


def _require_heads(model: Model, on_cpu: bool) -> None:
    """Raise UserError for sizes of heads that vLLM has not."""
    usual = model.hidden_size // model.num_attention_heads
    head_dim = model.head_dim or usual
    if model.qkv_bias and head_dim != usual:  # Qwen2, whose model in vLLM knows no head_dim
        raise UserError(
            f"rollout.engine=vllm: with model.qkv_bias=true vLLM has heads of hidden_size / num_attention_heads = "
            f"{usual} only, got model.head_dim={head_dim}: set rollout.engine=megatron"
        )
    if on_cpu and head_dim not in CPU_HEAD_SIZES:
        raise UserError(
            f"rollout.engine=vllm on a CPU: vLLM has no attention for heads of {head_dim}: set model.head_dim to one "
            f"of {', '.join(map(str, CPU_HEAD_SIZES))}, or rollout.engine=megatron"
        )


def vllm_engine(
    recipe: Recipe,
    layout: Layout,
    chunks: list[LogprobGPT],
    *,
    folder: Path,
    vocab_size: int,
    eos: int,
    version: Callable[[], int],
) -> VLLMEngine:
    """The engine of rollout.vllm on the weights in training, vLLM started. folder: the stage's.

    Raises UserError when vLLM is missing or cannot run this model, or ranks do not make whole replicas.
    """
    model, settings = recipe.model, recipe.rollout.vllm
    if importlib.util.find_spec("vllm") is None:
        raise UserError("rollout.engine=vllm needs vLLM: pip install nemo-rmt[vllm], or set rollout.engine=megatron")
    _require_heads(model, on_cpu=layout.device.type == "cpu")
    source = model_folder(model, vocab_size, eos=eos, folder=folder / "vllm", write=layout.rank == 0)
    engine = functools.partial(
        VLLMEngine,
        layout=layout,
        weights=lambda: published_stream(chunks, model),
        version=version,
        max_position=model.max_position,
        mode=logprobs_mode(recipe.rollout),
    )
    if settings.placement == "server":
        from nemo_rmt.rollout.vllm.server import ServerBackend

        backend = None
        if layout.rank == 0:
            log = folder / "log" / "vllm_server.log"
            backend = ServerBackend(recipe.rollout, model, model_folder=source, vocab_size=vocab_size, log=log)
        return engine(backend, Replicas([0], None if backend is None else 0), overlap=True)
    from nemo_rmt.rollout.vllm.colocated import ColocatedBackend

    if layout.world_size % settings.tensor:
        raise UserError(
            f"rollout.vllm.tensor={settings.tensor} does not divide the {layout.world_size} training processes: "
            "choose one that does"
        )
    colocated = ColocatedBackend(recipe.rollout, model, layout, model_folder=source)
    leaders = list(range(0, layout.world_size, settings.tensor))
    return engine(colocated, Replicas(leaders, layout.rank // settings.tensor), release=colocated.release)
