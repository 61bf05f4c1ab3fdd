"""What the data tests share: a small tokenizer trained once."""

from __future__ import annotations

import inspect
import random
from pathlib import Path

import hypothesis
import pytest

from nemo_rmt import config
from nemo_rmt.data import chains
from nemo_rmt.data.tokenizer import Tokenizer, train_tokenizer

hypothesis.settings.register_profile("any_machine", deadline=None)  # a busy machine is no wrong answer
hypothesis.settings.load_profile("any_machine")


@pytest.fixture(scope="session")
def training_texts() -> list[str]:
    """Chain documents of every style, and some code."""
    rng = random.Random(0)
    documents = [
        chains.document(style, chains.draw(rng, [3, 4, 5]), rng, error_rate=0.1, lazy=0.5)
        for style in chains.STYLES * 100
    ]
    return documents + [inspect.getsource(random)]


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory, training_texts: list[str]) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(training_texts, config.Tokenizer(vocab_size=300), folder)
    return folder


@pytest.fixture(scope="session")
def tokenizer(tokenizer_folder: Path) -> Tokenizer:
    return Tokenizer.load(tokenizer_folder)
