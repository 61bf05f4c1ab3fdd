"""Published models, made once for all the tests that import or export them."""

from __future__ import annotations

from pathlib import Path

import pytest
from published_models import FAMILIES, published

from nemo_rmt import config
from nemo_rmt.data.tokenizer import Tokenizer, train_tokenizer


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(["1+2=3; 4*5=20. A few words."] * 50, config.Tokenizer(vocab_size=300), folder)
    return folder


@pytest.fixture(scope="session")
def published_folders(tmp_path_factory, tokenizer_folder) -> dict[str, Path]:
    """A Hugging Face folder, with its tokenizer, for each family."""
    folders = {}
    for family in FAMILIES:
        folders[family] = folder = tmp_path_factory.mktemp(family) / "published"
        published(family).save_pretrained(folder)
        Tokenizer.load(tokenizer_folder).save(folder)
    return folders
