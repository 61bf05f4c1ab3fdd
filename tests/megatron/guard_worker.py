"""Steps that have to be skipped although one rank alone sees why: nothing but the schedule may move on any rank.

usage: guard_worker.py LAYOUT
"""

from __future__ import annotations

import math
import sys
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).parents[1]))

from tiny_model import next_token, random_batch, tiny_recipe, trained

from nemo_rmt.config import Optim
from nemo_rmt.megatron.runtime import distributed
from nemo_rmt.megatron.train_step import TrainedModel
from nemo_rmt.objectives import LossOutput

LAYOUTS = {
    "one_rank": (1, {}),
    "one_rank_bf16": (1, {}),
    "tp2": (2, {"tensor": 2}),
    "pp2": (2, {"pipeline": 2}),
    "dp2": (2, {}),
    "dp2_distributed_optimizer": (2, {"distributed_optimizer": True}),
}


def nan_loss(scores, batch) -> LossOutput:
    """NaN in loss and gradient, on the last rank."""
    output = next_token(scores, batch)
    factor = math.nan if dist.get_rank() == dist.get_world_size() - 1 else 1.0
    total, count = output.metrics["loss"]
    return LossOutput(output.loss_sum * factor, output.num_tokens, {"loss": (total * factor, count)})


def nan_gradient(scores, batch) -> LossOutput:
    """The same with the reported loss as it should be."""
    return replace(next_token(scores, batch), loss_sum=nan_loss(scores, batch).loss_sum)


def infinite_gradient(scores, batch) -> LossOutput:
    """Finite values whose gradient overflows."""
    output = next_token(scores, batch)
    return replace(output, loss_sum=output.loss_sum * torch.finfo(torch.float32).max)


def state(model: TrainedModel) -> list[torch.Tensor]:
    """Every tensor that a step changes: weights, their main copies, Adam's moments and counts."""
    tensors = [parameter for module in model.modules for parameter in module.parameters()]
    for part in model.optimizer.chained_optimizers:
        tensors += [parameter for group in part.optimizer.param_groups for parameter in group["params"]]
        for values in part.optimizer.state.values():
            tensors += [value for value in values.values() if isinstance(value, torch.Tensor)]
    return [tensor.detach().clone() for tensor in tensors]


def same(before: list[torch.Tensor], after: list[torch.Tensor]) -> list[bool]:
    return [torch.equal(one, other) for one, other in zip(before, after, strict=True)]


def main(name: str) -> None:
    processes, parallel = LAYOUTS[name]
    precision = "bf16" if name.endswith("bf16") else "fp32"
    recipe = tiny_recipe(parallel=parallel, cluster={"gpus_per_node": processes}, model={"precision": precision})
    with distributed(recipe.parallel, seed=5) as layout:
        model = trained(recipe, Optim(lr=1e-2, min_lr=1e-3, schedule="linear"), steps=10)
        batches = random_batch(4, seed=layout.data_rank).micro_batches(2)
        first = model.train_step(batches, next_token)
        for number, objective in enumerate((nan_loss, nan_gradient, infinite_gradient), start=1):
            before = state(model)
            skipped = model.train_step(batches, objective)
            assert all(same(before, state(model))), objective
            assert not math.isfinite(skipped["loss"]) or not math.isfinite(skipped["grad_norm"])
            assert skipped["lr"] < first["lr"]
            states = [None] * layout.world_size
            dist.all_gather_object(states, model.guard.state())
            assert all(each == states[0] for each in states) and model.guard.in_a_row == number
        taken = model.train_step(batches, next_token)
        assert not all(same(before, state(model))) and model.guard.in_a_row == 0
        assert math.isfinite(taken["loss"]) and math.isfinite(taken["grad_norm"])
        assert abs(taken["lr"] - (1e-2 - 4 * 9e-4)) < 1e-9  # that of step 4 of 10


if __name__ == "__main__":
    main(sys.argv[1])
