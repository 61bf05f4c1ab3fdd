"""Log-probabilities in 2 bytes: how exact they are, how they lie in their folder, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import numpy
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nemo_rmt.data import cache_blocks
from nemo_rmt.data.cache_blocks import UNSCORED, block_bounds, kinds_of, windows
from nemo_rmt.data.logprob_cache import (
    LogprobCache,
    Stretches,
    begin,
    block_path,
    complete,
    decode,
    encode,
    write_block,
)
from nemo_rmt.errors import UserError
from nemo_rmt.objectives import remit_weights

LENGTHS = numpy.array([5, 3, 9, 2, 6, 1, 7])
PLAN = {
    "format": 1,
    "corpora": {"chains": {"dataset": "d" * 64}},
    "tokenizer": "t" * 64,
    "model": {"digest": "m" * 64, "path": "/model"},
    "precision": "fp32",
    "sequence_length": 64,
}


def weights(reference: numpy.ndarray, policy: numpy.ndarray) -> numpy.ndarray:
    tensors = [torch.from_numpy(each.astype(numpy.float32))[None] for each in (reference, policy)]
    return remit_weights(*tensors, torch.ones_like(tensors[0]), epsilon=1.0)[0].numpy()


def test_weights_from_the_cache_equal_float32s_within_a_thousandth_where_float16s_do_not():
    rng = numpy.random.default_rng(0)
    reference = -rng.uniform(0, 40, 20_000).astype(numpy.float32)
    policy = reference + rng.normal(0, 1, len(reference)).astype(numpy.float32)
    exact = weights(reference, policy)
    assert numpy.abs(weights(decode(encode(reference)), policy) - exact).max() < 3e-4
    assert numpy.abs(weights(reference.astype(numpy.float16), policy) - exact).max() > 1e-3


@given(st.floats(-63.875, 0, width=32))
def test_a_number_is_off_by_half_a_unit_at_most(logprob):
    logprobs = numpy.array([logprob], dtype=numpy.float32)
    assert abs(decode(encode(logprobs)) - logprobs) <= 1 / 2048 + 1e-5


def test_what_is_beyond_the_range_is_clamped_and_never_taken_for_a_token_without_a_score():
    found = encode(numpy.array([-1000.0, -64.5, 0.0, 1e-4], dtype=numpy.float32))
    assert found.tolist() == [UNSCORED - 1, UNSCORED - 1, 0, 0]
    assert numpy.isnan(decode(numpy.array([UNSCORED], dtype=numpy.uint16)))


@given(st.lists(st.integers(1, 60), min_size=1, max_size=40))
def test_blocks_are_whole_documents_in_order_of_about_the_same_size(lengths):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cache_blocks, "BLOCK_TOKENS", 50)
        bounds = block_bounds(numpy.array(lengths)).tolist()
    assert bounds[0] == 0 and bounds[-1] == len(lengths) and bounds == sorted(set(bounds))
    assert all(sum(lengths[a:b]) < 50 + 60 for a, b in zip(bounds[:-1], bounds[1:], strict=True))


@given(st.lists(st.integers(1, 100), min_size=1, max_size=20), st.integers(2, 30))
def test_every_token_but_first_ones_is_taken_once_from_the_window_with_most_before_it(lengths, longest):
    found = windows(numpy.array(lengths), longest)
    start = 0
    taken = {}
    for first, size, own in found.tolist():
        assert 2 <= size <= longest
        for token in range(first + own, first + size):
            assert token not in taken
            taken[token] = token - first
    for length in lengths:
        assert start not in taken
        for offset in range(1, length):
            step = longest // 2
            most = max(offset - at for at in range(0, offset, step) if offset - at < longest)
            assert taken.pop(start + offset) == most
        start += length
    assert not taken


def write_cache(folder: Path, plan: dict) -> Path:
    """A complete cache of LENGTHS's documents. Token i has number i; its K likeliest are 1000 i and those that follow,
    with the numbers i and those that follow."""
    begin(folder, plan)
    bounds = block_bounds(LENGTHS)
    ends = numpy.cumsum(LENGTHS)
    sizes = [int(LENGTHS[a:b].sum()) for a, b in zip(bounds[:-1], bounds[1:], strict=True)]
    for block, (end, size) in enumerate(zip(ends[bounds[1:] - 1], sizes, strict=True)):
        for kind, factor in zip(kinds_of(plan), (1, 1000, 1), strict=False):
            numbers = numpy.arange(end - size, end)[:, None] * factor + numpy.arange(kind.width)
            write_block(block_path(folder, "chains", block, kind), numbers, kind)
    complete(folder, {"chains": sizes})
    return folder


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(cache_blocks, "BLOCK_TOKENS", 10)


@pytest.fixture
def cache(tmp_path) -> Path:
    return write_cache(tmp_path / "cache", PLAN)


def some_rows() -> list[Stretches]:
    """Rows from the middle of a document, of whole documents, and of one that comes twice."""
    starts = numpy.cumsum(LENGTHS) - LENGTHS
    rows = []
    for documents, skipped in (([6, 0], 2), ([2, 5], 0), ([4, 3, 3], 4)):
        sizes = LENGTHS[documents]
        sizes[0] -= skipped
        first = starts[documents]
        first[0] += skipped
        rows.append(Stretches(Path("run/chains/train"), numpy.array(documents), first, sizes))
    return rows


def tokens_of(row: Stretches) -> list[int]:
    """Where its tokens are in the dataset."""
    return [i for first, size in zip(row.first, row.sizes, strict=True) for i in range(first, first + size)]


def test_rows_are_read_wherever_their_documents_lie(cache):
    for row in some_rows():
        found = LogprobCache(cache).logprobs([row])
        assert found.dtype == numpy.float32
        assert (found[0] * -1024).tolist() == tokens_of(row)
    assert len(list((cache / "chains").iterdir())) > 2


@pytest.mark.parametrize(("vocab_size", "suffix", "size"), [(2**16, "u16", 2), (2**16 + 1, "u32", 4)])
def test_the_likeliest_tokens_are_read_beside_the_log_probabilities(tmp_path, vocab_size, suffix, size):
    folder = write_cache(tmp_path / "cache", {**PLAN, "top_k": 3, "vocab_size": vocab_size})
    for block in (0, 1):
        held = block_path(folder, "chains", block).stat().st_size // 2
        assert (folder / f"chains/block_0000{block}.top_tokens.{suffix}").stat().st_size == held * 3 * size
    cache = LogprobCache(folder)
    assert cache.top_k == 3
    for row in some_rows():
        tokens, logprobs = cache.top([row, row])
        assert (tokens.dtype, logprobs.dtype) == (numpy.int64, numpy.float32)
        assert tokens[1].tolist() == [[1000 * i, 1000 * i + 1, 1000 * i + 2] for i in tokens_of(row)]
        assert (logprobs[0] * -1024).tolist() == [[i, i + 1, i + 2] for i in tokens_of(row)]
        assert (cache.logprobs([row])[0] * -1024).tolist() == tokens_of(row)


def test_a_token_without_a_score_has_no_likeliest_ones(tmp_path):
    _, tokens, logprobs = kinds_of({"top_k": 2, "vocab_size": 300})
    assert tokens.empty(1).tolist() == [[0, 0]] and numpy.isnan(decode(logprobs.empty(1))).all()


def test_a_cache_without_likeliest_tokens_says_so(cache):
    found = LogprobCache(cache)
    assert found.top_k == 0
    with pytest.raises(ValueError, match="has log-probabilities only"):
        found.top(some_rows()[:1])


@pytest.mark.parametrize("name", ["block_00000.top_tokens.u16", "block_00001.top_logprobs.u16"])
def test_a_truncated_file_of_likeliest_tokens_is_refused(tmp_path, name):
    folder = write_cache(tmp_path / "cache", {**PLAN, "top_k": 3, "vocab_size": 300})
    path = folder / "chains" / name
    path.write_bytes(path.read_bytes()[:-2])
    with pytest.raises(UserError, match=f"is truncated: chains/{name} has {path.stat().st_size} bytes instead of"):
        LogprobCache(folder)


def test_messages_name_the_reference_whose_cache_it_is(cache):
    found = LogprobCache(cache, "anneal.distill.reference")
    with pytest.raises(UserError, match="anneal.distill.reference.cache=.* than anneal.distill.reference.checkpoint"):
        found.require({"chains": "d" * 64}, "t" * 64, "n" * 64)


def test_a_cache_of_other_data_tokens_or_model_is_refused(cache):
    found = LogprobCache(cache)
    data = {"chains": "d" * 64}
    found.require(data, "t" * 64, None)
    found.require(data, "t" * 64, "m" * 64)
    for arguments, message in [
        (
            ({"chains": "e" * 64}, "t" * 64, None),
            r"data.corpora\[chains\] are not those that were scored.*dddddddddddd",
        ),
        (({**data, "more": "d" * 64}, "t" * 64, None), r"has no data.corpora\[more\], only chains"),
        ((data, "u" * 64, None), "another tokenizer's tokens .fingerprint tttttttttttt, the run's is uuuuuuuuuuuu"),
        ((data, "t" * 64, "n" * 64), "another model .made from /model. than anneal.remit.reference.checkpoint"),
    ]:
        with pytest.raises(UserError, match=message) as error:
            found.require(*arguments)
        assert f"anneal.remit.reference.cache={cache}" in str(error.value)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "manifest.json").unlink(), "is not finished.*run nemo-rmt data score again"),
        (lambda folder: (folder / "chains/block_00001.u16").unlink(), "block_00001.u16 is missing instead of"),
        (lambda folder: (folder / "chains/block_00000.u16").write_bytes(b"abc"), "has 3 bytes instead of 34 bytes"),
        (lambda folder: (folder / "manifest.json").write_text("{"), "manifest.json cannot be read"),
        (lambda folder: (folder / "manifest.json").write_text("{}"), "manifest.json cannot be read"),
        (lambda folder: (folder / "manifest.json").write_text('{"format": 9}'), "has format 9, this version reads 1"),
        (lambda folder: [path.unlink() for path in folder.glob("*.json")], "make it with nemo-rmt data score"),
    ],
)
def test_a_cache_that_is_not_whole_is_refused(cache, damage, message):
    LogprobCache(cache)
    damage(cache)
    with pytest.raises(UserError, match=message):
        LogprobCache(cache)


def test_a_cache_goes_on_only_as_what_it_began_as(tmp_path):
    folder = tmp_path / "cache"
    begin(folder, PLAN)
    begin(folder, {**PLAN, "model": {**PLAN["model"], "path": "/moved"}})
    for key, value in {
        "tokenizer": "u" * 64,
        "model": {"digest": "n" * 64, "path": "/other"},
        "corpora": {"chains": {"dataset": "e" * 64}},
        "sequence_length": 128,
        "precision": "bf16",
    }.items():
        with pytest.raises(UserError, match=f"begun as another one: {key} .* give another folder"):
            begin(folder, {**PLAN, key: value})
    with pytest.raises(UserError, match="top_k 0 there, 8 now; give another folder, cache=FOLDER, or no top_k"):
        begin(folder, {**PLAN, "top_k": 8, "vocab_size": 300})
    begin(tmp_path / "top", {**PLAN, "top_k": 8, "vocab_size": 300})
    with pytest.raises(UserError, match="top_k 8 there, 4 now; give another folder, cache=FOLDER, or top_k=8"):
        begin(tmp_path / "top", {**PLAN, "top_k": 4, "vocab_size": 300})
    assert json.loads((folder / "plan.json").read_text()) == PLAN


def test_a_folder_of_something_else_is_left_alone(tmp_path):
    (tmp_path / "weights.bin").write_bytes(b"w")
    with pytest.raises(UserError, match="no cache of log-probabilities .it holds weights.bin."):
        begin(tmp_path, PLAN)
    assert [path.name for path in tmp_path.iterdir()] == ["weights.bin"]
