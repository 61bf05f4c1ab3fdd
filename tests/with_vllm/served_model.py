"""A random model of two layers for a vLLM server, and transformers' opinion of it."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nemo_rmt.config import Model, Rollout
from nemo_rmt.rollout.vllm.backend import Completion, Request

VOCAB = 300
MODEL = Model(
    num_layers=2,
    hidden_size=32,
    num_attention_heads=4,
    num_query_groups=2,
    head_dim=32,
    ffn_hidden_size=48,
    qk_norm=True,
    max_position=256,
)
STOP = 7


def rollout(**vllm: Any) -> Rollout:
    """Settings of a server; ``vllm`` changes keys of rollout.vllm."""
    server = {"placement": "server", "start_timeout_s": 400, "request_timeout_s": 60}
    return Rollout(engine="vllm", batch_size=16, vllm={**server, **vllm})


def model_folder(folder: Path) -> Path:
    """The folder, with the model's config.json."""
    from nemo_rmt.families import config_json

    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config_json(MODEL, VOCAB, eos=0)))
    return folder


def random_model(folder: Path, seed: int) -> Any:
    """The model in transformers; weights large enough that no distribution is flat."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(seed)
    config = AutoConfig.from_pretrained(folder)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.3)
    return model


def weights(model: Any) -> Iterator[tuple[str, Tensor]]:
    """Its tensors, in the order in which they are published."""
    from nemo_rmt.megatron.published import published_shapes

    tensors = model.state_dict()
    for name, _, _ in published_shapes(MODEL, VOCAB):
        yield name, tensors[name]


def requests(
    count: int, max_tokens: int = 12, temperature: float = 1.0, stop: tuple[int, ...] = (STOP,)
) -> list[Request]:
    """Random prompts of 1 to 40 tokens, one seed each."""
    generator = torch.Generator().manual_seed(11)
    lengths = torch.randint(1, 40, (count,), generator=generator).tolist()
    prompts = [torch.randint(0, VOCAB, (length,), generator=generator).tolist() for length in lengths]
    return [Request(prompt, max_tokens, temperature, 1.0, 2**62 + seed, stop) for seed, prompt in enumerate(prompts)]


@torch.no_grad()
def largest_error(model: Any, asked: list[Request], answered: list[Completion]) -> float:
    """Between the server's log-probabilities and transformers' for the same tokens, in nats."""
    errors = [0.0]
    for request, completion in zip(asked, answered, strict=True):
        logits = model(torch.tensor([request.tokens + completion.tokens])).logits[0].float()
        logits = logits[len(request.tokens) - 1 : -1] / (request.temperature or 1.0)
        tokens = torch.tensor(completion.tokens)
        expected = logits.log_softmax(-1).gather(-1, tokens[:, None])[:, 0]
        errors.append(float((expected - torch.tensor(completion.logprobs)).abs().max()))
    return max(errors)


def session_processes(leader: int) -> list[int]:
    """Processes of a session that run."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue  # it just ended
            if int(fields[3]) == leader and fields[0] != "Z":
                found.append(int(entry.name))
    return found


def environment() -> dict[str, str]:
    """Of a process that imports the tests' own modules."""
    return {**os.environ, "PYTHONPATH": f"{Path(__file__).parents[1]}:{Path(__file__).parent}"}
