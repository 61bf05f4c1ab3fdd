"""Modular-arithmetic chains: right arithmetic, strict split, the noise asked for."""

from __future__ import annotations

import itertools
import random
import re
import zlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nemo_rmt.data import chains

questions = st.builds(
    lambda start, operations: str(start) + "".join(operations),
    st.integers(0, 9),
    st.lists(st.sampled_from(chains.OPERATIONS), min_size=1, max_size=8),
)


@given(questions)
def test_every_step_is_the_true_result_modulo_ten(question):
    value = int(question[0])
    for operation, result in zip(re.findall(r"[+*-]\d", question), chains.running_values(question)[1:]):
        value = eval(f"{value}{operation}") % 10
        assert result == value


def test_the_documents_read_as_promised():
    rng = random.Random(0)
    texts = {style: chains.document(style, "3+1*2", rng, error_rate=0, lazy=0) for style in chains.STYLES}
    assert texts == {
        "worked": "Q:3+1*2\nA:3+1=4*2=8#8",
        "direct": "Q:3+1*2\nA:#8",
        "program": "x=3\nx+1\nx*2\nprint(x%10)\n#8\n",
        "think": "x=3\nx+1\nx*2\nprint(x%10)\n#<think>3+1=4*2=8</think>8\n",
    }


def test_a_wrong_step_is_carried_on():
    values = chains.running_values("3+1*2", random.Random(0), error_rate=0.999999)
    assert values[0] == 3 and values[1] != 4 and values[2] != values[1] * 2 % 10


def test_steps_are_wrong_at_the_error_rate():
    rng = random.Random(1)
    wrong = sum(chains.running_values("3+1", rng, error_rate=0.15)[1] != 4 for _ in range(4000))
    assert wrong / 4000 == pytest.approx(0.15, abs=0.02)


def test_lazy_thoughts_are_proper_beginnings_of_the_working():
    rng = random.Random(2)
    texts = [chains.document("think", "3+1*2", rng, error_rate=0, lazy=1) for _ in range(400)]
    thoughts = [text.split("<think>")[1].split("</think>")[0] for text in texts]
    assert set(thoughts) == {"", "3", "3+1=4"}
    assert thoughts.count("") / 400 == pytest.approx(0.5, abs=0.08)


def test_drawn_problems_stay_on_their_side():
    rng = random.Random(3)
    for held_out in (False, True):
        for _ in range(300):
            question = chains.draw(rng, [3, 4, 5], held_out)
            assert (zlib.crc32(question.encode()) % 16 == 0) == held_out


def test_all_held_out_problems_are_visited_once_in_any_order():
    space = {
        str(start) + "".join(operations)
        for length in (1, 2, 3)
        for start in range(10)
        for operations in itertools.product(chains.OPERATIONS, repeat=length)
    }
    expected = sorted(q for q in space if zlib.crc32(q.encode()) % 16 == 0)
    orders = [list(chains.held_out_questions([3, 1, 2, 2], seed)) for seed in (0, 1)]
    assert sorted(orders[0]) == sorted(orders[1]) == expected
    assert orders[0] != orders[1]


def test_held_out_lengths_take_turns():
    first = list(itertools.islice(chains.held_out_questions([3, 4, 7], seed=5), 30))
    assert [len(question) // 2 for question in first] == [3, 4, 7] * 10


def test_an_instruction_before_a_thought_names_about_its_length():
    rng, missed_by = random.Random(4), set()
    for _ in range(200):
        question = chains.draw(rng, [3, 4, 5])
        text = chains.document("think", question, rng, 0.2, lazy=0.5, instruction=" [{budget}]", heading="?\n")
        prompt, rest = text.split("<think>")
        before, _, announced = prompt.removesuffix("]").rpartition(" [")
        assert before == f"?\n{chains.program(question)}" and int(announced) >= 0
        if thought := rest.split("</think>")[0]:
            missed_by.add(int(announced) - len(thought))
    assert missed_by == set(range(-3, 4))


def test_a_thought_anywhere_is_about_the_operations_read_so_far():
    rng = random.Random(5)
    places = set()
    for _ in range(200):
        question = chains.draw(rng, [3, 4])
        text = chains.document("think", question, rng, error_rate=0.2, lazy=0.0, anywhere=1.0)
        before, rest = text.split("<think>")
        thought, after = rest.split("</think>")
        digit = (before + after)[-2]
        assert before + after == f"{chains.program(question)}{digit}\n"
        steps = re.findall(r"x([+*-]\d)\n", before)
        assert re.sub(r"=\d", "", thought) == question[0] + "".join(steps)
        places.add(before[-1])
    assert {"\n", "x", "+"} < places and not places & set("(%)")
