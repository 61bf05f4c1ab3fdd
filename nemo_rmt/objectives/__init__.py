"""The papers' formulas on log-probabilities: pure functions of tensors, torch only."""

from nemo_rmt.objectives.budget import token_budget
from nemo_rmt.objectives.curriculum import tier_probabilities
from nemo_rmt.objectives.distill import distill_loss
from nemo_rmt.objectives.grpo import group_advantages, grpo_loss
from nemo_rmt.objectives.ntp import ntp_loss
from nemo_rmt.objectives.output import LossOutput, Metric
from nemo_rmt.objectives.remit import remit_metrics, remit_weights, standard_deviation
from nemo_rmt.objectives.reward import combined_reward, length_reward
from nemo_rmt.objectives.rho1 import rho1_selection
from nemo_rmt.objectives.rmt import rmt_loss
from nemo_rmt.objectives.statistics import Interval, mean_interval, pass_at_k, wilson_interval
from nemo_rmt.objectives.tiers import assign_tiers, tier_edges

__all__ = [
    "Interval",
    "LossOutput",
    "Metric",
    "assign_tiers",
    "combined_reward",
    "distill_loss",
    "group_advantages",
    "grpo_loss",
    "length_reward",
    "mean_interval",
    "ntp_loss",
    "pass_at_k",
    "remit_metrics",
    "remit_weights",
    "rho1_selection",
    "rmt_loss",
    "standard_deviation",
    "tier_edges",
    "tier_probabilities",
    "token_budget",
    "wilson_interval",
]
