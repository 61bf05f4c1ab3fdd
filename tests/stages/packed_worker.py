"""Assert on every rank that packed rows train as padded ones: losses, metrics and gradients, for SFT and for RL.

usage: packed_worker.py OUT.json RECIPE (as JSON) DATA_FOLDER. Rank 0 writes the packed steps' metrics.
"""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from nemo_rmt.config import Optim, Recipe
from nemo_rmt.data.batch import TokenBatch
from nemo_rmt.megatron.model import build_model
from nemo_rmt.megatron.runtime import distributed, gather_over_ranks
from nemo_rmt.megatron.train_step import ScoredModel, TrainedModel
from nemo_rmt.objectives import group_advantages
from nemo_rmt.rollout.engine import Rollout
from nemo_rmt.stages import rl, sft
from nemo_rmt.stages.job import StageJob
from nemo_rmt.stages.policy import attach
from nemo_rmt.stages.pretrain import next_token
from nemo_rmt.stages.session import Session

TEMPERATURE, TOLERANCE = 0.8, 1e-5
PROMPTS = (1, 40, 2, 25, 3, 9, 33, 12)
"""Tokens of the groups' prompts."""
REWARDS = ([1, 0, 0, 0], [0, 0, 0, 0], [1, 1, 0, 0], [0.5, 1, 0, 1], [1, 1, 1, 1], [1, 0, 1, 0], [0, 1, 0, 0], [1] * 4)
CONVERSATIONS = (3, 60, 8, 5, 12, 31, 4, 7)
"""Their tokens."""


def drawn(rng: random.Random, count: int) -> list[int]:
    return [rng.randrange(4, 290) for _ in range(count)]


def scored(session: Session) -> rl.ScoredRollouts:
    """This rank's groups: responses of 1 to 20 tokens."""
    rng, rollouts = random.Random(3), []
    for prompt in PROMPTS:
        tokens = drawn(rng, prompt)
        for _ in range(4):
            size = rng.randint(1, 20)
            rollouts.append(Rollout(tokens, drawn(rng, size), [rng.uniform(-8, -1) for _ in range(size)], True))
    mine = session.shard(len(PROMPTS))
    rewards = torch.tensor([[float(reward) for reward in REWARDS[group]] for group in mine])
    return rl.ScoredRollouts(rollouts[4 * mine.start : 4 * mine.stop], rewards, group_advantages(rewards), 0)


def conversations(session: Session) -> list[tuple[list[int], list[int]]]:
    """This rank's: the second half of each is the assistant's."""
    rng = random.Random(4)
    every = [(drawn(rng, size), [0] * (size // 2) + [1] * (size - size // 2)) for size in CONVERSATIONS]
    return [every[index] for index in session.shard(len(every))]


def fresh(session: Session, seed: int) -> TrainedModel:
    """A model that does not clip, of this seed's weights."""
    torch.manual_seed(seed)
    chunks = build_model(session.recipe.model, session.recipe.parallel, session.vocab_size)
    return TrainedModel(chunks, session.recipe.model, session.recipe.parallel, Optim(lr=1e-3, clip_grad=0), steps=2)


def rl_step(session: Session, model: TrainedModel, reference: ScoredModel) -> tuple[dict, TokenBatch]:
    """A step as the stage takes it, off-policy against ``reference``; its metrics and its batch."""
    batch, size = rl.pack(session, scored(session))
    for name in ("reference_logprobs", "old_logprobs"):
        attach(batch, name, reference.score(batch, size, temperature=TEMPERATURE))
    micro_batches = batch.micro_batches(size)
    objective = rl.grpo_objective(session.recipe)
    metrics = model.train_step(micro_batches, objective, temperature=TEMPERATURE, with_entropy=True)
    if session.layout.is_last_stage:
        errors = max(micro.extras["logprob_error"].max().item() for micro in micro_batches)
        metrics["logprob_error_max"] = max(gather_over_ranks(errors))
    else:
        metrics["logprob_error_max"] = max(gather_over_ranks(0.0))
    return metrics, batch


def sft_step(session: Session, model: TrainedModel, reference: ScoredModel) -> tuple[dict, TokenBatch]:
    batch, size = sft.pack(session, conversations(session))
    return model.train_step(batch.micro_batches(size), next_token), batch


def check(session: Session, step: Callable[..., tuple[dict, TokenBatch]]) -> dict[str, float]:
    """The metrics of a packed step, which are those of a padded one; so are the gradients of this rank's parameters."""
    reference, models, found = fresh(session, 6), [], []
    for packed in (True, False):
        session.settings.pack = packed
        models.append(fresh(session, 5))
        metrics, batch = step(session, models[-1], reference)
        found.append((metrics, batch))
    (metrics, packed), (expected, padded) = found
    cells = [sum(gather_over_ranks(batch.tokens.numel())) for batch in (packed, padded)]
    assert cells[0] < 0.7 * cells[1], cells
    assert metrics.keys() == expected.keys() and metrics["grad_norm"] > 0.01
    for name, value in expected.items():
        assert abs(metrics[name] - value) <= TOLERANCE * max(1.0, abs(value)), (name, metrics[name], value)
    for chunk, other in zip(models[0].modules, models[1].modules, strict=True):
        theirs = dict(other.named_parameters())
        for name, parameter in chunk.named_parameters():
            error = (parameter.main_grad - theirs[name].main_grad).norm() / theirs[name].main_grad.norm()
            assert error < TOLERANCE, f"{name}: gradients differ by {error:.1e} of their norm"
    return metrics


def main(out: Path, recipe: Recipe, data: Path) -> None:
    results = []
    with distributed(recipe.parallel, seed=5) as layout:

        def session(stage: str) -> Session:
            job = StageJob(stage=stage, iteration=0, run_dir="../..", inputs={"data": str(data)}, recipe=recipe)
            return Session(job, out.parent / stage, layout)

        results.append(check(session("sft"), sft_step))
        for drop, normalize in ((True, "token"), (False, "token"), (True, "sequence")):
            recipe.rl.grpo.drop_zero_variance, recipe.rl.grpo.normalize = drop, normalize
            results.append(check(session("rl"), rl_step))
        if layout.rank == 0:
            out.write_text(json.dumps(results))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Recipe.model_validate_json(sys.argv[2]), Path(sys.argv[3]))
