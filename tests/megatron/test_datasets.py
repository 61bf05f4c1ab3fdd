"""Pieces and fingerprints of indexed datasets."""

from __future__ import annotations

import random
from pathlib import Path

import numpy
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nemo_rmt.data import fingerprint
from nemo_rmt.data.fingerprint import dataset_fingerprint
from nemo_rmt.errors import UserError
from nemo_rmt.megatron.datasets import Documents, pieces_of, write_dataset

DOCUMENTS = [[10 * index + offset for offset in range(size)] for index, size in enumerate([5, 1, 4, 9, 2, 7, 3, 8])]


@pytest.fixture(scope="module")
def prefix(tmp_path_factory) -> Path:
    prefix = tmp_path_factory.mktemp("data") / "train"
    write_dataset(prefix, DOCUMENTS, vocab_size=100)
    return prefix


def read(prefix: Path, **changes) -> tuple[list[list[int]], list[list[int]]]:
    """Pieces, and the tokens of each."""
    options = {"max_tokens": None, "longest": 20, "split": False, "seed": 0, "name": "chains"} | changes
    pieces, tokens = pieces_of(prefix, **options)
    assert (pieces.dtype, tokens.dtype, pieces.shape[1]) == (numpy.int64, numpy.int32, 3)
    assert pieces[:, 2].sum() == len(tokens)
    return pieces.tolist(), [part.tolist() for part in numpy.split(tokens, numpy.cumsum(pieces[:-1, 2]))]


@settings(deadline=None)
@given(seed=st.integers(0, 2**64 - 1), longest=st.integers(2, 10), max_tokens=st.none() | st.integers(1, 50))
def test_pieces_are_their_documents_in_an_order_of_the_seed_until_there_are_enough(prefix, seed, longest, max_tokens):
    everything, _ = read(prefix, seed=seed, longest=longest, split=True)
    pieces, tokens = read(prefix, seed=seed, longest=longest, split=True, max_tokens=max_tokens)
    assert pieces == everything[: len(pieces)]
    for (document, first, size), found in zip(pieces, tokens, strict=True):
        assert found == DOCUMENTS[document][first : first + size] and 2 <= size <= longest
    by_document = {document: [] for document, *_ in everything}
    for document, first, size in everything:
        by_document[document] += range(first, first + size)
    for document, covered in by_document.items():
        size = len(DOCUMENTS[document])
        assert covered == list(range(size - (size % longest == 1)))  # all but a rest of one token
    assert by_document.keys() == {index for index, document in enumerate(DOCUMENTS) if len(document) > 1}
    sizes = [len(by_document[document]) for document in by_document]  # in the order of the documents
    needed = next((n for n in range(1, len(sizes)) if sum(sizes[:n]) >= (max_tokens or 1000)), len(sizes))
    assert list(dict.fromkeys(document for document, *_ in pieces)) == list(by_document)[:needed]


def test_another_seed_gives_another_order(prefix):
    orders = {tuple(document for document, *_ in read(prefix, seed=seed)[0]) for seed in range(5)}
    assert len(orders) == 5


def test_a_document_that_is_too_long_names_the_keys_to_change(prefix):
    expected = (
        r"data.corpora\[chains\] has a document of 9 tokens, more than rmt.document_length=6: set "
        r"rmt.long_documents=split, or raise rmt.document_length"
    )
    with pytest.raises(UserError, match=expected):
        read(prefix, longest=6)


def test_a_dataset_without_anything_to_predict_is_refused(tmp_path):
    write_dataset(tmp_path / "train", [[1], [2]], vocab_size=100)
    with pytest.raises(UserError, match=r"data.corpora\[chains\] has no document of 2 tokens or more"):
        read(tmp_path / "train")
    with pytest.raises(ValueError, match="longest must be at least 2"):
        read(tmp_path / "train", longest=1)


def test_documents_are_read_several_at_once(prefix):
    documents = Documents(prefix)
    assert documents.lengths.tolist() == [len(document) for document in DOCUMENTS]
    for first, end in ((0, len(DOCUMENTS)), (2, 5), (7, 8), (3, 3)):
        expected = [token for document in DOCUMENTS[first:end] for token in document]
        assert documents.tokens(first, end).tolist() == expected


def test_the_fingerprint_is_the_contents_wherever_they_lie(prefix, tmp_path):
    write_dataset(tmp_path / "copy", DOCUMENTS, vocab_size=100)
    assert dataset_fingerprint(tmp_path / "copy") == dataset_fingerprint(prefix)
    others = {
        "other_token": [[*DOCUMENTS[0][:-1], 99], *DOCUMENTS[1:]],
        "other_cut": [DOCUMENTS[0] + DOCUMENTS[1], *DOCUMENTS[2:]],
        "other_order": DOCUMENTS[::-1],
    }
    for name, documents in others.items():
        write_dataset(tmp_path / name, documents, vocab_size=100)
    prints = {dataset_fingerprint(path) for path in (prefix, *(tmp_path / name for name in others))}
    assert len(prints) == 4


def test_of_a_large_dataset_both_ends_are_read(tmp_path, monkeypatch):
    monkeypatch.setattr(fingerprint, "FINGERPRINTED", 64)
    rng = random.Random(0)
    documents = [[rng.randrange(100) for _ in range(50)] for _ in range(20)]
    write_dataset(tmp_path / "train", documents, vocab_size=100)
    whole = dataset_fingerprint(tmp_path / "train")
    tokens = bytearray((tmp_path / "train.bin").read_bytes())
    for place, seen in ((0, True), (63, True), (1000, False), (len(tokens) - 64, True), (len(tokens) - 1, True)):
        changed = bytearray(tokens)
        changed[place] ^= 1
        (tmp_path / "train.bin").write_bytes(changed)
        assert (dataset_fingerprint(tmp_path / "train") != whole) == seen
    (tmp_path / "train.bin").write_bytes(bytes(len(tokens)))
    zeros = dataset_fingerprint(tmp_path / "train")
    (tmp_path / "train.bin").write_bytes(bytes(len(tokens) - 64))
    assert dataset_fingerprint(tmp_path / "train") != zeros
    index = bytearray((tmp_path / "train.idx").read_bytes())
    index[len(index) // 2] ^= 1
    (tmp_path / "train.bin").write_bytes(tokens)
    (tmp_path / "train.idx").write_bytes(index)
    assert dataset_fingerprint(tmp_path / "train") != whole
