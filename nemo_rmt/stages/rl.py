"""Reinforcement learning on verifiable tasks with GRPO."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from nemo_rmt.config import Recipe
from nemo_rmt.data.batch import TokenBatch
from nemo_rmt.data.tasks import Problem, TaskFamily, guarded_score
from nemo_rmt.data.tree import BRANCH_MASK, TokenTree
from nemo_rmt.errors import UserError
from nemo_rmt.megatron.head import TokenScores
from nemo_rmt.megatron.runtime import max_over_data_parallel, sum_over_data_parallel
from nemo_rmt.objectives import LossOutput, group_advantages, standard_deviation
from nemo_rmt.profiling import part
from nemo_rmt.rollout.engine import Rollout, Sampling
from nemo_rmt.stages.policy import attach, packed_responses, policy_loss, response_branch
from nemo_rmt.stages.rollouts import Sampler, sampler
from nemo_rmt.stages.session import Session
from nemo_rmt.stages.training import Training


@dataclass
class ScoredRollouts:
    """One step's responses on this data-parallel rank, group after group, ``[groups * G]`` each."""

    rollouts: list[Rollout]
    rewards: torch.Tensor
    """float32 ``[groups, G]``."""
    advantages: torch.Tensor
    """float32 ``[groups, G]``."""
    scoring_errors: int


def grpo_objective(recipe: Recipe):
    """GRPO on packed responses, or on rows of one each, see ``policy_loss``."""

    def objective(scores: TokenScores, batch: TokenBatch) -> LossOutput:
        mask = batch.extras.get(BRANCH_MASK, batch.loss_mask)
        return policy_loss(scores, batch, mask, recipe.rl.grpo, recipe.rollout, response_ids=batch.branch_ids)

    return objective


def run(session: Session) -> None:
    """Improve the given checkpoint on the tasks' verifier rewards."""
    grpo = session.recipe.rl.grpo
    if not session.tasks:
        raise UserError("data.tasks is empty: stage rl needs at least one task with a verifier")
    start = session.require_input("checkpoint")
    reference = session.frozen_model(start) if grpo.kl_coefficient else None
    training = Training(session, start, updates_per_step=grpo.updates_per_rollout)
    objective, rollout = grpo_objective(session.recipe), session.recipe.rollout
    with sampler(session, training) as sampling:
        for step, scored in sampling.steps(lambda step: sample_and_score(session, sampling, step)):
            with part("data"):
                batch, size = pack(session, scored)
            if reference is not None:
                attach(batch, "reference_logprobs", reference.score(batch, size, temperature=rollout.temperature))
            if grpo.updates_per_rollout > 1:  # strictly on-policy, the old log-probabilities are the policy's own
                attach(batch, "old_logprobs", training.model.score(batch, size, temperature=rollout.temperature))
            micro_batches = batch.micro_batches(size)
            for _ in range(grpo.updates_per_rollout):
                metrics = training.model.train_step(
                    micro_batches, objective, temperature=rollout.temperature, with_entropy=True
                )
            metrics |= sampling.compare(metrics, micro_batches)
            rollout_metrics, tokens = summarise(session, scored)
            training.record(
                {**metrics, **rollout_metrics},
                tokens=tokens,
                samples=lambda step=step: [(index, f"{task.name}:{index}") for index, task in turns(session, step)],
            )


def turns(session: Session, step: int) -> list[tuple[int, TaskFamily]]:
    """The indices of this rank's problems of a step, one per group, and the tasks they are of, which take turns."""
    groups = session.settings.global_batch_size // session.recipe.rl.grpo.samples_per_group
    indices = [step * groups + index for index in session.shard(groups)]
    return [(index, session.tasks[index % len(session.tasks)]) for index in indices]


def draw_problems(session: Session, step: int) -> list[tuple[TaskFamily, Problem]]:
    """This rank's problems of a step."""
    seed = session.seed("rl", session.job.iteration)
    return [(task, task.problem("train", seed, index)) for index, task in turns(session, step)]


