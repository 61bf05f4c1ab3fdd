"""Entropies of a corpus, against one document at a time; and the positions evaluation asks for."""

from __future__ import annotations

import numpy
import pytest

from nemo_rmt.data.batch import TokenBatch
from nemo_rmt.data.difficulty import askable
from nemo_rmt.megatron.runtime import distributed
from nemo_rmt.megatron.train_step import ScoredModel
from nemo_rmt.rollout.engine import Rollout
from nemo_rmt.stages import held_out_positions
from nemo_rmt.stages.difficulty import reasoned_corpora, score_corpora, score_corpus, tiers_of
from nemo_rmt.stages.held_out_positions import HeldOutPositions
from nemo_rmt.stages.job import StageJob
from nemo_rmt.stages.session import Session


@pytest.fixture(scope="module")
def session(recipe, data_folder):
    recipe = recipe.model_copy(deep=True)
    recipe.rmt.difficulty.max_tokens, recipe.evaluate.positions = 1500, 12
    job = StageJob(stage="evaluate", iteration=0, inputs={"data": str(data_folder)}, recipe=recipe)
    with distributed(recipe.parallel, seed=1) as layout:
        yield Session(job, data_folder.parent / "rmt", layout)


def scores_of(model: ScoredModel, document: list[int]) -> tuple[list[float], list[float]]:
    """Entropy and hit of each token of one document from the second on."""
    batch = TokenBatch.from_examples([(document, [1.0] * len(document))], 0, None)
    scores = model.score(batch, 1, with_entropy=True)
    return scores.entropy[0].tolist(), scores.hits[0].tolist()


def test_every_token_has_the_entropy_of_its_prediction_from_its_document(session, model):
    corpus, hits = score_corpus(session, model, "chains", "train", 800)
    assert len(corpus) > 20 and hits[~numpy.isnan(hits)].any()
    for index in range(len(corpus)):
        begin, end = corpus.starts[index], corpus.starts[index + 1]
        entropy, right = scores_of(model, corpus.document(index))
        assert numpy.isnan(corpus.entropy[begin])
        assert corpus.entropy[begin + 1 : end].tolist() == pytest.approx(entropy, abs=1e-5)
        assert hits[begin + 1 : end].tolist() == right


def test_the_tokens_to_score_are_shared_by_the_corpora_after_their_weights(session, model, monkeypatch):
    weights = {"chains": 3.0, "more": 1.0}
    for corpus in session.recipe.data.corpora:
        monkeypatch.setattr(corpus, "weight", weights[corpus.name])
    sizes = {corpus.name: len(corpus.tokens) for corpus in score_corpora(session, model, reasoned_corpora(session))}
    assert sizes["chains"] == pytest.approx(1125, abs=60) and sizes["more"] == pytest.approx(375, abs=60)


def test_only_the_named_corpora_are_read(session, monkeypatch):
    monkeypatch.setattr(session.recipe.rmt, "corpora", ["more"])
    assert [corpus.name for corpus in reasoned_corpora(session)] == ["more"]


def test_positions_are_askable_held_out_tokens_of_every_tier_of_the_scorer(session, model):
    positions = HeldOutPositions(session, model)
    corpora = [score_corpus(session, model, name, "held_out", 1024)[0] for name in ("chains", "more")]
    tiers = tiers_of(session, corpora).tiers
    by_text = {}
    for corpus, labels in zip(corpora, tiers, strict=True):
        allowed = askable(corpus, session.tokenizer, session.recipe.rmt.difficulty.first_position)
        for index in range(len(corpus)):
            begin = corpus.starts[index]
            for offset in range(len(corpus.document(index))):
                if allowed[begin + offset]:
                    by_text.setdefault((tuple(corpus.document(index)), offset), set()).add(int(labels[begin + offset]))
    for question in positions.questions:
        assert question.tier in by_text[tuple(positions.documents[question.document]), question.position]
    assert [sum(question.tier == tier for question in positions.questions) for tier in range(3)] == [12, 12, 12]
    places = {(question.document, question.position) for question in positions.questions}
    assert len(places) == 36
    again = HeldOutPositions(session, model)
    assert (again.documents, again.questions) == (positions.documents, positions.questions)


class HalfRight:
    """Of every question's samples, the even ones think two tokens and are right, the odd ones never stop thinking."""

    def __init__(self, *_):
        pass

    def submit_branches(self, documents, prompts, sample_ids, sampling):
        rollouts = []
        for number, prompt in zip(sample_ids, prompts, strict=True):
            answer = documents[prompt.document][prompt.position]
            response = [7, 7, sampling.marker, answer] if number % 2 == 0 else [7] * (sampling.max_new_tokens)
            rollouts.append(Rollout(prompt.tokens, response, [0.0] * len(response), number % 2 == 0))
        return lambda: rollouts


def test_the_figures_of_a_tier_are_those_of_its_answers(session, model, monkeypatch):
    monkeypatch.setattr(held_out_positions, "InProcessEngine", HalfRight)
    positions = HeldOutPositions(session, model)
    metrics, tokens = positions.measure(model)
    final_budget = 4
    unclosed = 2 * final_budget + 2
    for tier, name in enumerate(("easy", "medium", "hard")):
        mine = [question for question in positions.questions if question.tier == tier]
        right = [scores_of(model, positions.documents[q.document])[1][q.position - 1] for q in mine]
        assert metrics[f"tokens/{name}/ntp"] == pytest.approx(sum(right) / len(right))
        assert metrics[f"tokens/{name}/ntr"] == 0.5
        assert metrics[f"tokens/{name}/format_rate"] == 0.5
        assert metrics[f"tokens/{name}/think_length"] == (2 + unclosed) / 2
        assert metrics[f"tokens/{name}/positions"] == 12
        greedy = sum(question.number % 2 == 0 for question in mine) / 12
        assert metrics[f"tokens/{name}/ntr_greedy"] == pytest.approx(greedy)
        for key in ("ntp", "ntr", "ntr_greedy"):
            figures = [metrics[f"tokens/{name}/{key}{end}"] for end in ("_low", "", "_high")]
            assert figures == sorted(figures)
    samples = session.recipe.evaluate.samples
    even = sum(question.number % 2 == 0 for question in positions.questions)
    assert tokens == 36 * samples * (4 + unclosed) / 2 + even * 4 + (36 - even) * unclosed
