"""The papers' formulas on log-probabilities: pure functions of tensors, torch only."""

from nemo_rmt.objectives.grpo import group_advantages, grpo_loss
from nemo_rmt.objectives.ntp import ntp_loss
from nemo_rmt.objectives.output import LossOutput, Metric
from nemo_rmt.objectives.remit import remit_metrics, remit_weights, standard_deviation
from nemo_rmt.objectives.statistics import Interval, mean_interval, pass_at_k, wilson_interval
from nemo_rmt.objectives.tiers import assign_tiers, tier_edges

__all__ = [
    "Interval",
    "LossOutput",
    "Metric",
    "assign_tiers",
    "group_advantages",
    "grpo_loss",
    "mean_interval",
    "ntp_loss",
    "pass_at_k",
    "remit_metrics",
    "remit_weights",
    "standard_deviation",
    "tier_edges",
    "wilson_interval",
]
