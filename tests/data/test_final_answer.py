"""The final answer of a response: where it is found, what counts as equal, and that nothing written can do harm."""

from __future__ import annotations

import re
import time
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nemo_rmt.data.final_answer import as_number, final_number, final_text, last_boxed, reference_number


@pytest.mark.parametrize(
    "text, value",
    [
        ("72", 72),
        ("-5", -5),
        ("+5", 5),
        ("−5", -5),
        ("$-5$", -5),
        ("1,234", 1234),
        ("1{,}234", 1234),
        (r"10,\!000", 10_000),
        (r"1\,234", 1234),
        ("1,234,567.50", Fraction("1234567.5")),
        (".5", Fraction(1, 2)),
        ("3/4", Fraction(3, 4)),
        (r"\frac{3}{4}", Fraction(3, 4)),
        (r"-\dfrac{3}{4}", Fraction(-3, 4)),
        (r"\tfrac{0.5}{2}", Fraction(1, 4)),
        (r"\$18.00", 18),
        (r"18\%", 18),
        (r"90^\circ", 90),
        (r"90^{\circ}", 90),
        (r"12 \text{ cm}", 12),
        (r"\text{12}", 12),
        (r"\mathbf{12}", 12),
        ("x = 12", 12),
        (r"\(12\)", 12),
        ("12.", 12),
        ("**12**", 12),
    ],
)
def test_a_number_is_read_whatever_its_typography(text, value):
    assert as_number(text) == value
    assert final_number(f"It is 3 \\boxed{{{text}}} and not 4.") == value
    assert final_number(f"First 3, then\n{text}") == value


@pytest.mark.parametrize(
    "text", ["", "x", "2x", r"\sqrt{2}", r"2\pi", "x^2", "1 2", "1,2", "(1, 2)", "3/0", "1,23", "12,3456", "5e3", "--5"]
)
def test_what_is_more_or_less_than_one_number_is_none(text):
    assert as_number(text) is None
    assert final_number(f"3 \\boxed{{{text}}} 4") is None


@pytest.mark.parametrize(
    "response, value",
    [
        ("5 apples and 7 pears, so 12 in all. Done.", 12),
        ("10-5=5", 5),
        ("the range is 3-8", 8),
        ("x2 is the 3rd", 3),
        ("24 + 48\n#### 72", 72),
        (r"\boxed{1} or rather \boxed{2}, I think; 3", 2),
        (r"so \boxed{7} and then \boxed{8", 7),
        ("</think>", None),
        ("<think>it is 5</think>I do not know.", None),
        (r"<think>\boxed{5}</think>\boxed{6}", 6),
        ("thinking 3</think>more</think>4", 4),
        ("1 23456,789", 789),
        ("v1.2.3", None),
        ("", None),
    ],
)
def test_the_last_box_counts_and_else_the_last_number_after_thinking(response, value):
    assert final_number(response) == value


@given(st.fractions(max_denominator=10**6).filter(lambda value: abs(value) < 10**9))
def test_every_fraction_is_read_back(value):
    n, d = value.numerator, value.denominator
    for text in (f"{n}/{d}", rf"\frac{{{abs(n)}}}{{{d}}}"):
        assert as_number(text) == (value if "/" in text else abs(value))
    assert as_number(f"{n:,}") == n
    assert final_number(f"Is it {d}? No: {n:,}.") == n


@pytest.mark.parametrize(
    "response, text",
    [
        (r"It is \boxed{\text{Monday}}.", "Monday"),
        ("So:\n\nAnswer: Monday.\n\n", "Monday"),
        ("**Answer:** Monday", "Monday"),
        ("#### New  York", "NewYork"),
        (r"\boxed{\left( 1,\, 2 \right)}", "(1,2)"),
        ("$(1, 2)$", "(1,2)"),
        (r"\boxed{\dfrac{\sqrt{2}}{2}}", r"\frac{\sqrt{2}}{2}"),
        (r"\boxed{\{1, 2\}}", r"\{1,2\}"),
        ("<think>yes</think>No", "No"),
        ("\n \n", ""),
    ],
)
def test_texts_are_compared_without_white_space_and_typography(response, text):
    assert final_text(response) == text


@pytest.mark.parametrize(
    "answer, value",
    [
        ("72", 72),
        ("He sold 48/2 = <<48/2=24>>24.\n#### 1,072", 1072),
        (r"We have $x^2 = 4$, so $\boxed{2}$ as 3 > 2.", 2),
        ("two", None),
        ("between 2 and 3", None),
        ("2 x", None),
        ("", None),
    ],
)
def test_a_reference_must_say_its_number_plainly(answer, value):
    assert reference_number(answer) == value
    if value is not None:
        assert final_number(answer) == value  # it is a response that scores


@given(
    st.lists(st.sampled_from([r"\boxed{", r"\boxed {", "{", "}", r"\{", r"\}", "\\", "a", " "]), max_size=25).map(
        "".join
    )
)
def test_the_last_box_is_the_one_found_by_counting_braces(text):
    boxes = []
    for opening in re.finditer(r"\\boxed\s*\{", text):
        depth = 1
        for brace in re.finditer(r"(?<!\\)[{}]", text):
            if brace.start() >= opening.end() and depth:
                depth += 1 if brace.group() == "{" else -1
                if not depth:
                    boxes.append((brace.start(), text[opening.end() : brace.start()]))
    assert last_boxed(text) == (max(boxes)[1] if boxes else None)


@pytest.mark.parametrize(
    "response",
    [
        r"\boxed{" * 30_000,
        "{" * 100_000 + "}" * 100_000,
        "9" * 200_000,
        "1/" * 100_000,
        "1," * 100_000,
        r"\frac{1}{" * 30_000,
        "-" * 200_000,
        "\\" * 200_000,
        " " * 200_000,
        r"\text{" * 30_000,
        "$" * 100_000 + "\n" * 100_000,
        "\0\ud800𝟗٣" * 10_000,
    ],
)
def test_no_response_takes_long_or_raises(response):
    began = time.process_time()
    for text in (response, rf"\boxed{{{response}}}"):
        final_number(text), final_text(text)
    assert time.process_time() - began < 5


def test_digits_beyond_any_answer_are_no_number():
    assert final_number("9" * 1000) == int("9" * 1000)
    assert final_number("9" * 1001) is None
    assert final_number(f"1/{'0' * 10}") is None


def test_only_plain_digits_are_digits():
    assert final_number("٣") is None and as_number("𝟗") is None
