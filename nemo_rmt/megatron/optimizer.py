"""Megatron's optimizer and learning-rate schedule from the recipe."""

from __future__ import annotations

import torch
from megatron.core.optimizer import ChainedOptimizer, OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from torch import nn

from nemo_rmt.config import Model, Optim, Parallel
from nemo_rmt.megatron.cpu import redirected
from nemo_rmt.megatron.model import DTYPES

# Megatron's name of each of our decays after warm-up.
DECAY_STYLES = {"constant": "constant", "linear": "linear", "cosine": "cosine", "one_minus_sqrt": "WSD"}


def build_optimizer(optim: Optim, model: Model, parallel: Parallel, chunks: list[nn.Module]) -> ChainedOptimizer:
    """Adam over the DDP-wrapped model chunks, states sharded over data-parallel ranks when the recipe says so."""
    dtype = DTYPES[model.precision]
    config = OptimizerConfig(
        optimizer="adam",
        lr=optim.lr,
        min_lr=optim.min_lr,
        weight_decay=optim.weight_decay,
        adam_beta1=optim.beta1,
        adam_beta2=optim.beta2,
        adam_eps=optim.epsilon,
        clip_grad=optim.clip_grad,
        bf16=dtype == torch.bfloat16,
        params_dtype=dtype,
        use_distributed_optimizer=parallel.distributed_optimizer,
    )
    with redirected():
        optimizer = get_megatron_optimizer(config, chunks)
    if not torch.cuda.is_available():
        # On the CPU torch's AdamW would do a dozen small operations for each parameter, one parameter at a time.
        for group in optimizer.param_groups:
            group["fused"] = True
    return optimizer


def update_weights(optimizer: ChainedOptimizer, grad_norm: float) -> None:
    """The rest of ``optimizer.step()``, which would start over, once gradients are prepared and their norm is known."""
    with redirected():
        for part in optimizer.chained_optimizers:
            parameters = part.get_parameters()
            if part.config.clip_grad > 0 and parameters:
                clip_grad_by_total_norm_fp32(parameters, max_norm=part.config.clip_grad, total_norm=grad_norm)
        optimizer.step_with_ready_grads()


def build_scheduler(optim: Optim, optimizer: ChainedOptimizer, steps: int) -> OptimizerParamScheduler:
    """Linear warm-up, then constant, or a decay that reaches min_lr as the last of ``steps`` steps is done.

    Step n (from 0) of a warm-up of w runs at lr·(n+1)/(w+1): no step is spent at a learning rate of 0.
    """
    warmup = min(optim.warmup_steps, steps - 1)
    return OptimizerParamScheduler(
        optimizer,
        init_lr=optim.lr / (warmup + 1) if warmup else 0.0,
        max_lr=optim.lr,
        min_lr=optim.min_lr,
        lr_warmup_steps=warmup,
        lr_decay_steps=steps,
        lr_decay_style=DECAY_STYLES[optim.schedule],
        start_wd=optim.weight_decay,
        end_wd=optim.weight_decay,
        wd_incr_steps=steps,
        wd_incr_style="constant",
        wsd_decay_steps=steps - warmup,
        lr_wsd_decay_style="minus_sqrt",
    )


def prepare_for_loading(optimizer: ChainedOptimizer) -> None:
    """Give torch's AdamW the state it lacks before its first step, so that a checkpoint has somewhere to go.

    Only for the distributed optimizer without Transformer Engine or Apex, whose sharded_state_dict asserts otherwise
    (distrib_optimizer.py:642 of 0.16.1).
    """
    for part in optimizer.chained_optimizers:
        if not isinstance(part, DistributedOptimizer) or not isinstance(part.optimizer, torch.optim.AdamW):
            continue
        for group in part.optimizer.param_groups:
            for param in group["params"]:
                part.optimizer.state[param] = {
                    "step": torch.tensor(0.0),
                    "exp_avg": torch.zeros_like(param.data),
                    "exp_avg_sq": torch.zeros_like(param.data),
                }
