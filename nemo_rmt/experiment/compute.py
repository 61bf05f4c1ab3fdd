"""FLOPs and tokens of a finished chain, and the steps that make one chain cost as much as another.

A token that is trained on counts three forwards, one that is sampled, prefilled or scored by a frozen model one. A
forward is that of ``nemo_rmt.model_flops`` with the stage's sequence_length as context, the convention of train/mfu.
What nobody learns from is not counted: building data, evaluating. Nor is what others made: checkpoints and caches from
outside. A chain's cost is that of the stages its last iteration's models were made from, each once: the RL that made
ReMiT's reference belongs to it, an earlier iteration that nothing was taken from does not.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemo_rmt.compatibility import model_vocab_size
from nemo_rmt.config import GRPO, Recipe
from nemo_rmt.experiment.shared import Chain, SharedStage, ancestors, made_from, stretched
from nemo_rmt.model_flops import forward_flops
from nemo_rmt.tracking import read_metrics

Folder = Callable[[SharedStage], Path]
"""Where a stage's results are."""


@dataclass(frozen=True)
class Cost:
    """What was spent."""

    tokens: float = 0.0
    """Trained on: corpora, conversations, prompts and sampled responses."""
    flops: float = 0.0

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.tokens + other.tokens, self.flops + other.flops)


def chain_cost(chain: Chain, folder: Folder) -> Cost:
    """Of what the last iteration's models were made from, which must be done."""
    costs = (stage_cost(stage, folder) for stage in made(chain).values())
    return sum(costs, Cost())


def made(chain: Chain) -> dict[str, SharedStage]:
    """The stages that the last iteration's models were made from, these included."""
    return ancestors(list(chain.values())[-1])


def stage_cost(stage: SharedStage, folder: Folder) -> Cost:
    """Of a stage that is done."""
    if stage.stage in ("data", "evaluate"):
        return Cost()
    result = _result(folder(stage))
    steps = read_metrics(folder(stage) / "metrics.jsonl")
    tokens, data = result["tokens"], _result(folder(stage.inputs["data"]))["metrics"]
    forwards: float = 3 * tokens
    if stage.stage == "anneal":
        forwards = anneal_forwards(stage) * tokens
    elif stage.stage == "rl":
        forwards = rl_forwards(stage.recipe, steps)
    elif stage.stage == "rmt":
        forwards = rmt_forwards(stage.recipe, tokens, steps, data)
    return Cost(tokens, forwards * _forward(stage, data))


def anneal_forwards(stage: SharedStage) -> int:
    """Forwards per token of an anneal: its own three, and one of each model beside it. Cached numbers cost nothing."""
    remit = stage.recipe.anneal.remit
    frozen = stage.recipe.anneal.objective == "remit" and remit.gap_model == "frozen"
    return 3 + ("reference" in stage.inputs) + frozen


def rl_forwards(recipe: Recipe, steps: list[dict[str, Any]]) -> float:
    """Token forwards of RL. A prompt is prefilled once for its group, and trained on once where rows are packed; groups
    without a signal are sampled but, with drop_zero_variance, not trained on."""
    settings, grpo, before, total = recipe.rl, recipe.rl.grpo, 0.0, 0.0
    for step in steps:
        count, before = step["train/tokens"] - before, step["train/tokens"]  # each response with its prompt
        responses = step["rl/response_length"] * settings.global_batch_size
        prompts = (count - responses) / grpo.samples_per_group
        trained = responses + prompts * (1 if settings.pack else grpo.samples_per_group)
        if grpo.drop_zero_variance:
            trained *= 1 - step["rl/zero_variance_groups"]
        total += responses + prompts + _forwards_per_update(grpo) * trained
    return total


def rmt_forwards(recipe: Recipe, tokens: float, steps: list[dict[str, Any]], data: dict[str, float]) -> float:
    """Token forwards of RMT: training, sampling, and finding how hard each token is."""
    settings = recipe.rmt
    trained = 3 if settings.objective == "ntp" else _forwards_per_update(settings.grpo)
    sampled = sum(step.get("rmt/rollout_tokens", 0.0) for step in steps)
    scored = 0.0
    if settings.difficulty.scores is None:
        named = settings.corpora
        corpora = [c for c in recipe.data.corpora if (c.name in named if named else c.weight)]
        scored = sum(data[f"data/{corpus.name}/train_tokens"] for corpus in corpora)
        scored = min(scored, settings.difficulty.max_tokens or math.inf)
    return trained * tokens + sampled + scored


def _forwards_per_update(grpo: GRPO) -> int:
    """Per token that is trained on: its updates, and the models that score it before."""
    return 3 * grpo.updates_per_rollout + (grpo.updates_per_rollout > 1) + (grpo.kl_coefficient > 0)


def equal_flops_steps(recipe: Recipe, chain: Chain, other: Chain, folder: Folder) -> int:
    """Steps of the chain's ``stretched`` stage with which it costs no less than another chain, which must be done.

    chain: with the recipe's own steps, its stages before that one done. What follows it is not there yet: it is taken
    to cost what the other chain's stage of the same place did (nothing, where it has none).
    """
    ref = stretched(recipe)
    later = made_from(recipe, ref)
    needed = chain_cost(other, folder).flops
    after = {chain[each].name for each in later}
    for name, stage in made(chain).items():
        if name not in after:
            needed -= stage_cost(stage, folder).flops
    paid = made(other)
    for each in later:
        if each != ref and each in other and other[each].name in paid:
            needed -= stage_cost(other[each], folder).flops
    own, step = step_cost(chain[ref], other.get(ref), folder)
    steps = getattr(recipe, ref.stage).steps
    return max(steps, math.ceil((needed - own) / step - 1e-9))  # a rounding error is no step


def step_cost(stage: SharedStage, other: SharedStage | None, folder: Folder) -> tuple[float, float]:
    """FLOPs of a stage before its first step, and of each step.

    An RMT stage that only predicts next tokens reads as many of them a step, on average, as the other chain's RMT did.
    """
    data = _result(folder(stage.inputs["data"]))["metrics"]
    forward = _forward(stage, data)
    if stage.stage == "anneal":
        settings = stage.recipe.anneal
        return 0.0, settings.global_batch_size * settings.sequence_length * anneal_forwards(stage) * forward
    documents = [step["rmt/document_tokens"] for step in read_metrics(folder(other) / "metrics.jsonl")]
    return rmt_forwards(stage.recipe, 0, [], data) * forward, 3 * statistics.fmean(documents) * forward


def _forward(stage: SharedStage, data: dict[str, float]) -> float:
    """FLOPs of one token's forward in a stage. data: metrics of the data stage."""
    model = stage.recipe.model
    rows = model_vocab_size(model, int(data["tokenizer/vocab_size"]))
    return sum(forward_flops(model, rows, getattr(stage.recipe, stage.stage).sequence_length))


def _result(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "result.json").read_text())
