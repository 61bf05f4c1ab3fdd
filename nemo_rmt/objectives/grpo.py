"""Group-relative policy optimisation: GRPO (arXiv 2402.03300), DAPO (2503.14476), Dr. GRPO (2503.20783)."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from nemo_rmt.objectives.output import LossOutput, masked, mean_metric, require_same_shape


def group_advantages(rewards: Tensor, *, normalize_std: bool = True, epsilon: float = 1e-6) -> Tensor:
    """(r − mean) / (std + ε) within each group; float32 ``[groups, G]``, like ``rewards``.

    std is the population one. ``normalize_std=False`` leaves r − mean (Dr. GRPO). A group whose rewards are all
    equal gets exact zeros: rounding of its mean must not be divided by ε. Raises ValueError unless rewards is
    ``[groups, G]`` with G at least 2.
    """
    if rewards.dim() != 2 or rewards.shape[1] < 2:
        raise ValueError(f"rewards must be [groups, G] with G at least 2, got shape {list(rewards.shape)}")
    if not epsilon >= 0:
        raise ValueError(f"epsilon must not be negative, got {epsilon}")
    rewards = rewards.detach().float()
    centred = rewards - rewards.mean(-1, keepdim=True)
    if normalize_std:
        centred = centred / (rewards.std(-1, keepdim=True, unbiased=False) + epsilon)
    equal = (rewards == rewards[:, :1]).all(-1, keepdim=True)
    return torch.where(equal, torch.zeros_like(centred), centred)


def grpo_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    normalize: Literal["token", "sequence"] = "token",
    response_ids: Tensor | None = None,
    kl_coefficient: float = 0.0,
    reference_logprobs: Tensor | None = None,
    rollout_logprobs: Tensor | None = None,
    importance_cap: float | None = None,
) -> LossOutput:
    """−min(ρA, clip(ρ, 1−clip_low, 1+clip_high)·A) + β·k3, with ρ = exp(logprob − old logprob), over the mask.

    logprobs: ``[batch, sequence]``, nats, of the sampled tokens under the policy, with gradient.
    old_logprobs: the same under the policy before the first update on these rollouts; ``logprobs.detach()`` when
        strictly on-policy (one update per rollout).
    advantages: ``[batch, sequence]``, or ``[batch]`` for one advantage per row.
    mask: ``[batch, sequence]``, 0/1 over response tokens.
    normalize: ``token``: every token counts the same; num_tokens is the mask's count (DAPO). ``sequence``: every
        response counts the same; loss_sum adds the responses' own means and num_tokens is the number of responses
        with at least one masked token, so that the same division gives GRPO's mean over responses.
    response_ids: ``[batch, sequence]`` integers that tell the responses of a row apart, for ``sequence``; None: a row
        is one response.
    kl_coefficient, reference_logprobs: β and the KL's reference; k3 = exp(δ) − δ − 1, δ = reference − policy.
    rollout_logprobs, importance_cap: log-probabilities the sampler reported; the policy term (not the KL) is then
        multiplied by min(exp(old − rollout), cap), truncated importance sampling; without a cap, by the plain ratio.

    Metrics: ``loss``; ``ratio_mean``; ``clip_share``, the share of tokens whose gradient the clip removes; ``kl``
    (k3, nats) when a reference is given; ``importance_mean`` when rollout_logprobs is.
    Raises ValueError for other shapes or ranges, a KL without its reference, a cap without rollout_logprobs.
    """
    if advantages.dim() == 1 and logprobs.dim() == 2 and advantages.shape[0] == logprobs.shape[0]:
        advantages = advantages.unsqueeze(-1).expand_as(logprobs)
    require_same_shape(
        logprobs=logprobs,
        old_logprobs=old_logprobs,
        advantages=advantages,
        mask=mask,
        response_ids=response_ids,
        reference_logprobs=reference_logprobs,
        rollout_logprobs=rollout_logprobs,
    )
    _require_settings(clip_low, clip_high, normalize, kl_coefficient, reference_logprobs)
    if importance_cap is not None and (rollout_logprobs is None or not importance_cap > 0):
        raise ValueError(f"importance_cap must be above 0 and needs rollout_logprobs, got {importance_cap}")

    advantages, old_logprobs = masked(advantages.detach(), mask), old_logprobs.detach()
    ratio = masked(logprobs.float() - old_logprobs.float(), mask).exp()
    clipped = ratio.clamp(1 - clip_low, 1 + clip_high)
    loss = -torch.minimum(ratio * advantages, clipped * advantages)
    metrics = {
        "ratio_mean": mean_metric(ratio, mask),
        "clip_share": mean_metric((clipped * advantages < ratio * advantages).float(), mask),
    }
    if rollout_logprobs is not None:
        importance = masked(old_logprobs.float() - rollout_logprobs.detach().float(), mask).exp()
        importance = importance.clamp(max=importance_cap) if importance_cap is not None else importance
        loss = loss * importance
        metrics["importance_mean"] = mean_metric(importance, mask)
    if reference_logprobs is not None:
        delta = masked(reference_logprobs.detach().float() - logprobs.float(), mask)
        kl = delta.exp() - delta - 1
        loss = loss + kl_coefficient * kl
        metrics["kl"] = mean_metric(kl, mask)

    loss = masked(loss, mask)
    if normalize == "token":
        loss_sum, count = loss.sum(), mask.bool().sum()
    else:
        loss_sum, count = _sum_of_means(loss, mask, response_ids)
    metrics["loss"] = (loss_sum.detach(), count.float())
    return LossOutput(loss_sum, count, metrics)


def _sum_of_means(loss: Tensor, mask: Tensor, response_ids: Tensor | None) -> tuple[Tensor, Tensor]:
    """The responses' mean losses over their masked tokens, added, and how many responses have any."""
    rows = torch.arange(mask.shape[0], device=mask.device)[:, None].expand_as(mask)
    ids = torch.zeros_like(rows) if response_ids is None else response_ids
    kept = mask.bool()
    responses = torch.stack([rows[kept], ids[kept]], 1)
    found, response, tokens = responses.unique(dim=0, return_inverse=True, return_counts=True)
    return (loss[kept] / tokens[response]).sum(), torch.tensor(len(found), device=mask.device)


def _require_settings(
    clip_low: float, clip_high: float, normalize: str, kl_coefficient: float, reference_logprobs: Tensor | None
) -> None:
    if not 0 < clip_low < 1:
        raise ValueError(f"clip_low must be between 0 and 1, got {clip_low}")
    if not clip_high > 0:
        raise ValueError(f"clip_high must be above 0, got {clip_high}")
    if normalize not in ("token", "sequence"):
        raise ValueError(f"normalize must be 'token' or 'sequence', got {normalize!r}")
    if not kl_coefficient >= 0:
        raise ValueError(f"kl_coefficient must not be negative, got {kl_coefficient}")
    if kl_coefficient and reference_logprobs is None:
        raise ValueError(f"kl_coefficient={kl_coefficient} needs reference_logprobs")
