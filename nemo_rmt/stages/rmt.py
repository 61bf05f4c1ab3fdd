"""Reinforcement mid-training on unlabelled text (RMT, arXiv 2509.24375).

Tokens picked by difficulty are predicted after a short thought, rewarded when they are the corpus's and the thought is
as long as asked; all other tokens of the same documents get plain next-token prediction, in the same forward.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from nemo_rmt.config import RMT, TIERS, Rollout
from nemo_rmt.data.batch import TokenBatch
from nemo_rmt.data.tree import BRANCH_MASK, Branch, TokenTree
from nemo_rmt.megatron.head import TokenScores
from nemo_rmt.megatron.runtime import sum_over_data_parallel
from nemo_rmt.objectives import LossOutput, group_advantages, ntp_loss, rmt_loss, standard_deviation
from nemo_rmt.profiling import part
from nemo_rmt.stages.curriculum import Curriculum, Origin
from nemo_rmt.stages.policy import attach, packed_responses, policy_loss, response_branch
from nemo_rmt.stages.pretrain import next_token
from nemo_rmt.stages.reasoning import Answers, Question, ask, rewards_of, step_budget
from nemo_rmt.stages.rollouts import Sampler, sampler
from nemo_rmt.stages.session import Session
from nemo_rmt.stages.training import Training


@dataclass(frozen=True)
class Round:
    """Documents of this data-parallel rank, what was asked about them, and what came of it."""

    documents: list[list[int]]
    questions: list[Question]
    answers: Answers
    rewards: Tensor
    """float32 ``[questions, samples]``."""
    length_rewards: Tensor
    """float32 ``[questions, samples]``, before weighting."""
    advantages: Tensor
    """float32 ``[questions, samples]``."""
    origins: list[Origin]
    """Where each document is from."""

    @property
    def varied(self) -> list[bool]:
        """For each question, whether some of its responses are better than others."""
        return (self.rewards != self.rewards[:, :1]).any(dim=1).tolist()


def run(session: Session) -> None:
    """Train the given checkpoint, with a fresh optimizer."""
    settings, rollout = session.settings, session.recipe.rollout
    start = session.require_input("checkpoint")
    curriculum = Curriculum(session, start)
    sampled = settings.objective == "rmt"
    reference = session.frozen_model(start) if sampled and settings.grpo.kl_coefficient else None
    training = Training(session, start, updates_per_step=settings.grpo.updates_per_rollout)
    curriculum.skip(training.done)
    if not sampled:
        return next_tokens_only(session, training, curriculum)
    temperature = rollout.temperature
    with sampler(session, training) as sampling:
        for step, rounds in sampling.steps(lambda step: think(session, sampling, curriculum, step)):
            with part("data"):
                batch, size, totals = pack(session, trees_of(rounds, settings))
            if reference is not None:
                attach(batch, "reference_logprobs", reference.score(batch, size, temperature=temperature))
            if settings.grpo.updates_per_rollout > 1:  # strictly on-policy, they are the policy's own
                attach(batch, "old_logprobs", training.model.score(batch, size, temperature=temperature))
            micro_batches, objective = batch.micro_batches(size), dual_objective(settings, rollout, totals)
            for _ in range(settings.grpo.updates_per_rollout):
                metrics = training.model.train_step(
                    micro_batches, objective, temperature=temperature, with_entropy=True
                )
            metrics |= sampling.compare(metrics, micro_batches)
            metrics |= summarise(session, rounds, step, curriculum.probabilities(step))
            training.record(
                metrics,
                tokens=totals["tokens"],
                samples=lambda rounds=rounds: [
                    p for asked in rounds for p in positions(asked.questions, asked.origins)
                ],
            )


def positions(questions: list[Question], origins: list[Origin]) -> list[tuple[int, str]]:
    """The tokens asked for as "corpus:document:position", by the question's number."""
    return [(question.number, origins[question.document].position(question.position)) for question in questions]