def sample_and_score(session: Session, sampler: Sampler, step: int) -> Callable[[], ScoredRollouts]:
    """Ask for G responses to every problem of a step; what is returned waits for them, for their rewards and
    group-relative advantages."""
    grpo, rollout, tokenizer = session.recipe.rl.grpo, session.recipe.rollout, session.tokenizer
    size, problems = grpo.samples_per_group, draw_problems(session, step)
    prompts = [tokenizer.chat_prompt([{"role": "user", "content": problem.question}]) for _, problem in problems]
    first = step * session.settings.global_batch_size + session.shard(session.settings.global_batch_size).start
    pending = sampler.engine.submit(
        [prompt for prompt in prompts for _ in range(size)],
        list(range(first, first + size * len(prompts))),
        Sampling(
            max_new_tokens=rollout.max_new_tokens,
            stop_tokens=frozenset({tokenizer.eod}),
            seed=session.seed("rollout", session.job.iteration),
            temperature=rollout.temperature,
            top_p=rollout.top_p,
        ),
    )

    def score() -> ScoredRollouts:
        rollouts = pending()
        sampler.require_fresh(rollouts)
        texts = [response_text(session, rollout) for rollout in rollouts]
        scores = [guarded_score(*problems[index // size], text) for index, text in enumerate(texts)]
        rewards = torch.tensor([score for score, _ in scores]).view(-1, size)
        return ScoredRollouts(
            rollouts=rollouts,
            rewards=rewards,
            advantages=group_advantages(rewards, normalize_std=grpo.normalize_std),
            scoring_errors=sum(errored for _, errored in scores),
        )

    return score


def response_text(session: Session, rollout: Rollout) -> str:
    """The response without its stop token."""
    return session.tokenizer.decode(rollout.response[:-1] if rollout.finished else rollout.response)


def pack(session: Session, scored: ScoredRollouts) -> tuple[TokenBatch, int]:
    """Rows with the loss on the responses, and how many of them make a micro-batch, with as many micro-batches on every
    rank: trees of a prompt and its responses, or, without rl.pack, one response in each row.

    With ``drop_zero_variance`` responses of groups without a signal cost neither compute nor denominator.
    """
    groups = list(range(len(scored.rewards)))
    if session.settings.grpo.drop_zero_variance:
        varied = (scored.rewards != scored.rewards[:, :1]).any(dim=1).tolist()
        groups = [group for group in groups if varied[group]]
    if session.settings.pack:
        return packed_responses(session, [tree_of(scored, group) for group in groups])
    return padded_responses(session, scored, groups), session.settings.micro_batch_size


def tree_of(scored: ScoredRollouts, group: int) -> TokenTree:
    """A prompt and its responses. The prompt's last token, from which their first is predicted, begins each of them."""
    advantages = scored.advantages[group].tolist()
    rollouts = scored.rollouts[group * len(advantages) : (group + 1) * len(advantages)]
    prompt = rollouts[0].prompt
    fork = len(prompt) - 1
    branches = [
        response_branch(fork, prompt[fork:], rollout.response, rollout.logprobs, advantage)
        for rollout, advantage in zip(rollouts, advantages, strict=True)
    ]
    trunk = prompt[:fork] or prompt  # a trunk is at least a token, seen or not
    return TokenTree(trunk, branches, [0.0] * len(trunk))


def padded_responses(session: Session, scored: ScoredRollouts, groups: list[int]) -> TokenBatch:
    """A prompt and a response in each row. Rows that fill up the last micro-batch carry no loss."""
    size, settings = scored.rewards.shape[1], session.settings
    kept = [group * size + sample for group in groups for sample in range(size)]
    rows = session.whole_rows(int(max_over_data_parallel(max(1, len(kept)))), settings.micro_batch_size)
    examples, advantages, logprobs = [], [], []
    for index in kept:
        rollout = scored.rollouts[index]
        response = [1.0] * len(rollout.response)
        examples.append((rollout.prompt + rollout.response, [0.0] * len(rollout.prompt) + response))
        advantages.append(float(scored.advantages.view(-1)[index]))
        logprobs.append(rollout.logprobs)
    filler = scored.rollouts[0].prompt + scored.rollouts[0].response
    for _ in range(rows - len(examples)):
        examples.append((filler, [0.0] * len(filler)))
        advantages.append(0.0)
        logprobs.append([])
    batch = session.padded_batch(examples, settings.sequence_length)
    batch.extras["advantages"] = torch.tensor(advantages, device=batch.tokens.device)[:, None] * batch.loss_mask
    sampled = torch.zeros_like(batch.loss_mask)
    sampled[batch.loss_mask.bool()] = torch.tensor([value for row in logprobs for value in row], device=sampled.device)
    batch.extras["rollout_logprobs"] = sampled
    return batch


def summarise(session: Session, scored: ScoredRollouts) -> tuple[dict[str, float], int]:
    """The step's rollout metrics and its tokens (prompts and responses), over all ranks."""
    rewards, rollouts = scored.rewards, scored.rollouts
    total = sum_over_data_parallel(
        {
            "responses": len(rollouts),
            "groups": len(rewards),
            "reward": rewards.sum().item(),
            "reward_square": rewards.square().sum().item(),
            "length": sum(len(rollout.response) for rollout in rollouts),
            "prompt": sum(len(rollout.prompt) for rollout in rollouts),
            "flat": (rewards == rewards[:, :1]).all(dim=1).sum().item(),
            "finished": sum(rollout.finished for rollout in rollouts),
            "errors": scored.scoring_errors,
        }
    )
    count = total["responses"]
    mean = total["reward"] / count
    metrics = {
        "rl/reward_mean": mean,
        "rl/reward_std": standard_deviation(mean, total["reward_square"] / count),
        "rl/response_length": total["length"] / count,
        "rl/zero_variance_groups": total["flat"] / total["groups"],
        "rl/finished": total["finished"] / count,
        "rl/scoring_errors": total["errors"],
    }
    return metrics, int(total["length"] + total["prompt"])
