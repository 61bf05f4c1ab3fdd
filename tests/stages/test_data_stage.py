"""What the data stage writes, read back with Megatron's own reader."""

from __future__ import annotations

import json
import math
from collections import Counter

import pytest
from megatron.core.datasets.indexed_dataset import IndexedDataset

from nemo_rmt.data.tokenizer import Tokenizer
from nemo_rmt.errors import UserError
from nemo_rmt.stages import data
from nemo_rmt.stages.job import StageJob

DOMAINS = ("chains", "more")


def documents(data_folder, domain: str, split: str) -> list[tuple[int, ...]]:
    dataset = IndexedDataset(str(data_folder / domain / split))
    return [tuple(dataset[index].tolist()) for index in range(len(dataset))]


def metrics(data_folder) -> dict[str, float]:
    result = json.loads((data_folder / "result.json").read_text())
    assert (result["status"], result["checkpoint"]) == ("done", None)
    return result["metrics"]


def test_every_document_ends_in_the_end_of_document_token_and_nowhere_else(data_folder):
    tokenizer = Tokenizer.load(data_folder / "tokenizer")
    for domain in DOMAINS:
        for split in ("train", "held_out"):
            for document in documents(data_folder, domain, split):
                assert document[-1] == tokenizer.eod and tokenizer.eod not in document[:-1]
                assert len(document) > 1 and max(document) < tokenizer.vocab_size


def test_counts_are_those_of_the_files(data_folder):
    found = metrics(data_folder)
    for domain in DOMAINS:
        for split in ("train", "held_out"):
            written = documents(data_folder, domain, split)
            assert found[f"data/{domain}/{split}_documents"] == len(written) > 0
            assert found[f"data/{domain}/{split}_tokens"] == sum(map(len, written))
    result = json.loads((data_folder / "result.json").read_text())
    assert result["tokens"] == sum(found[f"data/{domain}/train_tokens"] for domain in DOMAINS)


def test_no_held_out_document_is_trained_on(data_folder):
    for domain in DOMAINS:
        train, held_out = (set(documents(data_folder, domain, split)) for split in ("train", "held_out"))
        assert not train & held_out


def test_the_unigram_nll_is_that_of_add_one_smoothing(data_folder):
    vocab_size = int(metrics(data_folder)["tokenizer/vocab_size"])
    splits = {
        domain: [sum(map(list, documents(data_folder, domain, split)), []) for split in ("train", "held_out")]
        for domain in DOMAINS
    }
    splits["all"] = [sum((splits[domain][part] for domain in DOMAINS), []) for part in (0, 1)]
    for name, (train, held_out) in splits.items():
        counts, total = Counter(train), 0.0
        for token in held_out:
            total -= math.log((counts[token] + 1) / (len(train) + vocab_size))
        assert metrics(data_folder)[f"lm/{name}/unigram_nll"] == pytest.approx(total / len(held_out), rel=1e-9)


def test_running_it_again_after_an_interruption_writes_the_same(recipe, data_folder, tmp_path):
    (tmp_path / "chains").mkdir()
    (tmp_path / "chains" / "train.bin").write_bytes(b"torn")
    data.run(StageJob(stage="data", iteration=0, recipe=recipe), tmp_path)
    written = [path.relative_to(data_folder) for path in data_folder.rglob("*") if path.is_file()]
    assert len(written) == 2 + 2 * 2 * len(DOMAINS) + 1
    for name in {str(path) for path in written} - {"result.json"}:  # which says how long it took
        assert (tmp_path / name).read_bytes() == (data_folder / name).read_bytes(), name


def test_a_given_tokenizer_is_copied_and_used(recipe, data_folder, tmp_path):
    other = recipe.model_copy(deep=True)
    other.tokenizer.path = str(data_folder / "tokenizer")
    data.run(StageJob(stage="data", iteration=0, recipe=other), tmp_path)
    ours, theirs = (Tokenizer.load(folder / "tokenizer") for folder in (tmp_path, data_folder))
    assert ours.fingerprint == theirs.fingerprint
    assert documents(tmp_path, "more", "held_out") == documents(data_folder, "more", "held_out")


def test_no_corpora_and_a_split_without_documents_are_refused(recipe, tmp_path, monkeypatch):
    empty = recipe.model_copy(deep=True)
    empty.data.corpora = []
    with pytest.raises(UserError, match="data.corpora is empty"):
        data.run(StageJob(stage="data", iteration=0, recipe=empty), tmp_path)
    whole = data.documents
    monkeypatch.setattr(data, "documents", lambda *a: iter(()) if "held_out" in a else whole(*a))
    with pytest.raises(UserError, match=r"data.corpora\[chains\] has no held_out documents"):
        data.run(StageJob(stage="data", iteration=0, recipe=recipe), tmp_path)
    assert not (tmp_path / "result.json").exists()
