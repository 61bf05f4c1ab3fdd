"""Asking a model for tokens of documents after a thought: prompts that branch off, responses, what they hold.

RMT trains on the answers; evaluation counts them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from nemo_rmt.config import RMT, Recipe
from nemo_rmt.data.thoughts import Thought, branch_prompt, matches, read_thought
from nemo_rmt.data.tokenizer import Tokenizer
from nemo_rmt.errors import UserError
from nemo_rmt.objectives import combined_reward, length_reward, token_budget
from nemo_rmt.rollout.engine import BranchPrompt, Rollout, RolloutEngine, Sampling


@dataclass(frozen=True)
class Question:
    """A token to predict: ``documents[document][position]``, of a difficulty ``tier``; ``number`` names its samples."""

    document: int
    position: int
    tier: int
    number: int


@dataclass(frozen=True)
class Answers:
    """``samples`` responses to every question, in the questions' order."""

    rollouts: list[Rollout]
    """``[questions * samples]``; their prompts are the branches' own: instruction and ``<think>``."""
    thoughts: list[Thought]
    """``[questions * samples]``."""
    matches: Tensor
    """float32 ``[questions, samples]``, 1 where the prediction is the corpus's."""
    lengths: Tensor
    """int64 ``[questions, samples]``, tokens of the thoughts."""
    formatted: Tensor
    """float32 ``[questions, samples]``, 1 where the thought was closed and something predicted."""


def step_budget(settings: RMT, step: int) -> int | None:
    """B_t after ``step`` finished steps, None without a budget."""
    budget = settings.budget
    if budget.schedule == "none":
        return None
    return token_budget(step, settings.steps, initial=budget.initial, minimum=budget.minimum, decay=budget.decay)


def response_limit(settings: RMT, budget: int | None) -> int:
    """Tokens a response may have: a thought until its length earns nothing, its tags, and the prediction."""
    opening = 0 if settings.prompt.open_think else 1
    return opening + (settings.thought_limit if budget is None else 2 * budget) + 1 + settings.reward.prediction_tokens


def require_room(recipe: Recipe, tokenizer: Tokenizer, longest: int) -> None:
    """Raise UserError when a document of ``longest`` tokens and a response at the initial budget exceed a row, or the
    positions the model knows."""
    rmt, budget = recipe.rmt, step_budget(recipe.rmt, 0)
    prompt, response = len(branch_prompt(tokenizer, rmt.prompt, budget)), response_limit(rmt, budget)
    for key, limit in (("rmt.sequence_length", rmt.sequence_length), ("model.max_position", recipe.model.max_position)):
        if longest + prompt + response > limit:
            raise UserError(
                f"{key}={limit} is less than a document of {longest} tokens, a prompt of {prompt} and a response of up "
                f"to {response}: raise it, or lower rmt.document_length or rmt.budget.initial"
            )


def ask(
    settings: RMT,
    tokenizer: Tokenizer,
    engine: RolloutEngine,
    documents: Sequence[Sequence[int]],
    questions: Sequence[Question],
    *,
    budget: int | None,
    samples: int,
    seed: int,
    temperature: float = 1.0,
    top_p: float = 1.0,
) -> Callable[[], Answers]:
    """Ask for ``samples`` responses to every question, at most as long as a thought can earn a length reward; what is
    returned waits for them.

    Without a budget a thought may take ``settings.thought_limit`` tokens. Raises UserError for a tokenizer without the
    thought's tokens.
    """
    prompt = branch_prompt(tokenizer, settings.prompt, budget)
    pending = engine.submit_branches(
        [list(document) for document in documents],
        [BranchPrompt(q.document, q.position, prompt) for q in questions for _ in range(samples)],
        [q.number * samples + index for q in questions for index in range(samples)],
        Sampling(
            max_new_tokens=response_limit(settings, budget),
            stop_tokens=frozenset({tokenizer.eod}),
            seed=seed,
            temperature=temperature,
            top_p=top_p,
            marker=tokenizer.end_think,
            after_marker=settings.reward.prediction_tokens,
        ),
    )
    return lambda: read_answers(settings, tokenizer, documents, questions, pending(), samples)


def read_answers(
    settings: RMT,
    tokenizer: Tokenizer,
    documents: Sequence[Sequence[int]],
    questions: Sequence[Question],
    rollouts: list[Rollout],
    samples: int,
) -> Answers:
    """What ``samples`` responses to every question hold, in the questions' order."""
    thoughts = [read_thought(r.response, tokenizer, opened=settings.prompt.open_think) for r in rollouts]
    correct = []
    for index, thought in enumerate(thoughts):
        question = questions[index // samples]
        continuation = documents[question.document][question.position :]
        correct.append(thought.closed and matches(thought.prediction, continuation, tokenizer, settings.reward.match))
    return Answers(
        rollouts=rollouts,
        thoughts=thoughts,
        matches=torch.tensor(correct, dtype=torch.float32).view(-1, samples),
        lengths=torch.tensor([thought.length for thought in thoughts], dtype=torch.int64).view(-1, samples),
        formatted=torch.tensor(
            [thought.closed and bool(thought.prediction) for thought in thoughts], dtype=torch.float32
        ).view(-1, samples),
    )


def rewards_of(answers: Answers, settings: RMT, budget: int | None) -> tuple[Tensor, Tensor]:
    """The reward of every response, and the length's part before weighting; float32 ``[questions, samples]``.

    An unclosed thought has no length to reward.
    """
    if budget is None:
        lengths = torch.zeros_like(answers.matches)
    else:
        closed = torch.tensor([thought.closed for thought in answers.thoughts]).view(answers.lengths.shape)
        lengths = length_reward(answers.lengths, budget) * closed
    return combined_reward(answers.matches, lengths, length_weight=settings.reward.length_weight), lengths
