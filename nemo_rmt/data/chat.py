"""Rendering conversations with a Jinja template, as transformers does, without letting content pose as markup.

A template writes special tokens such as ``<|im_end|>`` between contents. A content that spells one must
not become it, so spellings in contents are broken up with a mark before rendering, and the mark is
removed from the text between the template's own special tokens afterwards.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any

import jinja2
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from nemo_rmt.errors import UserError

ROLES = ("system", "developer", "user", "assistant", "tool")
MARKS = [chr(code) for code in range(0xFDD0, 0xFDF0)]
"""Unicode's noncharacters: reserved for internal use, never in text meant for interchange."""


class ChatTemplate:
    """A compiled chat template and the special tokens it may write.

    source: the Jinja template. eos_token, bos_token: values of those variables (bos may be empty).
    special_tokens: all spellings that mean a special token.
    Raises UserError for a template that does not parse.
    """

    def __init__(self, source: str, eos_token: str, bos_token: str, special_tokens: Sequence[str]) -> None:
        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _raise_exception
        try:
            self._template = environment.from_string(source)
        except jinja2.TemplateError as error:
            raise UserError(f"tokenizer.chat_template does not parse: {error}") from None
        self._variables = {"eos_token": eos_token, "bos_token": bos_token}
        self._special_tokens = sorted(special_tokens, key=len, reverse=True)
        self._special = re.compile("|".join(map(re.escape, self._special_tokens)) or r"(?!)")

    def render(self, messages: list[dict[str, Any]], generate: bool) -> str:
        """The template's text, unprotected; with the opening of the assistant's turn when ``generate``."""
        try:
            return self._template.render(messages=messages, add_generation_prompt=generate, **self._variables)
        except (jinja2.TemplateError, TypeError, ValueError) as error:
            raise UserError(f"tokenizer.chat_template fails with {error} on {_short(messages)}") from None

    def protect(self, messages: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], str]:
        """The messages with spellings of special tokens broken up by a mark, and the mark."""
        text = json.dumps(messages, ensure_ascii=False)
        mark = next((mark for mark in MARKS if mark not in text), None)
        if mark is None:
            raise UserError("a conversation contains all of U+FDD0 to U+FDEF, which no text should: remove one of them")
        protected = [{**self._break(message, mark), "role": message["role"]} for message in messages]
        return protected, mark

    def pieces(self, text: str, mark: str) -> list[tuple[str, bool]]:
        """Rendered text cut into ``(piece, is_special)``, marks removed. Empty pieces are left out."""
        pieces, end = [], 0
        for match in self._special.finditer(text):
            pieces += [(text[end : match.start()].replace(mark, ""), False), (match.group(), True)]
            end = match.end()
        pieces.append((text[end:].replace(mark, ""), False))
        return [piece for piece in pieces if piece[0]]

    def _break(self, value: Any, mark: str) -> Any:
        """Put the mark into every special token spelt in a content, or begun at its end or finished at its start
        (where the template or the next content could complete it)."""
        if isinstance(value, dict):
            return {key: self._break(entry, mark) for key, entry in value.items()}
        if isinstance(value, list):
            return [self._break(entry, mark) for entry in value]
        if not isinstance(value, str):
            return value
        value = self._special.sub(lambda match: match.group()[0] + mark + match.group()[1:], value)
        tail = self._overlap(value.rstrip(), at_end=True)
        if tail:
            cut = len(value.rstrip()) - tail + 1
            value = value[:cut] + mark + value[cut:]
        if self._overlap(value.lstrip(), at_end=False):
            cut = len(value) - len(value.lstrip())
            value = value[:cut] + mark + value[cut:]
        return value

    def _overlap(self, text: str, at_end: bool) -> int:
        """Length of the longest proper beginning of a special token that ``text`` ends with, or of the longest
        proper end of one that it starts with."""
        lengths = [0]
        for token in self._special_tokens:
            for length in range(1, len(token)):
                if text.endswith(token[:length]) if at_end else text.startswith(token[-length:]):
                    lengths.append(length)
        return max(lengths)


def check_messages(messages: Any) -> None:
    """Raise UserError unless ``messages`` is a conversation: dicts with a known role and a text content."""
    if not isinstance(messages, list) or not messages:
        raise UserError(f"messages must be a list of at least one message, got {_short(messages)}")
    for message in messages:
        if not isinstance(message, dict) or message.get("role") not in ROLES:
            raise UserError(f"a message needs a role out of {', '.join(ROLES)}, got {_short(message)}")
        if not isinstance(message.get("content"), str):
            raise UserError(f"a message needs a text content, got {_short(message)}")
        _check_unicode(message["content"])


def _check_unicode(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"text holds a lone surrogate at character {error.start}, which is not valid Unicode") from None


def _short(value: Any, limit: int = 120) -> str:
    text = repr(value)
    return text if len(text) <= limit else text[: limit - 3] + "..."


def _to_json(value: Any, indent: int | None = None, **options: Any) -> str:
    """Plain JSON: Jinja's own filter escapes HTML, which templates written for transformers do not expect."""
    return json.dumps(value, ensure_ascii=False, indent=indent, **options)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)
