"""Asking for a token after a thought: what is sampled, what counts as an answer, what it earns."""

from __future__ import annotations

import pytest

from nemo_rmt.config import RMT
from nemo_rmt.data.tokenizer import Tokenizer
from nemo_rmt.rollout.engine import Rollout
from nemo_rmt.stages.reasoning import Question, ask, rewards_of, step_budget


def settings(**changes) -> RMT:
    values = {"prompt": {"instruction": "[{budget}]"}, "budget": {"initial": 6, "decay": 0.5}, "steps": 10}
    return RMT.model_validate({**values, **changes})


@pytest.fixture(scope="module")
def tokenizer(data_folder) -> Tokenizer:
    return Tokenizer.load(data_folder / "tokenizer")


class Scripted:
    """An engine that gives the responses it was told, and keeps what it was asked."""

    def __init__(self, responses: list[list[int]]):
        self.responses = responses

    def submit_branches(self, documents, prompts, sample_ids, sampling):
        self.documents, self.prompts, self.sample_ids, self.sampling = documents, prompts, sample_ids, sampling
        return lambda: [
            Rollout(prompt.tokens, response, [-1.0] * len(response), True)
            for prompt, response in zip(prompts, self.responses, strict=True)
        ]


@pytest.fixture
def asked(tokenizer):
    """Two questions, two responses each: right, wrong; unclosed, closed without a prediction."""
    document = tokenizer.encode("x=3\nx+1\nprint(x%10)\n# 4\n")
    five, end = tokenizer.encode("5")[0], tokenizer.end_think
    responses = [
        [five] * 4 + [end, document[6]],
        [five] * 3 + [end, five],
        [five] * 8,
        [five] * 2 + [end, tokenizer.eod],
    ]
    assert document[6] != five
    engine = Scripted(responses)
    questions = [Question(0, 6, 2, number=7), Question(0, 3, 0, number=8)]
    answers = ask(settings(), tokenizer, engine, [document], questions, budget=4, samples=2, seed=3)()
    return document, engine, answers


def test_every_branch_reads_the_document_before_its_token_then_the_budget_then_the_open_thought(asked, tokenizer):
    document, engine, _ = asked
    assert engine.documents == [document]
    assert [(prompt.document, prompt.position) for prompt in engine.prompts] == [(0, 6), (0, 6), (0, 3), (0, 3)]
    assert {tuple(prompt.tokens) for prompt in engine.prompts} == {(*tokenizer.encode("[4]"), tokenizer.think)}


def test_samples_are_named_by_their_question_so_that_no_layout_changes_them(asked):
    assert asked[1].sample_ids == [14, 15, 16, 17] and asked[1].sampling.seed == 3


def test_a_response_ends_with_its_prediction_and_where_its_length_earns_nothing(asked, tokenizer):
    sampling = asked[1].sampling
    assert (sampling.marker, sampling.after_marker) == (tokenizer.end_think, 1)
    assert sampling.max_new_tokens == 2 * 4 + 1 + 1  # twice the budget, </think>, the prediction
    assert sampling.stop_tokens == {tokenizer.eod}


def test_only_a_closed_thought_with_the_corpus_token_is_a_match(asked):
    answers = asked[2]
    assert answers.matches.tolist() == [[1, 0], [0, 0]]
    assert answers.lengths.tolist() == [[4, 3], [8, 2]]
    assert answers.formatted.tolist() == [[1, 1], [0, 0]]


def test_the_reward_combines_match_and_length_and_an_unclosed_thought_earns_nothing(asked):
    rewards, lengths = rewards_of(asked[2], settings(reward={"length_weight": 0.25}), budget=4)
    assert lengths.tolist() == [[1.0, 0.75], [0.0, 0.5]]
    assert rewards.tolist() == [[1.0, 0.1875], [0.0, 0.125]]


def test_without_a_budget_only_the_match_counts(asked):
    without = settings(budget={"schedule": "none"}, prompt={"instruction": ""}, reward={"length_weight": 0.0})
    rewards, lengths = rewards_of(asked[2], without, budget=None)
    assert rewards.tolist() == asked[2].matches.tolist() and not lengths.any()


def test_without_a_budget_thoughts_may_be_long_throughout(tokenizer):
    without = settings(
        budget={"schedule": "none", "initial": 6}, prompt={"instruction": ""}, reward={"length_weight": 0.0}
    )
    assert step_budget(without, 0) is None is step_budget(without, 10)
    engine = Scripted([[tokenizer.eod]] * 2)
    ask(without, tokenizer, engine, [[5, 6, 7]], [Question(0, 1, 2, 0)], budget=None, samples=2, seed=0)()
    assert engine.sampling.max_new_tokens == 2 * 6 + 2
    assert engine.prompts[0].tokens == [tokenizer.think]


def test_the_budget_decays_over_the_stage():
    assert [step_budget(settings(), step) for step in (0, 5, 10)] == [6, 4, 3]


def test_a_model_that_must_open_its_thought_gets_a_token_more(tokenizer):
    engine = Scripted([[tokenizer.think, 9, tokenizer.end_think, 6], [9, tokenizer.end_think, 6]])
    own = settings(prompt={"instruction": "[{budget}]", "open_think": False})
    answers = ask(own, tokenizer, engine, [[5, 6, 7]], [Question(0, 1, 2, 0)], budget=4, samples=2, seed=0)()
    assert engine.prompts[0].tokens == tokenizer.encode("[4]")
    assert engine.sampling.max_new_tokens == 1 + 8 + 1 + 1
    assert answers.matches.tolist() == [[1, 0]] and answers.formatted.tolist() == [[1, 0]]
