"""The recipe's own verifiers on lm-eval's responses. Loaded by lm-eval's process, through held_out.yaml."""

from __future__ import annotations

import functools
import json
from typing import Any

from nemo_rmt.config import Task
from nemo_rmt.data.tasks import TaskFamily, guarded_score, make_task


def process_results(doc: dict[str, Any], results: list[list[str]]) -> dict[str, float]:
    """pass@1 and pass@k of one problem, from its k responses.

    doc: a record of ``tasks.problem_records``. results: lm-eval's filtered responses, all k in one list.
    Raises ValueError when the problem is another than the one that was asked.
    """
    (responses,) = results
    family = _family(doc["task"])
    problem = family.problem(doc["split"], doc["seed"], doc["index"])
    if problem.question != doc["question"]:
        raise ValueError(
            f"{family.name} {doc['split']} {doc['index']} asks {problem.question!r}, not {doc['question']!r}"
        )
    right = [guarded_score(family, problem, response)[0] >= 1.0 for response in responses]
    return {"pass@1": sum(right) / len(right), f"pass@{len(right)}": float(any(right))}


@functools.cache
def _family(settings: str) -> TaskFamily:
    return make_task(Task.model_validate(json.loads(settings)))
