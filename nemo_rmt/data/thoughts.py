"""Thinking before a token: the prompt that asks for it, and what a response holds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from nemo_rmt import config
from nemo_rmt.data.tokenizer import END_THINK, THINK, Tokenizer
from nemo_rmt.errors import UserError


@dataclass(frozen=True)
class Thought:
    """What a response holds."""

    length: int
    """Tokens between ``<think>`` and ``</think>``, or all after ``<think>`` when it was not closed."""
    closed: bool
    """A thought was opened, and ``</think>`` reached."""
    prediction: list[int]
    """Tokens after ``</think>``, up to the end-of-document token."""


def branch_prompt(tokenizer: Tokenizer, prompt: config.Prompt, budget: int | None) -> list[int]:
    """Tokens between a document's prefix and the response: the instruction, with ``{budget}`` filled in, and
    ``<think>`` unless the model opens its thought itself.

    Raises UserError for a tokenizer without ``<think>`` and ``</think>``, ValueError for an instruction with a budget
    but none given.
    """
    missing = [tag for tag, token in ((THINK, tokenizer.think), (END_THINK, tokenizer.end_think)) if token is None]
    if missing:
        raise UserError(
            f"the tokenizer has no token {' and no token '.join(missing)}, which thoughts are written in: add "
            f"{THINK} and {END_THINK} to the vocabulary of the tokenizer in tokenizer.path, or set rmt.enabled=false"
        )
    if budget is None and "{budget}" in prompt.instruction:
        raise ValueError(f"the instruction {prompt.instruction!r} needs a budget")
    tokens = tokenizer.encode(prompt.instruction.replace("{budget}", str(budget)))
    return [*tokens, tokenizer.think] if prompt.open_think else tokens


def read_thought(response: Sequence[int], tokenizer: Tokenizer, *, opened: bool) -> Thought:
    """Take a response apart. The end-of-document token ends it, also inside a thought.

    opened: the prompt ended with ``<think>``; otherwise the response has to begin with it.
    """
    tokens = list(response)
    if tokenizer.eod in tokens:
        tokens = tokens[: tokens.index(tokenizer.eod)]
    if not opened:
        if tokens[:1] != [tokenizer.think]:
            return Thought(length=0, closed=False, prediction=[])
        tokens = tokens[1:]
    if tokenizer.end_think not in tokens:
        return Thought(length=len(tokens), closed=False, prediction=[])
    length = tokens.index(tokenizer.end_think)
    return Thought(length, closed=True, prediction=tokens[length + 1 :])


def matches(
    prediction: Sequence[int], continuation: Sequence[int], tokenizer: Tokenizer, rule: Literal["token", "prefix"]
) -> bool:
    """Whether a prediction is right.

    token: it is exactly the continuation's first token. prefix: its bytes are those of the continuation's first tokens,
    one or more of them, however it cuts them into tokens (RPT, arXiv 2506.08007); a special token is never right.
    Raises UserError for a tokenizer that is not byte-level under the rule prefix.
    """
    if rule == "token":
        return len(prediction) == 1 and list(prediction) == list(continuation[:1])
    special = {tokenizer.eod, tokenizer.pad, tokenizer.think, tokenizer.end_think}
    predicted, expected = tokenizer.token_bytes(prediction), b""
    if special.intersection(prediction):
        return False
    for token in continuation:
        if token in special or len(expected) >= len(predicted):
            break
        expected += tokenizer.token_bytes([token])
    return predicted == expected != b""
