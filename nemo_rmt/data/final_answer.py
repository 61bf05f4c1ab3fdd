"""The final answer of a response, as a number or as text, by a few plain rules. Nothing of it is ever evaluated.

Read is what follows the last ``</think>``, or the whole response without one. The final answer is

1. what stands in the last complete ``\\boxed{...}``, and there nothing else may stand: ``\\boxed{2x}`` is no number;
2. without a box, the last number of the text, or for text its last line that is not blank, without a leading
   ``####`` or ``Answer:``.

Typography does not count: dollar and percent signs, degrees, spacing commands, ``**``, thousands separators of
numbers, ``\\text{...}`` around words, units in ``\\text{...}`` behind a number, ``x =`` before one, a final full stop.
Numbers are integers, decimals and fractions (``3/4``, ``\\frac{3}{4}``), compared exactly: 0.75 is 3/4, 0.33 is not
1/3.
"""

from __future__ import annotations

import re
from fractions import Fraction

_BRACES = re.compile(r"\\boxed\s*\{|\\[{}]|[{}]")
_THIN = re.compile(r"\\[!,]|\\(?:left|right|displaystyle)(?![A-Za-z])|\\?[$%]|\\[()\[\]]|\^\{?\\circ\}?|°|\*\*")
_SPACE = re.compile(r"\\[;: ]|~")
_WORDS = re.compile(r"\\(?:text|textbf|textit|textrm|mathrm|mathbf|mbox)\{([^{}]*)\}")
_STATED = re.compile(r"^(?:####|answer:)\s*", re.IGNORECASE)
_NAMED = re.compile(r"^[A-Za-z]\w*\s*=\s*")

_DECIMAL = r"(?:(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?|\.[0-9]+)"
_NUMBER = re.compile(
    rf"(?P<sign>(?<![\w)\]}}])[-+])?(?<![\w.])"  # a minus between operands is none, nor are the digits of a word
    rf"(?:\\frac\{{(?P<over>{_DECIMAL})\}}\{{(?P<under>{_DECIMAL})\}}|(?P<whole>{_DECIMAL})(?:/(?P<part>{_DECIMAL}))?)"
)
LONGEST_NUMBER = 1000
"""Characters; Python refuses to read integers of a few thousand digits."""


def final_number(response: str) -> Fraction | None:
    """The number a response ends in, or None."""
    text = _after_thinking(response)
    box = last_boxed(text)
    if box is not None:
        return as_number(box)
    last = None
    for last in _NUMBER.finditer(_clean(text)):
        pass
    return None if last is None else _value(last)


def final_text(response: str) -> str:
    """The text a response ends in, without white space and typography; empty when there is none."""
    text = _after_thinking(response)
    box = last_boxed(text)
    if box is None:
        lines = [line for line in (_clean(line).strip() for line in text.splitlines()) if line]
        box = _STATED.sub("", lines[-1]) if lines else ""
    return "".join(_WORDS.sub(r"\1", _clean(box)).split()).rstrip(".")


def reference_number(answer: str) -> Fraction | None:
    """The number a reference answer is: in its box, behind its last ``####`` (GSM8K), or all of it; None when none."""
    box = last_boxed(answer)
    return as_number(answer.rpartition("####")[2] if box is None else box)


def as_number(text: str) -> Fraction | None:
    """The number that is all a text says, or None."""
    text = _clean(text)
    for bare in (_WORDS.sub(r"\1", text), _WORDS.sub("", text)):
        match = _NUMBER.fullmatch(_NAMED.sub("", bare.strip().rstrip(".").strip()))
        if match is not None:
            return _value(match)
    return None


def last_boxed(text: str) -> str | None:
    """What stands in the ``\\boxed{...}`` that closes last, or None. One pass, whatever a policy writes."""
    found: str | None = None
    opened: list[int | None] = []
    for brace in _BRACES.finditer(text):
        if brace.group() == "}":
            begin = opened.pop() if opened else None
            found = found if begin is None else text[begin : brace.start()]
        elif brace.group() == "{":
            opened.append(None)
        elif brace.group().startswith(r"\boxed"):
            opened.append(brace.end())
    return found


def _after_thinking(response: str) -> str:
    return response.rpartition("</think>")[2]


def _clean(text: str) -> str:
    """A text without typography; its white space and words stay."""
    text = text.replace("−", "-").replace("{,}", ",").replace(r"\dfrac", r"\frac").replace(r"\tfrac", r"\frac")
    return _SPACE.sub(" ", _THIN.sub("", text))


def _value(number: re.Match[str]) -> Fraction | None:
    """A matched number's value; None for a division by zero and for a number of absurd length."""
    if len(number.group()) > LONGEST_NUMBER:
        return None
    above = number["over"] or number["whole"]
    below = Fraction((number["under"] or number["part"] or "1").replace(",", ""))
    value = Fraction(above.replace(",", ""))
    return None if not below else (-value if number["sign"] == "-" else value) / below
