"""Score, sample and train imported models in one layout, and write what came out beside them.

usage: published_worker.py LAYOUT PARALLEL (as JSON) EARLIER FOLDER ...

Each FOLDER holds a checkpoint; EARLIER is the layout whose training state is trained on too, or "none".
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy
import torch

from nemo_rmt.config import Model, Optim, Parallel
from nemo_rmt.data.batch import TokenBatch
from nemo_rmt.manifest import inspect_checkpoint
from nemo_rmt.megatron.checkpoint import Checkpoints, load_training, load_weights
from nemo_rmt.megatron.generation import generate
from nemo_rmt.megatron.model import build_model
from nemo_rmt.megatron.runtime import broadcast_from_last_stage, distributed
from nemo_rmt.megatron.train_step import TrainedModel
from nemo_rmt.stages.pretrain import next_token

PROMPTS = [[11, 12, 13, 14, 15, 16], [21], [31, 32, 33], [41, 42, 43, 44]]
OPTIM = Optim(lr=1e-2, clip_grad=0)


def rows() -> TokenBatch:
    """Rows of one segment each: plain causal attention."""
    tokens = torch.randint(1, 300, (4, 25), generator=torch.Generator().manual_seed(0))
    return TokenBatch.from_documents(tokens, eod=0, document_attention=False)


def trained(settings: Model, parallel: Parallel, folder: Path, vocab_size: int) -> TrainedModel:
    """The imported weights, ready to train."""
    chunks = build_model(settings, parallel, vocab_size)
    load_weights(folder / "checkpoint", chunks)
    return TrainedModel(chunks, settings, parallel, OPTIM, steps=2)


def measured(folder: Path, layout: str, parallel: Parallel, earlier: str) -> dict:
    """Log-probabilities, greedy samples, and losses and gradient norms of two steps."""
    info = inspect_checkpoint(folder / "checkpoint")
    settings, batch = Model(**info.model), rows()
    model = trained(settings, parallel, folder, info.vocab_size)
    sampled = generate(model.modules, PROMPTS, numpy.zeros((4, 8)), stop_tokens=frozenset(), temperature=0.0)
    scores = model.score(batch, 2)

    def step(trained: TrainedModel) -> list[float]:
        metrics = trained.train_step(batch.micro_batches(2), next_token)
        return [metrics["loss"], metrics["grad_norm"]]

    steps = [step(model)]
    Checkpoints(folder / layout, keep=1, asynchronous=False, identity={}).save(1, model, {})
    steps.append(step(model))
    found = {"tokens": sampled.tokens.tolist(), "sampled": sampled.logprobs.tolist(), "steps": steps}
    if earlier != "none":
        resumed = trained(settings, parallel, folder, info.vocab_size)
        load_training(folder / earlier / "step_00000001", resumed, with_schedule=True)
        found["resumed"] = step(resumed)
    return found | {"logprobs": broadcast_from_last_stage(scores and scores.logprobs.tolist())}


if __name__ == "__main__":
    layout, parallel, earlier, *folders = sys.argv[1:]
    parallel = Parallel.model_validate_json(parallel)
    with distributed(parallel, seed=5) as place:
        for folder in map(Path, folders):
            found = measured(folder, layout, parallel, earlier)
            if place.rank == 0:
                (folder / f"{layout}.json").write_text(json.dumps(found))
