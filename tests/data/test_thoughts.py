"""The prompt that asks for a thought, and what a response to it holds."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nemo_rmt.config import Prompt
from nemo_rmt.data.thoughts import Thought, branch_prompt, matches, read_thought
from nemo_rmt.errors import UserError


def test_the_prompt_is_the_instruction_with_its_budget_and_an_open_thought(tokenizer):
    prompt = branch_prompt(tokenizer, Prompt(instruction=" [{budget} of {other}] "), 37)
    assert prompt == [*tokenizer.encode(" [37 of {other}] "), tokenizer.think]
    assert branch_prompt(tokenizer, Prompt(instruction="think:", open_think=False), None) == tokenizer.encode("think:")
    assert branch_prompt(tokenizer, Prompt(instruction=""), None) == [tokenizer.think]


def test_an_instruction_with_a_budget_needs_one(tokenizer):
    with pytest.raises(ValueError, match="needs a budget"):
        branch_prompt(tokenizer, Prompt(), None)


@pytest.mark.parametrize("name, tag", [("think", "<think>"), ("end_think", "</think>")])
def test_a_tokenizer_without_thoughts_is_refused(tokenizer, monkeypatch, name, tag):
    monkeypatch.setattr(tokenizer, name, None)
    with pytest.raises(
        UserError, match=f"no token {tag}, .*add <think> and </think> to the vocabulary.*tokenizer.path"
    ):
        branch_prompt(tokenizer, Prompt(), 5)


def response(tokenizer, text: str) -> list[int]:
    """Tokens of a response; ``.`` is the end-of-document token."""
    first, *rest = [tokenizer.encode(part) for part in text.split(".")]
    return sum(([tokenizer.eod, *part] for part in rest), first)


@pytest.mark.parametrize(
    "text, opened, length, closed, prediction",
    [
        ("1+2</think>3", True, 3, True, "3"),
        ("1+2</think>3.", True, 3, True, "3"),
        ("</think>3", True, 0, True, "3"),
        ("1+2</think>", True, 3, True, ""),
        ("1+2</think>.", True, 3, True, ""),
        ("1+2</think>3=</think>4", True, 3, True, "3=</think>4"),
        ("1+2", True, 3, False, ""),
        ("1+2.", True, 3, False, ""),
        ("1+2.</think>3", True, 3, False, ""),
        ("1</think>3.4", True, 1, True, "3"),
        ("", True, 0, False, ""),
        ("<think>1</think>3", True, 2, True, "3"),
        ("<think>1+2</think>3.", False, 3, True, "3"),
        ("<think>1+2", False, 3, False, ""),
        ("1+2</think>3", False, 0, False, ""),
        ("1<think>2</think>3", False, 0, False, ""),
        (".<think>2</think>3", False, 0, False, ""),
        ("", False, 0, False, ""),
    ],
)
def test_a_response_is_taken_apart(tokenizer, text, opened, length, closed, prediction):
    found = read_thought(response(tokenizer, text), tokenizer, opened=opened)
    assert found == Thought(length, closed, tokenizer.encode(prediction))


def test_a_token_is_right_when_it_is_the_corpus_token_alone(tokenizer):
    three, four = tokenizer.encode("34")
    assert matches([three], [three, four], tokenizer, "token")
    for wrong in ([four], [three, four], []):
        assert not matches(wrong, [three, four], tokenizer, "token")
    assert not matches([], [], tokenizer, "token")


def test_a_prefix_is_right_when_its_bytes_end_where_a_token_of_the_continuation_does(tokenizer):
    single = {
        tokenizer.token_bytes([token]): token
        for token in range(tokenizer.vocab_size)
        if len(tokenizer.token_bytes([token])) == 1
    }

    @given(st.text(st.sampled_from("return x é日1+"), min_size=1, max_size=12), st.data())
    def check(text, data):
        continuation = tokenizer.encode(text)
        ends = [len(tokenizer.token_bytes(continuation[: count + 1])) for count in range(len(continuation))]
        size = data.draw(st.integers(0, len(text.encode())))
        prediction = [single[bytes([byte])] for byte in text.encode()[:size]]
        assert matches(prediction, [*continuation, tokenizer.eod], tokenizer, "prefix") == (size in ends)
        altered = [*prediction[:-1], single[b"Z"]]
        assert not matches(altered, continuation, tokenizer, "prefix")
        assert not matches([*prediction, single[b"Z"]], continuation, tokenizer, "prefix")

    check()


def test_part_of_a_character_can_be_right(tokenizer):
    first, second = tokenizer.encode("é")
    assert matches([first], [first, second], tokenizer, "prefix")
    assert not matches([second], [first, second], tokenizer, "prefix")


def test_a_special_token_is_never_right(tokenizer):
    spelt = tokenizer.encode("<|endoftext|>")
    assert not matches(spelt, [tokenizer.eod], tokenizer, "prefix")
    assert not matches([tokenizer.eod], spelt, tokenizer, "prefix")
    assert not matches([tokenizer.think], [tokenizer.think, 40], tokenizer, "prefix")
    assert not matches([], spelt, tokenizer, "prefix")