def think(session: Session, sampler: Sampler, curriculum: Curriculum, step: int) -> Callable[[], list[Round]]:
    """Ask a step's questions; what is returned waits for responses, rewards and group-relative advantages, and, where
    groups without variance are to be replaced, asks and waits for further rounds."""
    settings, rollout = session.settings, session.recipe.rollout
    budget, draws = step_budget(settings, step), curriculum.draw(step)

    def ask_round(number: int, limit: int) -> Callable[[], Round]:
        documents, questions, origins = curriculum.questions(draws[number], step, number, limit)
        pending = ask(
            settings,
            session.tokenizer,
            sampler.engine,
            documents,
            questions,
            budget=budget,
            samples=settings.grpo.samples_per_group,
            seed=session.seed("rollout", session.job.stage, session.job.iteration),
            temperature=rollout.temperature,
            top_p=rollout.top_p,
        )

        def answered() -> Round:
            answers = pending()
            sampler.require_fresh(answers.rollouts)
            rewards, length_rewards = rewards_of(answers, settings, budget)
            advantages = group_advantages(rewards, normalize_std=settings.grpo.normalize_std)
            return Round(documents, questions, answers, rewards, length_rewards, advantages, origins)

        return answered

    first = ask_round(0, settings.global_batch_size)

    def all_rounds() -> list[Round]:
        rounds, missing = [first()], settings.global_batch_size
        for number in range(1, len(draws)):
            missing -= int(sum_over_data_parallel({"varied": sum(rounds[-1].varied)})["varied"])
            if not missing:
                break
            rounds.append(ask_round(number, missing)())
        return rounds

    return all_rounds


def pack(session: Session, trees: list[TokenTree]) -> tuple[TokenBatch, int, dict[str, int]]:
    """This rank's share of all ranks' trees in rows, how many of them make a micro-batch, and the step's counts over
    all ranks: ``rl`` and ``ntp``, the two terms' normalisers, and ``tokens``, documents and branches together."""
    batch, size = packed_responses(session, trees)
    masks = [branch.mask for tree in trees for branch in tree.branches]
    by_response = session.settings.grpo.normalize == "sequence"
    counts = {
        "rl": sum(any(mask) if by_response else sum(mask) for mask in masks),
        "ntp": batch.loss_mask.sum().item(),
        "tokens": sum(tree.num_tokens for tree in trees),
    }
    totals = {name: int(value) for name, value in sum_over_data_parallel(counts).items()}
    return batch, size, totals


def trees_of(rounds: list[Round], settings: RMT) -> list[TokenTree]:
    """One tree per document: next-token prediction on all of it but the tokens asked for, a branch for every response.

    Groups without a signal have no branches when they are to be dropped; a document is cut after its last branch when
    nothing else of it is trained on.
    """
    documents: dict[tuple[int, ...], tuple[list[float], list[Branch]]] = {}  # a later round may ask about one again
    for each in rounds:
        keys = [tuple(document) for document in each.documents]
        for index, (question, varies) in enumerate(zip(each.questions, each.varied, strict=True)):
            key = keys[question.document]
            mask, branches = documents.setdefault(key, ([1.0] * len(key), []))
            mask[question.position] = 0.0
            if varies or not settings.grpo.drop_zero_variance:
                branches += branches_of(each, index, question.position)
    if settings.ntp_coefficient:
        return [TokenTree(document, branches, mask) for document, (mask, branches) in documents.items()]
    trees = []
    for document, (_, branches) in documents.items():
        if branches:
            trunk = document[: max(branch.position for branch in branches)]
            trees.append(TokenTree(trunk, branches, [0.0] * len(trunk)))
    return trees


def branches_of(each: Round, index: int, position: int) -> list[Branch]:
    """The responses to one question, trained on behind their prompt."""
    samples = each.rewards.shape[1]
    rollouts = each.answers.rollouts[index * samples : (index + 1) * samples]
    return [
        response_branch(position, rollout.prompt, rollout.response, rollout.logprobs, advantage)
        for rollout, advantage in zip(rollouts, each.advantages[index].tolist(), strict=True)
    ]


def dual_objective(
    settings: RMT, rollout: Rollout, totals: dict[str, int]
) -> Callable[[TokenScores, TokenBatch], LossOutput]:
    """GRPO on the branches and next-token prediction on the documents, each over its own global count."""

    def objective(scores: TokenScores, batch: TokenBatch) -> LossOutput:
        return rmt_loss(
            policy_loss(
                scores, batch, batch.extras[BRANCH_MASK], settings.grpo, rollout, response_ids=batch.branch_ids
            ),
            ntp_loss(scores.logprobs, batch.loss_mask),
            ntp_coefficient=settings.ntp_coefficient,
            rl_tokens=totals["rl"],
            ntp_tokens=totals["ntp"],
        )

    return objective


