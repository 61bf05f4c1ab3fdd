"""Text to tokens: a tokenizer folder as Hugging Face writes them, or a byte-level BPE trained on the corpora."""

from __future__ import annotations

import functools
import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers, trainers

from nemo_rmt import config, pulse
from nemo_rmt.data.chat import ChatTemplate, check_messages
from nemo_rmt.errors import UserError

EOD, PAD, THINK, END_THINK = "<|endoftext|>", "<|pad|>", "<think>", "</think>"

PIECES = (
    r"\p{N}"  # digits one by one, so that numbers have one reading
    r"| ?[+\-*=#]"  # operators one by one, so that arithmetic does too: never "=-" or "**"
    r"|'(?:[sdmt]|ll|ve|re)| ?\p{L}+"
    r"| ?[^\s\p{L}\p{N}+\-*=#]+"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""What merges may not cross in a trained tokenizer: GPT-2's pattern with the first two lines added."""

_PRINTABLE = [*range(33, 127), *range(161, 173), *range(174, 256)]
BYTES = {chr(byte): byte for byte in _PRINTABLE} | {
    chr(256 + place): byte for place, byte in enumerate(sorted({*range(256)} - {*_PRINTABLE}))
}
"""The byte that each character of a byte-level vocabulary stands for: GPT-2's table."""


class Tokenizer:
    """A tokenizer and its folder's conventions. Documents can never produce a special token.

    ``eod``: id that ends documents and responses. ``pad``: id for padding (eod when there is none).
    ``vocab_size``: largest id + 1. ``think``, ``end_think``: ids of ``<think>`` and ``</think>``, or None.
    ``chat_template``: Jinja source, or None.
    """

    def __init__(self, backend: tokenizers.Tokenizer, settings: dict[str, Any], source: str) -> None:
        """backend: its special tokens are switched off for text. settings: eos_token, pad_token, bos_token and
        chat_template, as plain strings or None. source: what to name in errors."""
        backend.no_truncation()
        backend.no_padding()
        backend.encode_special_tokens = True  # a special token spelt in text is text
        self._backend, self._source = backend, source
        self._settings = {key: settings.get(key) for key in ("eos_token", "pad_token", "bos_token", "chat_template")}
        eos_token = self._settings["eos_token"] = self._settings["eos_token"] or EOD
        eod = backend.token_to_id(eos_token)
        if eod is None:
            raise UserError(
                f"tokenizer {source} has no end-of-document token: set eos_token in its tokenizer_config.json "
                f"to a token of its vocabulary (tried {eos_token!r})"
            )
        self.eod: int = eod
        pad = backend.token_to_id(self._settings["pad_token"] or PAD)
        self.pad: int = eod if pad is None else pad
        self.vocab_size: int = max(backend.get_vocab(with_added_tokens=True).values()) + 1
        self.think: int | None = backend.token_to_id(THINK)
        self.end_think: int | None = backend.token_to_id(END_THINK)
        self.chat_template: str | None = self._settings["chat_template"]

    @classmethod
    def load(cls, folder: Path, chat_template: str | None = None) -> Tokenizer:
        """Read a folder with tokenizer.json and, optionally, tokenizer_config.json, special_tokens_map.json and
        chat_template.jinja. ``chat_template`` replaces the folder's own.

        Raises UserError when tokenizer.json is missing or corrupt, or no end-of-document token is known.
        """
        folder = Path(folder)
        file = folder / "tokenizer.json"
        if not file.is_file():
            raise UserError(f"tokenizer.path={folder}: no tokenizer.json there; give a Hugging Face tokenizer folder")
        try:
            backend = tokenizers.Tokenizer.from_file(str(file))
        except Exception as error:  # the library raises bare Exception
            raise UserError(f"{file} cannot be read as a tokenizer: {error}; download or train it again") from None
        settings = _read_settings(folder / "special_tokens_map.json")
        settings.update(_read_settings(folder / "tokenizer_config.json"))
        template_file = folder / "chat_template.jinja"
        if template_file.is_file():
            settings["chat_template"] = template_file.read_text()
        if chat_template is not None:
            settings["chat_template"] = chat_template
        return cls(backend, settings, str(folder))

    def save(self, folder: Path) -> None:
        """Write tokenizer.json and tokenizer_config.json, from which ``load`` makes the same tokenizer."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        self._backend.save(str(folder / "tokenizer.json"))
        settings = {key: value for key, value in self._settings.items() if value is not None}
        settings["tokenizer_class"] = "PreTrainedTokenizerFast"  # what transformers' AutoTokenizer needs to load it
        (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n")

    @functools.cached_property
    def fingerprint(self) -> str:
        """sha256 of vocabulary, merges and added tokens, whatever the formatting of the file.

        Equal for two folders exactly when every id means the same in both; the chat template has no part in it.
        """
        content = json.loads(self._backend.to_str())
        model = content["model"]
        vocabulary = model.get("vocab", [])
        merges = [pair.split(" ") if isinstance(pair, str) else list(pair) for pair in model.get("merges", [])]
        added = [[token["id"], token["content"], token["special"]] for token in content["added_tokens"]]
        described = {"type": model.get("type"), "vocab": vocabulary, "merges": merges, "added": sorted(added)}
        return hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()

    def encode(self, text: str) -> list[int]:
        """Tokens of plain text. Special tokens spelt in it stay text; ``<think>`` and ``</think>`` are tokens."""
        return self._backend.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """``encode`` of many texts, on all cores."""
        return [encoding.ids for encoding in self._backend.encode_batch_fast(list(texts), add_special_tokens=False)]

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = False) -> str:
        """Text of tokens. Ids outside the vocabulary (a model's padding of it) are left out."""
        return self._backend.decode(list(ids), skip_special_tokens=skip_special_tokens)

    def token_bytes(self, ids: Sequence[int]) -> bytes:
        """The UTF-8 bytes tokens stand for, parts of a character included, which ``decode`` cannot give.

        Ids outside the vocabulary are left out. Raises UserError when the tokenizer is not byte-level.
        """
        if not isinstance(self._backend.decoder, decoders.ByteLevel):
            raise UserError(
                f"rmt.reward.match=prefix compares bytes, and the tokens of tokenizer {self._source} are not made of "
                "them: use a byte-level BPE tokenizer (as GPT-2's, Llama 3's and Qwen's), or rmt.reward.match=token"
            )
        return b"".join(map(self._bytes_of, ids))

    def _bytes_of(self, token: int) -> bytes:
        text = self._backend.id_to_token(token) or ""
        if token in self._added or not all(character in BYTES for character in text):
            return text.encode()
        return bytes(BYTES[character] for character in text)

    @functools.cached_property
    def _added(self) -> set[int]:
        """Ids outside the model's vocabulary: their text stands for itself."""
        return set(self._backend.get_added_tokens_decoder())

    def chat_prompt(self, messages: list[dict[str, Any]]) -> list[int]:
        """Tokens of a conversation up to where the assistant's next turn begins."""
        check_messages(messages)
        messages, mark = self._chat.protect(messages)
        return [token for token, _ in self._encode_rendered(self._chat.render(messages, generate=True), mark)]

    def chat_example(self, messages: list[dict[str, Any]]) -> tuple[list[int], list[int]]:
        """Tokens of a whole conversation, and a 0/1 mask of the same length over the assistant's tokens.

        Each of the assistant's turns is masked up to and including the special token that closes it, and is
        tokenized apart from its prompt, exactly as it is when the model generates it.
        Raises UserError when the template rewrites earlier turns, or does not close the assistant's.
        """
        check_messages(messages)
        messages, mark = self._chat.protect(messages)
        tokens: list[int] = []
        mask: list[int] = []
        rendered = ""
        for end, message in enumerate(messages, start=1):
            if message["role"] != "assistant":
                continue
            prompt = self._continue(messages[: end - 1], rendered, generate=True)
            whole = self._continue(messages[:end], prompt, generate=False)
            context = [token for token, _ in self._encode_rendered(prompt[len(rendered) :], mark)]
            turn = self._encode_rendered(whole[len(prompt) :], mark)
            closing = max((place for place, (_, special) in enumerate(turn, start=1) if special), default=0)
            if not closing:
                raise UserError(
                    "tokenizer.chat_template does not end the assistant's turn with a special token, so a model "
                    "trained on it never learns to stop: write {{ eos_token }} after its content"
                )
            tokens += context + [token for token, _ in turn]
            mask += [0] * len(context) + [1] * closing + [0] * (len(turn) - closing)
            rendered = whole
        if not tokens:
            raise UserError("a conversation to train on needs at least one message of the role assistant")
        return tokens, mask

    @functools.cached_property
    def _chat(self) -> ChatTemplate:
        if not self.chat_template:
            raise UserError(f"tokenizer {self._source} has no chat template: set tokenizer.chat_template")
        special = [token.content for token in self._backend.get_added_tokens_decoder().values() if token.special]
        eos_token, bos_token = self._settings["eos_token"], self._settings["bos_token"] or ""
        return ChatTemplate(self.chat_template, eos_token, bos_token, {eos_token, *special})

    def _continue(self, messages: list[dict[str, Any]], rendered: str, generate: bool) -> str:
        """Render messages that must begin with what was rendered for fewer of them."""
        text = self._chat.render(messages, generate)
        if not text.startswith(rendered):
            raise UserError(
                "tokenizer.chat_template is not prefix-preserving: it renders the beginning of a conversation "
                "differently once more messages follow, so the tokens trained on would not be those generated; "
                "use a template that leaves earlier turns as they are, or train on single turns"
            )
        return text

    def _encode_rendered(self, text: str, mark: str) -> list[tuple[int, bool]]:
        """``(token, is_special)`` of rendered text: only the template's own special tokens become special."""
        encoded: list[tuple[int, bool]] = []
        for piece, special in self._chat.pieces(text, mark):
            if special:
                encoded.append((self._backend.token_to_id(piece), True))
            else:
                encoded += [(token, False) for token in self.encode(piece)]
        return encoded


def train_tokenizer(texts: Iterable[str], settings: config.Tokenizer, folder: Path) -> Tokenizer:
    """Train a byte-level BPE on the first ``settings.training_characters`` of ``texts`` and write it to ``folder``.

    Deterministic for the same texts. Digits and the operators ``+ - * = #`` are tokens of their own; letters,
    spaces and other punctuation merge. Raises UserError when the vocabulary cannot hold all bytes, or without text.
    """
    specials, thoughts = [EOD, PAD], [THINK, END_THINK]
    smallest = 256 + len(specials) + len(thoughts)
    if settings.vocab_size < smallest:
        raise UserError(
            f"tokenizer.vocab_size={settings.vocab_size} must be at least {smallest}: all bytes and the special tokens"
        )
    backend = tokenizers.Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(PIECES), "isolated")
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([split, to_bytes])
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=settings.vocab_size - len(thoughts),
        special_tokens=specials,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    excerpt = list(_excerpt(texts, settings.training_characters))
    if not excerpt:
        raise UserError("the tokenizer has no text to train on: add a corpus to data.corpora, or set tokenizer.path")
    pulse.tick(f"training a tokenizer on {len(excerpt)} texts")
    backend.train_from_iterator(excerpt, trainer)
    backend.add_tokens([AddedToken(token, special=False, normalized=False) for token in thoughts])
    conventions = {"eos_token": EOD, "pad_token": PAD, "chat_template": settings.chat_template}
    tokenizer = Tokenizer(backend, conventions, str(folder))
    tokenizer.save(folder)
    return tokenizer


def _excerpt(texts: Iterable[str], characters: int) -> Iterator[str]:
    """The first ``characters`` of texts, without the tags of thoughts: they become tokens without merges."""
    for text in texts:
        pulse.tick("reading text for the tokenizer")
        yield from filter(None, re.split(f"{THINK}|{END_THINK}", text[:characters]))
        characters -= len(text)
        if characters <= 0:
            return


def _read_settings(file: Path) -> dict[str, Any]:
    """The special tokens and chat template a Hugging Face JSON file names; empty when there is no such file."""
    if not file.is_file():
        return {}
    try:
        content = json.loads(file.read_text())
        if not isinstance(content, dict):
            raise ValueError("not a JSON object")
    except ValueError as error:
        raise UserError(f"{file} is corrupt: {error}; download or train the tokenizer again") from None
    settings = {}
    for key in ("eos_token", "pad_token", "bos_token"):
        value = content.get(key)
        if isinstance(value, dict):  # older files describe the token in full
            value = value.get("content")
        if isinstance(value, str):
            settings[key] = value
    template = content.get("chat_template")
    if isinstance(template, list):  # several named ones
        template = next((entry.get("template") for entry in template if entry.get("name") == "default"), None)
    if isinstance(template, str):
        settings["chat_template"] = template
    return settings
