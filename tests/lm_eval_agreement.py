"""How far lm-eval and our own evaluation are apart, from the folder of an evaluate stage that has both."""

from __future__ import annotations

import json
import math
from pathlib import Path

STANDARD_ERRORS = 4
"""Two independent samples of one model are further apart than this once in 16,000 times."""


def metrics_of(stage: Path) -> dict[str, float]:
    """The stage's result."""
    return json.loads((stage / "result.json").read_text())["metrics"]


def answered(stage: Path, task: str) -> list[dict]:
    """lm-eval's record of each problem of a task, in order."""
    (file,) = (stage / "lm_eval").glob(f"samples_{task}_20*.jsonl")
    return sorted(map(json.loads, file.read_text().splitlines()), key=lambda record: record["doc_id"])


def greedy_difference(stage: Path, task: str) -> int:
    """By how many problems the two differ in how many they find solved greedily."""
    metrics = metrics_of(stage)
    difference = metrics[f"lm_eval/{task}_greedy/pass@1"] - metrics[f"tasks/{task}/greedy"]
    return round(abs(difference) * len(answered(stage, f"{task}_greedy")))


def sampled_difference(stage: Path, task: str) -> tuple[float, float]:
    """lm-eval's pass@1 less ours, and the difference's standard error.

    Both meet the same problems, so the difference has the variance of the samples alone: p (1 - p) / k of each problem
    and program, here by the unbiased estimate of p (1 - p) from lm-eval's k samples.
    """
    metrics, records = metrics_of(stage), answered(stage, task)
    shares, k = [record["pass@1"] for record in records], len(records[0]["resps"][0])
    variance = sum(share * (1 - share) / (k - 1) for share in shares) / len(shares) ** 2
    return metrics[f"lm_eval/{task}/pass@1"] - metrics[f"tasks/{task}/pass@1"], math.sqrt(2 * variance)
