"""grpo_loss against the loss of trl's GRPOTrainer, its own code on the same tensors."""

from __future__ import annotations

import types
from collections import defaultdict

import pytest
import torch

from nemo_rmt.objectives import grpo_loss

LOSS_TYPES = {"token": ["dapo", "bnpo"], "sequence": ["grpo"]}
CLIPS = [(0.2, 0.2), (0.2, 0.28), (0.1, 0.05)]


@pytest.fixture(scope="module")
def grpo_trainer():
    """trl's trainer, imported when a test needs it: that takes seconds."""
    reason = "trl is not installed (it needs Python 3.11)"
    return pytest.importorskip("trl.trainer.grpo_trainer", reason=reason).GRPOTrainer


def rollouts(rows: int = 5, length: int = 7) -> dict[str, torch.Tensor]:
    """Ratios on both sides of the clip, responses of every length from 1 on."""
    generator = torch.Generator().manual_seed(0)
    old = -2 * torch.rand(rows, length, generator=generator)
    policy, reference, sampler = (old + 0.3 * torch.randn(rows, length, generator=generator) for _ in range(3))
    lengths = torch.tensor([length, 1, 4, 2, length])
    return {
        "policy": policy,
        "old": old,
        "reference": reference,
        "sampler": sampler,
        "advantages": torch.randn(rows, generator=generator),
        "mask": (torch.arange(length) < lengths[:, None]).float(),
    }


def loss_of_trl(grpo_trainer, data: dict[str, torch.Tensor], loss_type: str, low: float, high: float, beta: float, cap):
    """The loss, its gradient with respect to the policy's log-probabilities, and the trainer's metrics."""
    policy = data["policy"].clone().requires_grad_()
    accelerator = types.SimpleNamespace(
        num_processes=1, gather=lambda tensor: tensor, reduce=lambda tensor, reduction: tensor
    )
    # What _compute_loss reads, as GRPOConfig's defaults have it.
    trainer = types.SimpleNamespace(
        args=types.SimpleNamespace(use_bias_correction_kl=False, delta=None, steps_per_generation=1),
        accelerator=accelerator,
        model=types.SimpleNamespace(training=True),
        current_gradient_accumulation_steps=1,
        loss_type=loss_type,
        importance_sampling_level="token",
        epsilon_low=low,
        epsilon_high=high,
        beta=beta,
        use_vllm=cap is not None,
        vllm_importance_sampling_correction=cap is not None,
        top_entropy_quantile=1.0,
        off_policy_mask_threshold=None,
        aux_loss_enabled=False,
        _entropy_bonus_enabled=False,
        _metrics={"train": defaultdict(list)},
        _get_per_token_logps_and_entropies=lambda *_, **__: (policy, torch.zeros_like(policy), None),
    )
    tokens = torch.zeros_like(policy, dtype=torch.long)
    inputs = {
        "prompt_ids": tokens[:, :1],
        "prompt_mask": tokens[:, :1],
        "completion_ids": tokens,
        "completion_mask": data["mask"],
        "advantages": data["advantages"],
        "old_per_token_logps": data["old"],
        "ref_per_token_logps": data["reference"],
        "importance_sampling_ratio": (data["old"] - data["sampler"]).exp().clamp(max=cap or 1.0),
        "num_items_in_batch": data["mask"].sum(),
    }
    loss = grpo_trainer._compute_loss(trainer, trainer.model, inputs)
    (gradient,) = torch.autograd.grad(loss, policy)
    return loss, gradient, {name: values[-1] for name, values in trainer._metrics["train"].items()}


@pytest.mark.parametrize("cap", [None, 1.1], ids=["", "truncated_importance_sampling"])
@pytest.mark.parametrize("beta", [0.0, 0.05])
@pytest.mark.parametrize(("low", "high"), CLIPS)
@pytest.mark.parametrize(("normalize", "loss_type"), [(ours, trl) for ours in LOSS_TYPES for trl in LOSS_TYPES[ours]])
def test_value_and_gradient_equal_those_of_trl(grpo_trainer, normalize, loss_type, low, high, beta, cap):
    data = rollouts()
    policy = data["policy"].clone().requires_grad_()
    output = grpo_loss(
        policy,
        data["old"],
        data["advantages"],
        data["mask"],
        clip_low=low,
        clip_high=high,
        normalize=normalize,
        kl_coefficient=beta,
        reference_logprobs=data["reference"] if beta else None,
        rollout_logprobs=data["sampler"] if cap else None,
        importance_cap=cap,
    )
    loss = output.loss_sum / output.num_tokens
    (gradient,) = torch.autograd.grad(loss, policy)
    expected, expected_gradient, metrics = loss_of_trl(grpo_trainer, data, loss_type, low, high, beta, cap)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-5, atol=1e-7)
    found = {name: (total / count).item() for name, (total, count) in output.metrics.items()}
    assert 0 < found["clip_share"] == pytest.approx(metrics["clip_ratio/region_mean"])
    assert found.get("kl") == pytest.approx(metrics.get("kl"))
