"""Conversations to tokens: what is trained on equals what is generated, and content stays content."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nemo_rmt.data.tokenizer import Tokenizer
from nemo_rmt.errors import UserError

CHATML = (  # Qwen's shape, with the two special tokens this tokenizer has
    "{% for message in messages %}{{ '<|pad|>' + message.role + '\n' + message.content | trim + eos_token + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|pad|>assistant\n' }}{% endif %}"
)
REWRITING = (  # drops thoughts of all turns but the last, as Qwen3's does
    "{% for message in messages %}{% if message.role == 'assistant' and not loop.last %}"
    "{{ message.content.split('</think>')[-1] }}{% else %}{{ message.content }}{% endif %}{{ eos_token }}{% endfor %}"
)


def user(content):
    return {"role": "user", "content": content}


def assistant(content):
    return {"role": "assistant", "content": content}


@pytest.fixture(scope="module")
def chatml(tokenizer_folder):
    return Tokenizer.load(tokenizer_folder, chat_template=CHATML)


def test_the_default_template_continues_the_documents_of_chains(tokenizer):
    conversation = [user("3+1*2"), assistant("3+1=4*2=8#8")]
    tokens, mask = tokenizer.chat_example(conversation)
    assert tokens == [*tokenizer.encode("Q:3+1*2\nA:3+1=4*2=8#8"), tokenizer.eod]
    prompt = tokenizer.chat_prompt(conversation[:1])
    assert tokens[: len(prompt)] == prompt == tokenizer.encode("Q:3+1*2\nA:")
    assert mask == [0] * len(prompt) + [1] * (len(tokens) - len(prompt))


def test_each_assistant_turn_is_masked_up_to_its_closing_token(chatml):
    system = {"role": "system", "content": "Be brief."}
    conversation = [system, user("1+1"), assistant("2"), user("2+2"), assistant("4")]
    tokens, mask = chatml.chat_example(conversation)
    trained = [token for token, counted in zip(tokens, mask, strict=True) if counted]
    assert trained == [*chatml.encode("2"), chatml.eod, *chatml.encode("4"), chatml.eod]
    prompt = chatml.chat_prompt(conversation[:4])
    assert tokens[: len(prompt)] == prompt


def test_content_cannot_inject_a_special_token(chatml):
    fragments = st.sampled_from(["<|endoftext|>", "<|pad|>", "<|pad", "pad|>", "<", "|>", " ", "\n", "hi", "1+1", ">"])
    contents = st.lists(fragments, max_size=5).map("".join)

    @settings(max_examples=200)
    @given(contents, contents, contents)
    def check(system, question, answer):
        messages = [{"role": "system", "content": system}, user(question), assistant(answer)]
        tokens, _ = chatml.chat_example(messages)
        assert [token for token in tokens if token in (chatml.eod, chatml.pad)] == [chatml.pad, chatml.eod] * 3
        said = "".join(f"<|pad|>{m['role']}\n{m['content'].strip()}<|endoftext|>\n" for m in messages)
        assert chatml.decode(tokens) == said

    check()


def test_neighbouring_contents_cannot_complete_a_special_token(tokenizer_folder):
    bare = Tokenizer.load(tokenizer_folder, chat_template="{% for m in messages %}{{ m.content }}{% endfor %}")
    assert bare.eod not in bare.chat_prompt([user("<|endof"), user("text|>")])
    tail = Tokenizer.load(tokenizer_folder, chat_template="<|endof{{ messages[0].content }}")
    assert tail.eod not in tail.chat_prompt([user("text|>")])


def test_content_with_a_noncharacter_keeps_it(tokenizer):
    text = "a\ufdd0b"
    assert tokenizer.chat_prompt([user(text)]) == tokenizer.encode(f"Q:{text}\nA:")


def test_thought_tags_in_content_are_tokens(tokenizer):
    tokens, _ = tokenizer.chat_example([user("1"), assistant("<think>1</think>#1")])
    assert tokenizer.think in tokens and tokenizer.end_think in tokens


def test_a_template_that_rewrites_earlier_turns_is_refused(tokenizer_folder):
    rewriting = Tokenizer.load(tokenizer_folder, chat_template=REWRITING)
    conversation = [user("1"), assistant("<think>x</think>2"), user("3"), assistant("4")]
    rewriting.chat_example(conversation[:2])
    with pytest.raises(UserError, match="not prefix-preserving"):
        rewriting.chat_example(conversation)


def test_a_template_that_never_closes_the_turn_is_refused(tokenizer_folder):
    endless = Tokenizer.load(tokenizer_folder, chat_template="{% for m in messages %}{{ m.content }}{% endfor %}")
    with pytest.raises(UserError, match="never learns to stop"):
        endless.chat_example([user("1"), assistant("2")])


@pytest.mark.parametrize(
    "template, message",
    [
        ("{% for %}", "does not parse"),
        ("{{ raise_exception('only one turn') }}", "only one turn"),
        ("{{ messages.append(1) }}", "fails with"),
        ("{{ ''.__class__.__mro__ }}", "fails with"),
    ],
)
def test_a_bad_template_is_a_user_error(tokenizer_folder, template, message):
    with pytest.raises(UserError, match=message):
        Tokenizer.load(tokenizer_folder, chat_template=template).chat_prompt([user("1")])


@pytest.mark.parametrize(
    "messages, message",
    [
        ([], "at least one message"),
        ([{"role": "narrator", "content": "x"}], "needs a role out of"),
        ([{"role": "user"}], "needs a text content"),
        ([{"role": "user", "content": "\ud800"}], "lone surrogate"),
    ],
)
def test_malformed_conversations_are_refused(tokenizer, messages, message):
    with pytest.raises(UserError, match=message):
        tokenizer.chat_prompt(messages)


def test_training_on_a_conversation_needs_the_assistant(tokenizer):
    with pytest.raises(UserError, match="role assistant"):
        tokenizer.chat_example([user("1")])


def test_a_tokenizer_without_a_template_says_so(tokenizer_folder, tmp_path):
    (tmp_path / "tokenizer.json").write_bytes((tokenizer_folder / "tokenizer.json").read_bytes())
    with pytest.raises(UserError, match="set tokenizer.chat_template"):
        Tokenizer.load(tmp_path).chat_prompt([user("1")])
