"""What the data stage writes, read back with Megatron's own reader."""

from __future__ import annotations

import json
import math
from collections import Counter

import pytest
from megatron.core.datasets.indexed_dataset import IndexedDataset

from nemo_rmt.config import Corpus
from nemo_rmt.data.tables import DOWNLOAD_VARIABLE
from nemo_rmt.data.tokenizer import Tokenizer, train_tokenizer
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
    monkeypatch.setattr(data, "documents", lambda *a, **k: iter(()) if "held_out" in a else whole(*a, **k))
    with pytest.raises(UserError, match=r"data.corpora\[chains\] has no held_out documents"):
        data.run(StageJob(stage="data", iteration=0, recipe=recipe), tmp_path)
    assert not (tmp_path / "result.json").exists()


def test_a_number_of_held_out_documents_is_kept_from_the_tokenizer_too(recipe, tmp_path, monkeypatch):
    path = tmp_path / "x.jsonl"
    path.write_text("".join(json.dumps({"text": f"document {index}"}) + "\n" for index in range(300)))
    own = recipe.model_copy(deep=True)
    own.data.corpora = [Corpus(name="own", kind="jsonl", path=str(path), held_out=40)]
    seen = []

    def keep(text):
        seen.append(text)
        return text

    monkeypatch.setattr(data, "train_tokenizer", lambda texts, *rest: train_tokenizer(map(keep, texts), *rest))
    data.run(StageJob(stage="data", iteration=0, recipe=own), tmp_path)
    tokenizer = Tokenizer.load(tmp_path / "tokenizer")
    train, held_out = (
        {tokenizer.decode(list(tokens)[:-1]) for tokens in documents(tmp_path, "own", split)}
        for split in ("train", "held_out")
    )
    assert (len(train), len(held_out)) == (260, 40) and not train & held_out
    assert set(seen) == train


def test_a_hub_corpus_is_refused_before_any_work_unless_the_stage_may_download(recipe, tmp_path, monkeypatch):
    own = recipe.model_copy(deep=True)
    own.data.corpora = [*own.data.corpora, Corpus(name="hub", kind="hub", path="owner/name")]
    asked = []
    monkeypatch.setattr(data, "documents", lambda *a, download, **k: asked.append(download) or iter(()))
    monkeypatch.setattr(data, "mixture", lambda *a, download, **k: asked.append(download) or iter(["a"]))
    monkeypatch.delenv(DOWNLOAD_VARIABLE, raising=False)
    with pytest.raises(UserError, match=r"data.corpora\[hub\] is owner/name on the Hugging Face hub"):
        data.run(StageJob(stage="data", iteration=0, recipe=own), tmp_path)
    assert not asked and not any(tmp_path.iterdir())
    monkeypatch.setenv(DOWNLOAD_VARIABLE, "1")
    with pytest.raises(UserError, match="no train documents"):
        data.run(StageJob(stage="data", iteration=0, recipe=own), tmp_path)
    assert asked == [True, True]


def test_a_long_corpus_says_how_far_it_is(monkeypatch, capsys):
    now = iter([0.0, 4.0, 9.9, 10.0, 10.0, 15.0, 30.0, 30.0])
    monkeypatch.setattr(data.time, "monotonic", lambda: next(now))
    rows = [[7] * 1000] * 5
    assert list(data.with_progress(rows, "[0/data] web, train")) == rows
    assert capsys.readouterr().out.splitlines() == [
        "[0/data] web, train: 3 documents, 3,000 tokens, 300 tokens/s",
        "[0/data] web, train: 5 documents, 5,000 tokens, 167 tokens/s",
    ]
