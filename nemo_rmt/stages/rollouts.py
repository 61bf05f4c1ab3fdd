"""A stage's steps with what was sampled for each: now, or one step ahead where another machine samples; and whether the
sampler is still the trainer's."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from nemo_rmt import profiling
from nemo_rmt.data.batch import TokenBatch
from nemo_rmt.errors import Diverged
from nemo_rmt.megatron.runtime import (
    broadcast_from_last_stage,
    max_over_data_parallel,
    max_over_ranks,
    sum_over_data_parallel,
)
from nemo_rmt.rollout.engine import EngineLost, Rollout, RolloutEngine
from nemo_rmt.rollout.in_process import InProcessEngine
from nemo_rmt.stages.policy import MULT_PROB_ERROR
from nemo_rmt.stages.session import Session
from nemo_rmt.stages.training import Training

logger = logging.getLogger(__name__)

Answers = TypeVar("Answers")


class Sampler:
    """The recipe's rollout engine around one stage's training.

    Args:
        session: the stage's session. training: of the model that samples. engine: samples from it.
    """

    def __init__(self, session: Session, training: Training, engine: RolloutEngine):
        self.training, self.engine = training, engine
        self.settings, self.rank = session.recipe.rollout, session.layout.rank
        self.warned = False
        self.asked = 0.0
        """When the engine was asked for the next step's responses, by ``time.perf_counter``."""
        self.sampled, self.sampling_s = 0, 0.0
        """Tokens of this rank's responses of the step, and seconds from asking until they were there."""
        self.metrics: dict[str, float] = {}
        """Of the last step, by "rollout/name"."""

    def steps(self, ask: Callable[[int], Callable[[], Answers]]) -> Iterator[tuple[int, Answers]]:
        """The steps still to do, see ``Training.steps``, each with its answers.

        ask: asks the engine for what a step needs; what it returns waits for it.

        With rollout.lag=1 the next step's are asked for before this one trains, from the weights it begins with; the
        first after a start, and after an interruption, are from weights of its own step. When the sampler is lost, what
        was trained is saved, then EngineLost is raised.

        ``rollout/tokens_per_s``: tokens of all ranks' responses over the seconds from asking for them until the
        training took them; with rollout.lag=1 the sampler may have been done before.
        """
        waiting: Callable[[], Answers] | None = None
        for step in self.training.steps():
            try:
                self.metrics, began = {}, time.perf_counter()
                self.sampled = 0
                with profiling.part("rollout"):
                    if waiting is None:
                        waiting = self._ask(ask, step)
                    answers, waiting = waiting(), None
                self.metrics["rollout/wait_s"] = time.perf_counter() - began
                sampled = sum_over_data_parallel({"tokens": self.sampled})["tokens"]
                self.metrics["rollout/tokens_per_s"] = sampled / self.sampling_s
                if self.settings.lag and step + 1 < self.training.settings.steps:
                    waiting = self._ask(ask, step + 1)
            except EngineLost:
                self.training.keep()
                raise
            self.metrics |= self.engine.metrics
            yield step, answers

    def _ask(self, ask: Callable[[int], Callable[[], Answers]], step: int) -> Callable[[], Answers]:
        with profiling.part("sync"):
            self.engine.update_weights()
        self.asked = time.perf_counter()
        with profiling.part("data"):
            return ask(step)

    def require_fresh(self, rollouts: list[Rollout]) -> None:
        """Raise EngineLost, on all ranks, when a response is from weights older than rollout.max_weight_lag allows.

        To be called with every response of a step, as soon as it is there.
        """
        self.sampled += sum(len(rollout.response) for rollout in rollouts)
        self.sampling_s = time.perf_counter() - self.asked
        done = self.training.done
        lag = int(max_over_ranks([max((done - rollout.version for rollout in rollouts), default=0)])[0])
        self.metrics["rollout/weight_lag"] = lag
        if lag > self.settings.max_weight_lag:
            raise EngineLost(
                f"responses for step {done + 1} were sampled from weights {lag} steps old, and "
                f"rollout.max_weight_lag={self.settings.max_weight_lag}: the sampler did not take the last update"
            )

    def compare(self, metrics: dict[str, float], micro_batches: list[TokenBatch]) -> dict[str, float]:
        """What is known of a step's sampling: ``self.metrics``, and ``rollout/logprob_error_max``, nats, which the last
        pipeline stage knows. Warns above rollout.mismatch_warning, on the terminal once.

        metrics, micro_batches: of the step, trained on. Raises Diverged, on every rank, above rollout.mismatch_limit;
        what is not a number is for the guard.
        """
        errors = [
            micro.extras["logprob_error"].max().item() for micro in micro_batches if "logprob_error" in micro.extras
        ]
        largest = broadcast_from_last_stage(max_over_data_parallel(max(errors, default=0.0)))
        factor, limit, warning = metrics[MULT_PROB_ERROR], self.settings.mismatch_limit, self.settings.mismatch_warning
        found = (
            f"step {self.training.done + 1}: the trainer's and the sampler's probabilities of sampled tokens differ by "
            f"a factor of {factor:.4g} on average, {math.exp(min(largest, 700.0)):.4g} at most"
        )
        if limit is not None and factor > limit:
            raise Diverged(
                f"{found}; rollout.mismatch_limit={limit}: the sampler's weights, precision or text are not the "
                "trainer's. See rollout/* in metrics.jsonl; the step was not saved"
            )
        if factor > warning:
            logger.warning("%s (rollout.mismatch_warning=%s)", found, warning)
            if not self.warned and self.rank == 0:
                print(f"{found}; further warnings are in the log only (rollout.mismatch_warning={warning})", flush=True)
            self.warned = True
        return {**self.metrics, "rollout/logprob_error_max": largest}


@contextmanager
def sampler(session: Session, training: Training) -> Iterator[Sampler]:
    """The sampler of the recipe's engine, ended with the block. Raises UserError when it cannot be had."""
    engine = build_engine(session, training)
    try:
        yield Sampler(session, training, engine)
    finally:
        engine.close()


def build_engine(session: Session, training: Training) -> RolloutEngine:
    """The engine that rollout.engine names, on the weights in training."""
    recipe, chunks = session.recipe, training.model.modules

    def version() -> int:
        return training.done

    if recipe.rollout.engine == "megatron":
        return InProcessEngine(chunks, recipe.rollout.batch_size, version)
    from nemo_rmt.rollout.vllm.build import vllm_engine

    return vllm_engine(
        recipe,
        session.layout,
        chunks,
        folder=session.folder,
        vocab_size=session.vocab_size,
        eos=session.tokenizer.eod,
        version=version,
    )
