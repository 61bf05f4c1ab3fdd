"""Next-token prediction on held-out positions, directly and after a thought: RMT's own measure."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy

from nemo_rmt import profiling
from nemo_rmt.config import TIERS
from nemo_rmt.megatron.runtime import gather_over_data_parallel
from nemo_rmt.megatron.train_step import ScoredModel
from nemo_rmt.objectives import mean_interval, wilson_interval
from nemo_rmt.rollout.in_process import InProcessEngine
from nemo_rmt.stages.difficulty import reasoned_corpora, score_corpus, score_documents, tiers_of
from nemo_rmt.stages.reasoning import Question, ask, step_budget
from nemo_rmt.stages.session import Session


@dataclass(frozen=True)
class _Response:
    """What is counted of one response; lengths in tokens."""

    match: float
    think_length: int
    formatted: float
    tokens: int


class HeldOutPositions:
    """``evaluate.positions`` held-out tokens of each tier, the same for every model that is measured.

    Args:
        session: of stage evaluate. scorer: the model whose entropies are the difficulty, the one RMT starts from.
    """

    def __init__(self, session: Session, scorer: ScoredModel):
        self.session = session
        wanted, rng = session.recipe.evaluate.positions, numpy.random.default_rng(session.seed("positions"))
        corpora = [
            score_corpus(session, scorer, corpus.name, "held_out", session.recipe.evaluate.max_tokens)[0]
            for corpus in reasoned_corpora(session)
        ]
        tiers = tiers_of(session, corpora).tiers
        chosen: dict[tuple[int, int], list[tuple[int, int]]] = {}  # (corpus, document) -> (position, tier)
        for tier in range(len(TIERS)):
            found = [(index, place) for index, each in enumerate(tiers) for place in numpy.flatnonzero(each == tier)]
            for pick in rng.permutation(len(found))[:wanted]:
                index, place = found[pick]
                document = int(numpy.searchsorted(corpora[index].starts, place, side="right")) - 1
                position = int(place - corpora[index].starts[document])
                chosen.setdefault((index, document), []).append((position, tier))
        keys = sorted(chosen)
        self.documents = [corpora[index].document(document) for index, document in keys]
        asked = [(row, position, tier) for row, key in enumerate(keys) for position, tier in sorted(chosen[key])]
        self.questions = [Question(row, position, tier, number) for number, (row, position, tier) in enumerate(asked)]

    def measure(self, model: ScoredModel) -> tuple[dict[str, float], int]:
        """``tokens/<tier>/...`` of one model, and the tokens sampled.

        ``ntp``: share predicted right directly. ``ntr``: after a thought sampled at temperature 1, asked for the final
        budget; ``ntr_greedy``: decoded greedily. Both with 95 % intervals over positions.
        """
        session, samples = self.session, self.session.recipe.evaluate.samples
        metrics: dict[str, float] = {}
        if not self.questions:
            return {f"tokens/{name}/positions": 0 for name in TIERS}, 0
        lengths = numpy.array([len(document) for document in self.documents], dtype=numpy.int64)
        tokens = numpy.array([token for document in self.documents for token in document], dtype=numpy.int32)
        starts = numpy.concatenate([[0], numpy.cumsum(lengths)])
        hits = score_documents(session, model, lengths, tokens, "held-out positions")[1]
        direct = [hits[starts[question.document] + question.position] for question in self.questions]
        with profiling.part("rollout"):
            drawn = self._responses(model, samples, temperature=1.0)
            greedy = self._responses(model, 1, temperature=0.0)
        for tier, name in enumerate(TIERS):
            mine = [index for index, question in enumerate(self.questions) if question.tier == tier]
            metrics[f"tokens/{name}/positions"] = len(mine)
            if not mine:
                continue
            figures = {
                "ntp": wilson_interval(int(sum(direct[index] for index in mine)), len(mine)),
                "ntr": mean_interval([sum(r.match for r in drawn[index]) / samples for index in mine]),
                "ntr_greedy": wilson_interval(int(sum(greedy[index][0].match for index in mine)), len(mine)),
            }
            for key, figure in figures.items():
                metrics[f"tokens/{name}/{key}"] = figure.mean
                metrics[f"tokens/{name}/{key}_low"] = figure.low
                metrics[f"tokens/{name}/{key}_high"] = figure.high
            responses = [response for index in mine for response in drawn[index]]
            metrics[f"tokens/{name}/think_length"] = sum(r.think_length for r in responses) / len(responses)
            metrics[f"tokens/{name}/format_rate"] = sum(r.formatted for r in responses) / len(responses)
        return metrics, sum(r.tokens for each in (drawn, greedy) for responses in each for r in responses)

    def _responses(self, model: ScoredModel, samples: int, temperature: float) -> list[list[_Response]]:
        """``samples`` responses to every question; each data-parallel rank asks about its share of the documents."""
        session, settings = self.session, self.session.recipe.rmt
        layout = session.layout
        mine = range(layout.data_rank, len(self.documents), layout.data_size)
        local = {document: place for place, document in enumerate(mine)}
        questions = [replace(q, document=local[q.document]) for q in self.questions if q.document in local]
        answers = ask(
            settings,
            session.tokenizer,
            InProcessEngine(model.modules, session.recipe.rollout.batch_size),
            [self.documents[document] for document in mine],
            questions,
            budget=step_budget(settings, settings.steps),
            samples=samples,
            seed=session.seed("evaluate", "positions"),
            temperature=temperature,
        )()
        columns = (answers.matches, answers.lengths, answers.formatted)
        rows = zip(*(column.view(-1).tolist() for column in columns), answers.rollouts, strict=True)
        flat = [
            _Response(match, length, formatted, len(rollout.response)) for match, length, formatted, rollout in rows
        ]
        numbered = [(q.number, flat[i * samples : (i + 1) * samples]) for i, q in enumerate(questions)]
        return [responses for _, responses in sorted(gather_over_data_parallel(numbered), key=lambda pair: pair[0])]
