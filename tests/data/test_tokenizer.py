"""Training, loading and what text may become."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as Backend

from nemo_rmt import config
from nemo_rmt.data.tokenizer import BYTES, Tokenizer, train_tokenizer
from nemo_rmt.errors import UserError


def test_text_survives_encoding_and_decoding(tokenizer):
    @given(st.text(alphabet=st.characters(exclude_categories=["Cs"])))
    def check(text):
        assert tokenizer.decode(tokenizer.encode(text)) == text

    check()


def test_no_text_produces_a_special_token(tokenizer):
    pieces = st.sampled_from(["<|endoftext|>", "<|pad|>", "<|endof", "text|>", "<", "|", ">", " ", "a", "1", "<think>"])

    @given(st.lists(pieces).map("".join))
    def check(text):
        tokens = tokenizer.encode(text)
        assert not {tokenizer.eod, tokenizer.pad} & set(tokens)
        assert tokenizer.encode_batch([text, text]) == [tokens, tokens]

    check()


def test_thought_tags_in_text_are_single_tokens(tokenizer):
    tokens = tokenizer.encode("# <think>3+1=4</think>4\n")
    assert tokens.count(tokenizer.think) == tokens.count(tokenizer.end_think) == 1
    assert None not in (tokenizer.think, tokenizer.end_think)


@pytest.mark.parametrize("text", ["3+1*2\n", "3+1=4*2=8#8", "x=3\nx+1\nx*2\n", "--==**##++"])
def test_chains_have_one_token_per_character(tokenizer, text):
    assert len(tokenizer.encode(text)) == len(text)


def test_letters_merge_and_the_vocabulary_is_filled(tokenizer):
    assert len(tokenizer.encode("return")) < len("return")
    assert tokenizer.vocab_size == 300


def test_training_twice_gives_the_same_fingerprint_and_other_texts_another(tokenizer, training_texts, tmp_path):
    settings = config.Tokenizer(vocab_size=300)
    again = train_tokenizer(iter(training_texts), settings, tmp_path / "again")
    other = train_tokenizer(["entirely different words, repeatedly"] * 9, settings, tmp_path / "other")
    assert again.fingerprint == tokenizer.fingerprint != other.fingerprint


def test_only_the_asked_characters_are_read(tmp_path):
    def texts():
        yield "ab" * 100
        raise AssertionError("read on past training_characters")

    train_tokenizer(texts(), config.Tokenizer(vocab_size=270, training_characters=100), tmp_path)


def test_the_fingerprint_ignores_formatting_but_not_content(tokenizer_folder, tokenizer, tmp_path):
    content = json.loads((tokenizer_folder / "tokenizer.json").read_text())
    file = tmp_path / "tokenizer.json"
    file.write_text(json.dumps(content, indent=7, ensure_ascii=True))
    assert Tokenizer.load(tmp_path).fingerprint == tokenizer.fingerprint
    vocabulary = content["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    file.write_text(json.dumps(content))
    assert Tokenizer.load(tmp_path).fingerprint != tokenizer.fingerprint


def test_a_saved_tokenizer_loads_with_its_conventions(tokenizer, tmp_path):
    tokenizer.save(tmp_path)
    copy = Tokenizer.load(tmp_path)
    for name in ("eod", "pad", "vocab_size", "fingerprint", "chat_template"):
        assert getattr(copy, name) == getattr(tokenizer, name)


def test_conventions_are_read_as_hugging_face_writes_them(tokenizer_folder, tmp_path):
    (tmp_path / "tokenizer.json").write_bytes((tokenizer_folder / "tokenizer.json").read_bytes())
    (tmp_path / "special_tokens_map.json").write_text(json.dumps({"eos_token": {"content": "<|pad|>"}}))
    templates = [{"name": "tools", "template": "T"}, {"name": "default", "template": "D"}]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": templates, "pad_token": None}))
    loaded = Tokenizer.load(tmp_path)
    assert loaded.decode([loaded.eod]) == "<|pad|>"
    assert loaded.chat_template == "D"
    (tmp_path / "chat_template.jinja").write_text("J")
    assert Tokenizer.load(tmp_path).chat_template == "J"
    assert Tokenizer.load(tmp_path, chat_template="mine").chat_template == "mine"


def test_ids_beyond_the_vocabulary_are_left_out_of_text(tokenizer):
    assert tokenizer.decode([*tokenizer.encode("ab"), tokenizer.vocab_size + 5]) == "ab"


def test_the_bytes_of_tokens_are_those_of_the_text_and_every_token_has_its_own(tokenizer):
    @given(st.text(alphabet=st.characters(exclude_categories=["Cs"])))
    def check(text):
        tokens = tokenizer.encode(text)
        assert tokenizer.token_bytes(tokens) == text.encode()
        assert b"".join(tokenizer.token_bytes([token]) for token in tokens) == text.encode()

    check()
    assert tokenizer.token_bytes([tokenizer.think, tokenizer.vocab_size + 5, tokenizer.eod]) == b"<think><|endoftext|>"


def test_the_byte_table_is_that_of_byte_level_tokenizers():
    assert set(BYTES) == set(pre_tokenizers.ByteLevel.alphabet())
    assert sorted(BYTES.values()) == list(range(256))
    assert (BYTES["A"], BYTES["Ġ"], BYTES["Ċ"]) == (ord("A"), ord(" "), ord("\n"))


def hugging_face(model, decoder, folder: Path) -> Tokenizer:
    """A tokenizer as transformers writes those of published models, with added tokens of every kind."""
    backend = Backend(model)
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoder
    backend.add_special_tokens([AddedToken("<|endoftext|>", special=True)])
    backend.add_tokens([AddedToken(content, special=False) for content in ("<think>", "    ", "née", "｜日▁")])
    folder.mkdir()
    backend.save(str(folder / "tokenizer.json"))
    return Tokenizer.load(folder)


def test_added_tokens_are_the_bytes_of_their_text(tmp_path):
    vocabulary = {character: index for index, character in enumerate(sorted(BYTES))}
    merged = {**vocabulary, "ĠA": 256, "日": 257}
    model = models.BPE(vocab=merged, merges=[("Ġ", "A")], ignore_merges=True)
    loaded = hugging_face(model, decoders.ByteLevel(), tmp_path / "bpe")
    text = "<think> A    née ü｜日▁\n"
    tokens = loaded.encode(text)
    assert loaded.token_bytes(tokens) == text.encode()
    assert sum(token > 257 for token in tokens) == 4
    assert loaded.token_bytes([257]).decode() == loaded.decode([257]) == "日"  # no byte-level token, yet in some models


def test_a_tokenizer_that_is_not_byte_level_has_no_bytes_of_tokens(tmp_path):
    model = models.WordLevel({"a": 0, "<unk>": 1}, unk_token="<unk>")
    loaded = hugging_face(model, decoders.Metaspace(), tmp_path / "words")
    with pytest.raises(UserError, match="rmt.reward.match=prefix .*words .*or rmt.reward.match=token"):
        loaded.token_bytes([0])


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(UserError, match="tokenizer.path=.*nowhere.*tokenizer.json"):
        Tokenizer.load(tmp_path / "nowhere")


def test_corrupt_files_are_named(tokenizer_folder, tmp_path):
    file = tmp_path / "tokenizer.json"
    whole = (tokenizer_folder / "tokenizer.json").read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match="tokenizer.json cannot be read"):
        Tokenizer.load(tmp_path)
    file.write_bytes(whole)
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(UserError, match="tokenizer_config.json is corrupt"):
        Tokenizer.load(tmp_path)


def test_a_tokenizer_without_an_end_of_document_token_is_refused(tokenizer_folder, tmp_path):
    (tmp_path / "tokenizer.json").write_bytes((tokenizer_folder / "tokenizer.json").read_bytes())
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "</s>"}')
    with pytest.raises(UserError, match="end-of-document.*eos_token.*</s>"):
        Tokenizer.load(tmp_path)


def test_a_vocabulary_that_cannot_hold_all_bytes_is_refused(tmp_path: Path):
    with pytest.raises(UserError, match="tokenizer.vocab_size=200 must be at least 260"):
        train_tokenizer(["text"], config.Tokenizer(vocab_size=200), tmp_path)


def test_training_without_text_is_refused(tmp_path: Path):
    with pytest.raises(UserError, match="no text to train on"):
        train_tokenizer([], config.Tokenizer(), tmp_path)
