"""RMT's dual objective: reinforcement on the reasoned tokens, next-token prediction on the rest (arXiv 2509.24375)."""

from __future__ import annotations

from nemo_rmt.objectives.output import LossOutput, Metric


def rmt_loss(
    rl: LossOutput, ntp: LossOutput, *, ntp_coefficient: float = 0.1, rl_tokens: int, ntp_tokens: int
) -> LossOutput:
    """L_RL / N_RL + λ · L_NTP / N_NTP over a step of many micro-batches, for a trainer that divides only once.

    rl, ntp: the two losses of *one* micro-batch, from ``grpo_loss`` and ``ntp_loss``. Where it holds only one kind of
        token, the other is that loss of an all-zero mask, so that every micro-batch reports the same metrics.
    ntp_coefficient: λ.
    rl_tokens, ntp_tokens: N_RL and N_NTP, the totals of ``rl.num_tokens`` and ``ntp.num_tokens`` over all micro-batches
        and data-parallel ranks of the step, known from the masks before the first forward. With ``grpo_loss(normalize=
        "sequence")`` N_RL counts responses. A kind the whole step lacks has total 0 and contributes nothing.

    Megatron divides the gradient by one number, the total of num_tokens. A bare L_RL + λ·L_NTP would thus weigh RL
    by its share of the step's tokens, which changes with every rollout. So, with N = N_RL + N_NTP, a micro-batch i
    returns

        loss_sum_i = N / N_RL · L_RL,i + λ · N / N_NTP · L_NTP,i        num_tokens_i = n_RL,i + n_NTP,i

    num_tokens adds up to N however the step is split, and N cancels in Σ loss_sum / Σ num_tokens. The counts stay the
    true ones: a micro-batch with one kind of token, or with none, needs no special case, and λ = 0 (no NTP) gives
    L_RL / N_RL whatever the NTP mask.

    The dual objective, λ = 0.1 and that the tokens RL reasons about are left out of NTP (a matter of the masks given to
    ``ntp_loss``) are the paper's; the scaling by global counts is ours.

    Metrics: ``loss``, the dual loss; the terms' own as ``rl/<name>`` and ``ntp/<name>``, unscaled and with their own
    counts (a name that has a group keeps it). Raises ValueError for a negative coefficient or count.
    """
    if not ntp_coefficient >= 0:
        raise ValueError(f"ntp_coefficient must not be negative, got {ntp_coefficient}")
    for name, count in (("rl_tokens", rl_tokens), ("ntp_tokens", ntp_tokens)):
        if not count >= 0:
            raise ValueError(f"{name} must not be negative, got {count}")
    total = rl_tokens + ntp_tokens
    # A kind with total 0 has loss_sum 0; dividing by 1 keeps it 0, and makes a forgotten count show in the loss.
    loss_sum = total / max(rl_tokens, 1) * rl.loss_sum + ntp_coefficient * total / max(ntp_tokens, 1) * ntp.loss_sum
    num_tokens = rl.num_tokens + ntp.num_tokens
    metrics = {**_grouped("rl", rl), **_grouped("ntp", ntp)}
    metrics["loss"] = (loss_sum.detach(), num_tokens.float())
    return LossOutput(loss_sum, num_tokens, metrics)


def _grouped(group: str, output: LossOutput) -> dict[str, Metric]:
    return {name if "/" in name else f"{group}/{name}": metric for name, metric in output.metrics.items()}
