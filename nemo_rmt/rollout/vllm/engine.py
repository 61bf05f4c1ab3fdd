"""The rollout engine over vLLM: requests of all ranks are shared out to its replicas, answers go back to all ranks."""

from __future__ import annotations

import dataclasses
import functools
import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from nemo_rmt import pulse
from nemo_rmt.errors import UserError
from nemo_rmt.megatron.runtime import Layout, gather_over_data_parallel, gather_over_ranks
from nemo_rmt.rollout.engine import (
    BranchPrompt,
    EngineLost,
    Pending,
    Rollout,
    RolloutEngine,
    Sampling,
    require_positions,
)
from nemo_rmt.rollout.vllm.backend import (
    Answers,
    Backend,
    BackendLost,
    Completion,
    respond,
)
from nemo_rmt.rollout.vllm.background import in_background

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Replicas:
    """Who asks which replica.

    leaders: by replica, the global rank whose answers count; its share of the requests is the replica's. own: the
    replica that this rank asks, as all ranks of a replica do; None: another rank does.
    """

    leaders: list[int]
    own: int | None

    def share(self, total: int) -> range:
        """Which of that many ordered requests are this rank's."""
        if self.own is None:
            return range(0)
        count = len(self.leaders)
        return range(total * self.own // count, total * (self.own + 1) // count)


class VLLMEngine(RolloutEngine):
    """Samples with vLLM: all ranks' requests are shared out over its replicas, and the answers given back to all.

    Args:
        backend: the replica that this rank asks; None: it asks none. weights: streams them, collectively. version:
        training steps they have had. max_position: longest sequence. mode: vLLM's logprobs_mode. overlap: sample from
        ``submit`` on, in a thread of its own, instead of while waiting. release: called once responses are there;
        whether the weights went with the memory that it gave back to the training.
    """

    def __init__(
        self,
        backend: Backend | None,
        replicas: Replicas,
        layout: Layout,
        *,
        weights: Callable[[], Iterator[tuple[str, Tensor]]],
        version: Callable[[], int],
        max_position: int,
        mode: Literal["processed_logprobs", "raw_logprobs"] = "processed_logprobs",
        overlap: bool = False,
        release: Callable[[], bool] = lambda: False,
    ):
        super().__init__()
        self.backend, self.replicas, self.layout = backend, replicas, layout
        self.weights, self.version, self.max_position, self.mode = weights, version, max_position, mode
        self.overlap, self.release = overlap, release
        self.restarts = 0
        self._has_weights = False

    def update_weights(self) -> None:
        """See RolloutEngine."""
        began = time.perf_counter()
        while any(lost := self._load()):
            self._restart(lost)
        self._has_weights = True
        self.metrics["rollout/sync_s"] = time.perf_counter() - began
        self.metrics["rollout/restarts"] = self.restarts

    def submit(self, prompts: list[list[int]], sample_ids: list[int], sampling: Sampling) -> Pending:
        """See RolloutEngine. Raises UserError when a sequence could exceed model.max_position."""
        self._require_reported(sampling)
        parts = gather_over_data_parallel([list(zip(prompts, sample_ids, strict=True))])
        asked = [question for part in parts for question in part]
        self._require_room(max((len(prompt) for prompt, _ in asked), default=0), sampling)
        # What begins alike is asked for together, so that it is found in the cache.
        order = sorted(range(len(asked)), key=lambda index: asked[index])
        own = [asked[order[place]] for place in self.replicas.share(len(asked))]
        answers = again = functools.partial(self._sample_now, own, sampling)
        if self.overlap:
            self._require_weights()
            answers = in_background(functools.partial(self._sample, own, sampling)).result
        first = sum(map(len, parts[: self.layout.data_rank]))

        def wait() -> list[Rollout]:
            began = time.perf_counter()
            completions = self._collect(answers, again)
            placed = dict(zip(order, completions, strict=True))
            rollouts = [
                Rollout(prompt, (c := placed[first + index]).tokens, c.logprobs, c.stopped, c.version)
                for index, prompt in enumerate(prompts)
            ]
            self.metrics["rollout/sample_s"] = time.perf_counter() - began
            return rollouts

        return wait

    def submit_branches(
        self, documents: list[list[int]], prompts: list[BranchPrompt], sample_ids: list[int], sampling: Sampling
    ) -> Pending:
        """See RolloutEngine. vLLM's prefix cache has what branches share."""
        require_positions(documents, prompts)
        whole: dict[tuple[int, int, tuple[int, ...]], list[int]] = {}  # copies of a branch are one list: less to gather
        sequences = [
            whole.setdefault(
                (prompt.document, prompt.position, tuple(prompt.tokens)),
                documents[prompt.document][: prompt.position] + prompt.tokens,
            )
            for prompt in prompts
        ]
        pending = self.submit(sequences, sample_ids, sampling)

        def wait() -> list[Rollout]:
            answered = zip(pending(), prompts, strict=True)
            return [dataclasses.replace(rollout, prompt=prompt.tokens) for rollout, prompt in answered]

        return wait

    def close(self) -> None:
        """See RolloutEngine."""
        if self.backend is not None:
            self.backend.close()

    def _sample(self, questions: list[tuple[list[int], int]], sampling: Sampling) -> Answers:
        """Ask this rank's replica. No collectives, so that any thread may."""
        if self.backend is None:
            return Answers()
        try:
            return respond(self.backend, questions, sampling)
        except BackendLost as error:
            return Answers(lost=str(error))

    def _sample_now(self, questions: list[tuple[list[int], int]], sampling: Sampling) -> Answers:
        self._require_weights()
        return self._sample(questions, sampling)

    def _collect(self, answers: Callable[[], Answers], again: Callable[[], Answers]) -> list[Completion]:
        """All replicas' completions, in the order of the requests. again: how to ask anew once it was lost."""
        given = self._exchange(answers())
        while any(lost := [each.lost for each in given]):
            self._restart(lost)
            self.update_weights()
            given = self._exchange(again())
        self._has_weights = not self.release()
        counted = [given[rank] for rank in self.replicas.leaders]
        completions = [completion for each in counted for completion in each.completions]
        self.metrics["rollout/prefix_cached"] = sum(each.cached for each in counted) / max(
            1, sum(each.prompt_tokens for each in counted)
        )
        if completions:
            self.metrics["rollout/weight_version"] = min(completion.version for completion in completions)
        return completions

    def _exchange(self, answers: Answers) -> list[Answers]:
        """Every rank's; completions from leaders alone."""
        leads = self.layout.rank in self.replicas.leaders
        return gather_over_ranks(answers if leads else Answers(lost=answers.lost))

    def _load(self) -> list[str | None]:
        """Send the weights as they are now. Returns why each rank lost its replica meanwhile."""
        version, stream, lost = self.version(), _ticking(self.weights()), None
        if self.backend is not None:
            try:
                self.backend.load(stream, version)
            except BackendLost as error:
                lost = str(error)
        for _ in stream:  # gathered by all ranks together, whoever has a use for it
            pass
        return gather_over_ranks(lost)

    def _restart(self, lost: list[str | None]) -> None:
        """Bring back what ranks lost, or raise EngineLost on all of them."""
        failure = None
        if reason := lost[self.layout.rank]:
            logger.warning("vLLM was lost: %s", reason)
            try:
                self.backend.restart()
            except EngineLost as error:
                failure = str(error)
        failures = [each for each in gather_over_ranks(failure) if each is not None]
        if failures:
            raise EngineLost(failures[0])
        self.restarts += 1

    def _require_weights(self) -> None:
        """Send them, where vLLM never had any or gave them back."""
        if not self._has_weights:
            self.update_weights()

    def _require_reported(self, sampling: Sampling) -> None:
        """Raise ValueError for a temperature and top-p whose log-probabilities vLLM was not started to report."""
        sees = sampling.top_p == 1 if self.mode == "processed_logprobs" else sampling.temperature == 1
        if sampling.temperature != 0 and not sees:
            raise ValueError(
                f"vLLM runs with logprobs_mode={self.mode}, which does not report log-probabilities before top-p at "
                f"temperature={sampling.temperature} and top_p={sampling.top_p}"
            )

    def _require_room(self, longest: int, sampling: Sampling) -> None:
        if longest + sampling.max_new_tokens > self.max_position:
            raise UserError(
                f"a prompt of {longest} tokens and a response of up to {sampling.max_new_tokens} exceed "
                f"model.max_position={self.max_position}, which vLLM holds to: raise it, or lower "
                "rollout.max_new_tokens or the length of prompts"
            )


def _ticking(weights: Iterator[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    for name, tensor in weights:
        pulse.tick(f"sending {name} to vLLM")
        yield name, tensor
