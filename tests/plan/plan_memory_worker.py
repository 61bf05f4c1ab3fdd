"""Measure what Megatron allocates on each rank for one training step of several recipes of one layout.

usage: plan_memory_worker.py OUT_PREFIX RECIPE (as JSON) ...

Attention is causal and the norm one kernel, as on a GPU: the CPU's composed norm and dense masks keep more.
"""

from __future__ import annotations

import json
import sys
import weakref
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

from nemo_rmt.config import Optim, Recipe
from nemo_rmt.data.batch import TokenBatch
from nemo_rmt.megatron import train_step
from nemo_rmt.megatron.model import build_model
from nemo_rmt.megatron.runtime import distributed
from nemo_rmt.megatron.train_step import TrainedModel
from nemo_rmt.objectives import ntp_loss

VOCAB = 300


class FusedNorm(torch.autograd.Function):
    """RMSNorm that keeps its input and 1 / rms, as torch's CUDA kernel does."""

    @staticmethod
    def forward(ctx, states, shape, weight, epsilon):
        scale = torch.rsqrt(states.float().square().mean(-1, keepdim=True) + epsilon)
        ctx.save_for_backward(states, scale, weight)
        return (states.float() * scale).to(states.dtype) * weight

    @staticmethod
    def backward(ctx, gradient):
        states, scale, weight = ctx.saved_tensors
        normed, gradient = states.float() * scale, gradient.float()
        inner = gradient * weight.float()
        for_states = scale * (inner - normed * (inner * normed).mean(-1, keepdim=True))
        for_weight = (gradient * normed).flatten(0, -2).sum(0)
        return for_states.to(states.dtype), None, for_weight.to(weight.dtype), None


class Live:
    """Bytes of the storages held by something, each once, and the most they have been."""

    def __init__(self, but: Iterable[Tensor]):
        self.excluded = {storage(tensor) for tensor in but}
        self.holders: Counter[int] = Counter()
        self.now = self.most = 0

    def hold(self, tensor: Tensor) -> int:
        key = storage(tensor)
        if key not in self.excluded:
            if not self.holders[key]:
                self.now += tensor.untyped_storage().nbytes()
                self.most = max(self.most, self.now)
            self.holders[key] += 1
        return key

    def release(self, key: int, size: int) -> None:
        if key not in self.excluded:
            self.holders[key] -= 1
            self.now -= 0 if self.holders[key] else size


class Saved:
    """One tensor kept for backward."""

    def __init__(self, live: Live, tensor: Tensor):
        self.live, self.tensor, self.key = live, tensor, live.hold(tensor)

    def __del__(self):
        self.live.release(self.key, self.tensor.untyped_storage().nbytes())


def storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def held(tensors: Iterable[Tensor], but: Iterable[Tensor] = ()) -> int:
    """Bytes of the tensors, those that share a storage with the latter left out."""
    excluded = {storage(tensor) for tensor in but}
    return sum(tensor.nbytes for tensor in tensors if storage(tensor) not in excluded)


def measure(recipe: Recipe) -> dict[str, int]:
    """Bytes on this rank."""
    torch.manual_seed(0)
    chunks = build_model(recipe.model, recipe.parallel, VOCAB)
    model = TrainedModel(chunks, recipe.model, recipe.parallel, Optim(), steps=2)
    parameters = [parameter for chunk in model.chunks for parameter in chunk.parameters()]
    stage = recipe.pretrain
    count = stage.global_batch_size // (stage.micro_batch_size * recipe.data_parallel)
    rows = torch.randint(VOCAB, (stage.micro_batch_size, stage.sequence_length + 1))
    batches = [TokenBatch.from_documents(rows, eod=0, document_attention=True) for _ in range(count)]
    live = Live(parameters)

    def sent(module, inputs, output):
        if isinstance(output, Tensor):  # of a pipeline stage that is not the last
            weakref.finalize(output, live.release, live.hold(output), output.untyped_storage().nbytes())

    for chunk in model.chunks:
        chunk.register_forward_hook(sent)
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: Saved(live, tensor), lambda saved: saved.tensor):
        model.train_step(batches, lambda scores, batch: ntp_loss(scores.logprobs, batch.loss_mask))
    parts = getattr(model.optimizer, "chained_optimizers", [model.optimizer])
    groups = [group for part in parts for group in part.optimizer.param_groups]
    states = [state for part in parts for values in part.optimizer.state.values() for state in values.values()]
    return {
        "weights": held(parameters),
        "gradients": sum(buffer.grad_data.nbytes for chunk in model.chunks for buffer in chunk.buffers),
        "optimizer": held((parameter for group in groups for parameter in group["params"]), parameters)
        + held(state for state in states if isinstance(state, Tensor) and state.dim()),
        "saved": live.most,
        "left": live.now,
    }


if __name__ == "__main__":
    torch.nn.functional.rms_norm = FusedNorm.apply
    train_step.row_structure = lambda *_: None
    recipes = [Recipe.model_validate_json(text) for text in sys.argv[2:]]
    with distributed(recipes[0].parallel, seed=1) as layout:
        found = [measure(recipe) for recipe in recipes]
        Path(f"{sys.argv[1]}{layout.rank}.json").write_text(
            json.dumps({"pipeline_rank": layout.pipeline_rank, "measured": found})
        )