def next_tokens_only(session: Session, training: Training, curriculum: Curriculum) -> None:
    """The baseline: next-token prediction on the documents RMT would have asked about."""
    settings = session.settings
    for step in training.steps():
        with part("data"):
            asked = curriculum.draw(step)[0]
            documents, questions, origins = curriculum.questions(asked, step, 0, settings.global_batch_size)
            batch, size, totals = pack(session, [TokenTree(document, []) for document in documents])
        metrics = training.model.train_step(batch.micro_batches(size), next_token)
        training.record(
            {**metrics, "ntp/loss": metrics["loss"]},
            tokens=totals["tokens"],
            samples=lambda: positions(questions, origins),
        )


def summarise(session: Session, rounds: list[Round], step: int, targets: tuple[float, ...]) -> dict[str, float]:
    """What was asked and answered in a step, over all ranks; tiers that were not asked have a target only."""
    counted = ("documents", "document_tokens", "prompt_tokens", "response_tokens", "thought_tokens", "samples",
               "formatted", "reward", "reward_square", "length_reward", "flat")  # fmt: skip
    by_tier = [f"{name}/{tier}" for name in ("groups", "matches", "rewarded") for tier in TIERS]
    sums = dict.fromkeys([*counted, *by_tier], 0.0)
    for each in rounds:
        answers = each.answers
        for index, question in enumerate(each.questions):
            tier = TIERS[question.tier]
            sums[f"groups/{tier}"] += 1
            sums[f"matches/{tier}"] += answers.matches[index].mean().item()
            sums[f"rewarded/{tier}"] += bool(answers.matches[index].any())
        sums["documents"] += len(each.documents)
        sums["document_tokens"] += sum(len(document) for document in each.documents)
        sums["prompt_tokens"] += sum(len(rollout.prompt) for rollout in answers.rollouts)
        sums["samples"] += len(answers.rollouts)
        sums["thought_tokens"] += answers.lengths.sum().item()
        sums["response_tokens"] += sum(len(rollout.response) for rollout in answers.rollouts)
        sums["formatted"] += answers.formatted.sum().item()
        sums["reward"] += each.rewards.sum().item()
        sums["reward_square"] += each.rewards.square().sum().item()
        sums["length_reward"] += each.length_rewards.sum().item()
        sums["flat"] += len(each.questions) - sum(each.varied)
    total = sum_over_data_parallel(sums)
    count, groups = total["samples"], sum(total[f"groups/{tier}"] for tier in TIERS)
    mean = total["reward"] / count
    metrics = {
        "rmt/documents": total["documents"],
        "rmt/groups": groups,
        "rmt/zero_variance_groups": total["flat"] / groups,
        "rmt/think_length": total["thought_tokens"] / count,
        "rmt/response_length": total["response_tokens"] / count,
        "rmt/format_rate": total["formatted"] / count,
        "rmt/match_rate": sum(total[f"matches/{tier}"] for tier in TIERS) / groups,
        "rmt/length_reward": total["length_reward"] / count,
        "rmt/reward_mean": mean,
        "rmt/reward_std": standard_deviation(mean, total["reward_square"] / count),
        "rmt/document_tokens": total["document_tokens"],
        # what sampling computes: every document once, and each branch
        "rmt/rollout_tokens": total["document_tokens"] + total["prompt_tokens"] + total["response_tokens"],
    }
    budget = step_budget(session.settings, step)
    if budget is not None:
        metrics["rmt/budget"] = float(budget)
    for tier, target in zip(TIERS, targets, strict=True):
        metrics[f"rmt/target_{tier}"] = target
        asked = total[f"groups/{tier}"]
        if asked:
            metrics[f"rmt/share_{tier}"] = asked / groups
            metrics[f"rmt/match_{tier}"] = total[f"matches/{tier}"] / asked
            metrics[f"rmt/rewarded_{tier}"] = total[f"rewarded/{tier}"] / asked
    return metrics
