"""Text coloured by the weight of its tokens, from what an anneal with weights wrote down of its first and last step."""

from __future__ import annotations

import json
import statistics
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from nemo_rmt.report.run import Run, StageRecord
from nemo_rmt.report.tables import Table
from nemo_rmt.tracking import WEIGHTS, read_metrics

MAX_TOKENS = 600
"""Shown of one step: a page with every row of every iteration would weigh megabytes."""
LEVELS = 4
"""Shades above, and below, a weight of 1."""
EXTREMES, SEEN = 8, 3
"""Tokens in each table of extremes, and how often one has to be there."""


@dataclass(frozen=True)
class Token:
    """text: as shown. level: its colour's class. hint: weight and gap in words."""

    text: str
    level: str
    hint: str


@dataclass(frozen=True)
class Row:
    """documents: what it is made of."""

    documents: str
    tokens: list[Token]


@dataclass(frozen=True)
class WeighedText:
    """The rows of one stage.

    steps: a step's title and its rows. legend: class and meaning of every colour. extremes: the tokens of the last step
    with the highest and the lowest mean weight.
    """

    title: str
    steps: list[tuple[str, list[Row]]]
    legend: list[tuple[str, str]]
    extremes: list[Table]
    source: str


def weighed_text(run: Run, stage: StageRecord) -> WeighedText | None:
    """None where the stage showed no weights."""
    records = [record for record in read_metrics(run.folder / stage.folder / WEIGHTS) if _is_whole(record)]
    weights = [weight for record in records for weight in record["weights"] if weight is not None]
    if not weights:
        return None
    shades = _Shades(weights)
    by_step = defaultdict(list)
    for record in records:
        by_step[record["step"]].append(record)
    steps = []
    for step, rows in by_step.items():
        shown = list(_shown(rows, shades))
        steps.append((f"Before step {step:,}: {len(shown)} of the {len(rows)} rows written down", shown))
    source = f"{stage.folder}/{WEIGHTS}"
    title = f"Which tokens weigh more, iteration {stage.iteration}"
    return WeighedText(title, steps, shades.legend(), _extremes(by_step[max(by_step)], source), source)


class _Shades:
    """Colours of weights: the farthest from 1 has the strongest; a selection's weights are 0 and 1 alone."""

    def __init__(self, weights: list[float]):
        self.is_selection = set(weights) <= {0, 1}
        self.reach = max(abs(weight - 1) for weight in weights)

    def level(self, weight: float | None) -> str:
        if weight is None:
            return "none"
        if self.is_selection:
            return "high3" if weight else "low3"
        number = round(LEVELS * (weight - 1) / self.reach) if self.reach else 0
        return f"high{number}" if number > 0 else f"low{-number}" if number else ""

    def legend(self) -> list[tuple[str, str]]:
        if self.is_selection:
            return [("high3", "trained on"), ("low3", "left out"), ("none", "does not count")]
        marks = [1 + self.reach * number / LEVELS for number in range(-LEVELS, LEVELS + 1)] if self.reach else [1.0]
        return [(self.level(mark), f"{mark:.3g}") for mark in marks] + [("none", "does not count")]


def _is_whole(record: dict[str, Any]) -> bool:
    """Whether a line has what it should: it may be another program's."""
    columns = [record.get(name) for name in ("tokens", "weights", "gaps")]
    return all(isinstance(column, list) for column in columns) and len({len(column) for column in columns}) == 1


def _shown(records: list[dict[str, Any]], shades: _Shades) -> Iterator[Row]:
    """Rows until MAX_TOKENS are reached, the last one cut."""
    left = MAX_TOKENS
    for record in records:
        if left <= 0:
            return
        entries = list(zip(record["tokens"], record["weights"], record["gaps"], strict=True))
        tokens = [
            Token(_visible(text), shades.level(weight), _hint(weight, gap)) for text, weight, gap in entries[:left]
        ]
        if len(entries) > left:
            tokens.append(Token(" …", "none", "more of this row is not shown"))
        left -= len(entries)
        yield Row(", ".join(map(_visible, record.get("documents") or ["unknown document"])), tokens)


def _hint(weight: float | None, gap: float | None) -> str:
    if weight is None or gap is None:
        return "does not count"
    return f"weight {weight:.3f}, gap {gap:+.3f} nats"


def _visible(text: str) -> str:
    """With a sign where a line ends."""
    return _printable(text).replace("\n", "⏎\n")


def _printable(text: str) -> str:
    """With � for what cannot be printed: among others a token that is half a character of several bytes."""
    return "".join(sign if sign.isprintable() or sign in "\n\t" else "\N{REPLACEMENT CHARACTER}" for sign in text)


def _extremes(records: list[dict[str, Any]], source: str) -> list[Table]:
    """The tokens with the highest and the lowest mean weight, of those seen at least SEEN times."""
    seen = defaultdict(list)
    for record in records:
        for text, weight, gap in zip(record["tokens"], record["weights"], record["gaps"], strict=True):
            if weight is not None and gap is not None:
                seen[text].append((weight, gap))
    means = [
        (statistics.fmean(weight for weight, _ in pairs), statistics.fmean(gap for _, gap in pairs), len(pairs), text)
        for text, pairs in seen.items()
        if len(pairs) >= SEEN
    ]
    means.sort(key=lambda entry: (entry[0], entry[3]))
    count = min(EXTREMES, len(means) // 2)
    if not count:
        return []
    header = ["mean weight", "mean gap, nats", "times"]
    return [
        Table(
            [name, *header],
            [
                [json.dumps(_printable(text), ensure_ascii=False), f"{weight:.3f}", f"{gap:+.3f}", str(times)]
                for weight, gap, times, text in chosen
            ],
            [source],
        )
        for name, chosen in (("weigh most", means[: -count - 1 : -1]), ("weigh least", means[:count]))
    ]
