"""Evaluation by others' tools."""

from __future__ import annotations

from pydantic import PositiveInt, model_validator

from nemo_rmt.config.section import Section


class LMEval(Section):
    """The iteration's final model once more, exported and measured by lm-eval (the extra nemo-rmt[lm-eval])."""

    enabled: bool = False
    """Export the final model to the stage's hugging_face/ and run lm-eval on it, offline, after our own evaluation."""
    tasks: list[str] = []
    """lm-eval tasks: NAME (sampled) and NAME_greedy of an entry of data.tasks, NAME_longer and NAME_longer_greedy where
    it has longer problems, or tasks, groups and tags that include defines. []: all of data.tasks."""
    include: str | None = None
    """Folder of further lm-eval task YAMLs. Their data must be local files; they are asked with the chat template. They
    may name Python functions beside them, which lm-eval runs: take only those you trust."""
    limit: PositiveInt | None = None
    """At most this many problems per task; null: all."""
    batch_size: PositiveInt = 32
    """Problems answered at once. lm-eval runs on one device, rank 0's."""

    @model_validator(mode="after")
    def _tasks(self) -> LMEval:
        if self.include is not None and not self.tasks:
            raise ValueError(f"include {self.include} adds tasks to choose from: name those to run in tasks")
        return self
