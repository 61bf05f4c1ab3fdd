"""Which tokens RMT asks for at each step: tiers by the schedule, tokens uniformly within them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from nemo_rmt import profiling, pulse
from nemo_rmt.data.difficulty import require_tiers
from nemo_rmt.data.positions import Asked, PositionSampler
from nemo_rmt.objectives import tier_probabilities
from nemo_rmt.stages.difficulty import tiers_of, training_scores
from nemo_rmt.stages.reasoning import Question, require_room
from nemo_rmt.stages.session import Session


@dataclass(frozen=True)
class Origin:
    """Where a document comes from."""

    corpus: str
    index: int
    """Of the document in the corpus's dataset."""
    first: int
    """Where this piece of it begins."""

    def position(self, position: int) -> str:
        """The identity of a token of the piece."""
        return f"{self.corpus}:{self.index}:{self.first + position}"


class Curriculum:
    """The questions of a stage, in an order fixed by the seed, whatever the layout.

    Args:
        session: of stage rmt. start: the checkpoint the stage starts from, whose entropies are the default difficulty.

    Every step takes the positions that all its rounds could need, so that a resumed stage goes on where it stopped.
    Raises UserError when the schedule asks for a tier that no token is in.
    """

    def __init__(self, session: Session, start: Path):
        self.session = session
        self.settings = session.recipe.rmt
        self.corpora = training_scores(session, start)
        if self.settings.objective == "rmt":
            longest = max(int(corpus.pieces[:, 2].max()) for corpus in self.corpora)
            require_room(session.recipe, session.tokenizer, longest)
        with profiling.part("data"):
            tiers = tiers_of(session, self.corpora)
            require_tiers(tiers, self.settings.curriculum)
            self.sampler = PositionSampler(
                tiers.tiers,
                [corpus.starts for corpus in self.corpora],
                seed=session.seed("positions", session.job.iteration),
                positions_per_document=self.settings.curriculum.positions_per_document,
            )
        self.rounds = 1 + self.settings.resample_rounds

    def probabilities(self, step: int) -> tuple[float, ...]:
        """The tiers' probabilities at a step."""
        schedule = self.settings.curriculum
        return tier_probabilities(
            step, self.settings.steps, early=schedule.early, late=schedule.late, transition=schedule.transition
        )

    def draw(self, step: int) -> list[list[Asked]]:
        """The positions of each round of the next step; steps must be drawn in order, each once."""
        count = self.settings.global_batch_size
        return [self.sampler.draw(self.probabilities(step), count) for _ in range(self.rounds)]

    def skip(self, steps: int) -> None:
        """Go on after ``steps`` steps that an earlier start of the stage finished."""
        for step in range(steps):
            pulse.tick("finding where the curriculum was")
            self.draw(step)

    def questions(
        self, asked: list[Asked], step: int, number_of_round: int, limit: int
    ) -> tuple[list[list[int]], list[Question], list[Origin]]:
        """This data-parallel rank's documents, each once, the questions about them, and where each document is from.

        asked: one round's positions, over all ranks. limit: how many of them to ask for.
        """
        layout = self.session.layout
        number = (step * self.rounds + number_of_round) * self.settings.global_batch_size
        by_document: dict[tuple[int, int], list[tuple[int, int, int]]] = {}
        for entry in asked:
            for position, tier in zip(entry.positions, entry.tiers, strict=True):
                if limit:
                    by_document.setdefault((entry.corpus, entry.document), []).append((position, tier, number))
                    number, limit = number + 1, limit - 1
        documents: list[list[int]] = []
        questions: list[Question] = []
        origins: list[Origin] = []
        for corpus, document in list(by_document)[layout.data_rank :: layout.data_size]:
            questions += [Question(len(documents), *rest) for rest in by_document[corpus, document]]
            documents.append(self.corpora[corpus].document(document))
            index, first, _ = self.corpora[corpus].pieces[document].tolist()
            origins.append(Origin(self.corpora[corpus].name, index, first))
        return documents, questions, origins
