"""Entropies kept and cut into tiers, against plain Python."""

from __future__ import annotations

import json
import math
import multiprocessing
import os
import shutil

import numpy
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nemo_rmt.config import Curriculum, Difficulty
from nemo_rmt.data import difficulty
from nemo_rmt.data.difficulty import (
    ScoredCorpus,
    Tiers,
    askable,
    cut_tiers,
    load_scores,
    require_scores_of,
    require_tiers,
    save_scores,
)
from nemo_rmt.errors import UserError

IDENTITY = {"tokenizer": "t" * 64, "model": "m", "corpora": {"chains": "c" * 64, "code": "d" * 64}, "seed": 1}


def scored(entropies: list[list[float]], tokens: list[list[int]] | None = None, name: str = "chains") -> ScoredCorpus:
    """A corpus of whole documents."""
    tokens = tokens or [[7] * len(each) for each in entropies]
    pieces = [[index, 0, len(each)] for index, each in enumerate(entropies)]
    flat = [numpy.array(sum(parts, []), dtype=kind) for parts, kind in ((tokens, "int32"), (entropies, "float32"))]
    return ScoredCorpus(name, numpy.array(pieces, dtype=numpy.int64).reshape(-1, 3), *flat)


def test_a_corpus_gives_its_pieces_by_index():
    corpus = scored([[math.nan, 1, 2], [math.nan, 3]], [[5, 6, 7], [8, 9]])
    assert (len(corpus), corpus.starts.tolist()) == (2, [0, 3, 5])
    assert [corpus.document(index) for index in range(2)] == [[5, 6, 7], [8, 9]]


@pytest.mark.parametrize("pieces, tokens, entropy", [([[0, 0, 3]], 2, 3), ([[0, 0, 3]], 3, 2), ([[0, 3]], 3, 3)])
def test_arrays_that_disagree_are_refused(pieces, tokens, entropy):
    with pytest.raises(ValueError, match="of corpus chains disagree"):
        ScoredCorpus("chains", numpy.array(pieces), numpy.zeros(tokens), numpy.zeros(entropy))


def test_only_ordinary_tokens_outside_thoughts_may_be_asked_for(tokenizer):
    think, end_think = tokenizer.think, tokenizer.end_think
    token = st.sampled_from([40, 50, think, end_think, tokenizer.pad])
    documents = st.lists(st.lists(token, min_size=1, max_size=12), min_size=1, max_size=4)
    entropies = st.sampled_from([0.5, 0.0, math.inf])

    @given(documents, st.integers(2, 5), st.integers(1, 3), st.data())
    def check(documents, longest, first_position, data):
        pieces, tokens, entropy, expected = [], [], [], []
        for index, document in enumerate(documents):
            document = [*document, tokenizer.eod]
            thinking = False
            for first in range(0, len(document), longest):
                piece = document[first : first + longest]
                pieces.append([index, first, len(piece)])
                values = [math.nan, *(data.draw(entropies) for _ in piece[1:])]
                for place, (found, value) in enumerate(zip(piece, values, strict=True)):
                    thinking = found == think or (thinking and found != end_think)
                    plain = found in (40, 50) and not thinking
                    expected.append(plain and place >= first_position and math.isfinite(value))
                tokens += piece
                entropy += values
        corpus = ScoredCorpus(
            "chains", numpy.array(pieces), numpy.array(tokens, dtype="int32"), numpy.array(entropy, dtype="float32")
        )
        assert askable(corpus, tokenizer, first_position).tolist() == expected

    check()


def test_a_thought_left_open_hides_its_own_document_only(tokenizer):
    entropies = [[math.nan, 1, 1, 1], [math.nan, 1, 1]]
    corpus = scored(entropies, [[40, 41, tokenizer.think, 42], [43, 44, 45]])
    assert askable(corpus, tokenizer, 1).tolist() == [False, True, False, False, False, True, True]


def test_a_tokenizer_without_thoughts_hides_none(tokenizer, monkeypatch):
    think, end_think = tokenizer.think, tokenizer.end_think
    monkeypatch.setattr(tokenizer, "think", None)
    monkeypatch.setattr(tokenizer, "end_think", None)
    corpus = scored([[math.nan, 1, 1, 1]], [[40, think, 42, end_think]])
    assert askable(corpus, tokenizer, 1).tolist() == [False, True, True, True]


def cut(corpora: list[ScoredCorpus], **settings) -> Tiers:
    """Tiers where all but first tokens may be asked for."""
    return cut_tiers(corpora, [numpy.isfinite(corpus.entropy) for corpus in corpora], Difficulty(**settings))


def test_edges_in_nats_are_the_same_in_every_corpus():
    corpora = [scored([[math.nan, 0.1, 0.5, 1.4, 1.5]]), scored([[math.nan, 9.0]], name="code")]
    tiers = cut(corpora, edges=(0.5, 1.5))
    assert [each.tolist() for each in tiers.tiers] == [[-1, 0, 1, 1, 2], [-1, 2]]
    assert tiers.edges == {"chains": (0.5, 1.5), "code": (0.5, 1.5)}
    assert (tiers.counts, tiers.tiers[0].dtype) == ([1, 2, 2], numpy.int8)


def test_tokens_at_the_ceiling_or_above_are_never_asked_for():
    tiers = cut([scored([[math.nan, 1.0, 2.9, 3.0, 8.0]])], edges=(0.5, 1.5), ceiling=3.0)
    assert tiers.tiers[0].tolist() == [-1, 1, 2, -1, -1]
    assert tiers.edges == {"chains": (0.5, 1.5, 3.0)}


def ramp(lowest: float, name: str) -> ScoredCorpus:
    """101 tokens to ask for, of entropies a hundredth apart."""
    return scored([[math.nan, *(lowest + step / 100 for step in range(101))]], name=name)


def test_quantiles_of_each_corpus_cut_each_into_the_same_shares():
    tiers = cut([ramp(0, "chains"), ramp(5, "code")], edges=None, quantiles=(0.5, 0.8), ceiling=0.9)
    for each in tiers.tiers:
        assert numpy.bincount(each + 1).tolist() == [1 + 11, 50, 30, 10]
    assert tiers.edges["chains"] == pytest.approx((0.5, 0.8, 0.9))
    assert tiers.edges["code"] == pytest.approx((5.5, 5.8, 5.9))


def test_quantiles_over_all_corpora_are_one_pair_of_edges():
    tiers = cut([ramp(0, "chains"), ramp(5, "code")], edges=None, quantiles=(0.25, 0.75), per_domain=False)
    assert tiers.edges["chains"] == tiers.edges["code"]
    assert [numpy.bincount(each + 1, minlength=4).tolist() for each in tiers.tiers] == [[1, 51, 50, 0], [1, 0, 50, 51]]


def test_quantiles_are_of_the_tokens_that_may_be_asked_for():
    corpus = ramp(0, "chains")
    allowed = numpy.isfinite(corpus.entropy) & (corpus.entropy > 0.495)
    tiers = cut_tiers([corpus], [allowed], Difficulty(edges=None, quantiles=(0.5, 0.8)))
    assert tiers.edges["chains"] == pytest.approx((0.75, 0.9))
    assert (tiers.tiers[0][~allowed] == -1).all() and (tiers.tiers[0][allowed] >= 0).all()


@pytest.mark.parametrize("per_domain", [True, False])
def test_a_corpus_without_tokens_to_ask_for_has_no_tier(per_domain):
    settings = {"edges": None, "quantiles": (0.5, 0.8), "per_domain": per_domain}
    assert cut([scored([[math.nan]])], **settings).edges == {}
    both = cut([scored([[math.nan]]), ramp(0, "code")], **settings)
    assert both.tiers[0].tolist() == [-1] and both.counts == [50, 30, 21]


def test_a_curriculum_that_asks_for_a_tier_without_tokens_is_told_what_there_is():
    tiers = cut([scored([[math.nan, 0.1, 0.7, 0.8]])], edges=(0.5, 1.5))
    expected = (
        r"rmt.curriculum gives hard tokens a probability of up to 0.6, but there are none: 1 easy, 2 medium, 0 hard "
        r"and 1 never asked for, with edges in nats of chains: 0.5, 1.5. Change rmt.difficulty.edges or "
        r"rmt.difficulty.quantiles, raise rmt.difficulty.max_tokens, or give hard probability 0 in rmt.curriculum.early"
    )
    with pytest.raises(UserError, match=expected):
        require_tiers(tiers, Curriculum())
    require_tiers(tiers, Curriculum(early=(0.5, 0.5, 0), late=(0, 1, 0)))
    with pytest.raises(UserError, match="up to 0.2"):
        require_tiers(tiers, Curriculum(early=(0.4, 0.4, 0.2), late=(0, 1, 0)))


def two_corpora() -> list[ScoredCorpus]:
    return [scored([[math.nan, 0.25, 2.5], [math.nan, 1.5]], [[5, 6, 7], [8, 9]]), ramp(1, "code")]


def assert_same(found: list[ScoredCorpus], expected: list[ScoredCorpus]) -> None:
    assert [corpus.name for corpus in found] == [corpus.name for corpus in expected]
    for one, other in zip(found, expected, strict=True):
        for name in ("pieces", "tokens", "entropy"):
            numpy.testing.assert_array_equal(getattr(one, name), getattr(other, name), strict=True)


def test_scores_come_back_as_they_were_saved(tmp_path):
    save_scores(tmp_path / "new" / "scores", two_corpora(), IDENTITY)
    corpora, identity = load_scores(tmp_path / "new" / "scores")
    assert_same(corpora, two_corpora())
    assert identity == IDENTITY
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["scores"]


class Killed(BaseException):
    """In place of the signal."""


def test_a_kill_at_any_moment_leaves_whole_scores_or_none(tmp_path, monkeypatch):
    folder = tmp_path / "scores"
    moments = [(numpy, "savez"), (difficulty, "write_json"), (os, "fsync"), (os, "replace"), (shutil, "rmtree")]
    for module, name in moments:
        with monkeypatch.context() as patch:

            def dies(*arguments, **options):
                raise Killed

            patch.setattr(module, name, dies)
            with pytest.raises(Killed):
                save_scores(folder, two_corpora(), IDENTITY)
        assert folder.exists() == (name == "rmtree")
        save_scores(folder, two_corpora(), IDENTITY)
        assert_same(load_scores(folder)[0], two_corpora())
        shutil.rmtree(folder)


def test_of_processes_that_write_the_same_scores_at_once_all_succeed(tmp_path):
    folder = tmp_path / "scores"
    with multiprocessing.get_context("fork").Pool(4) as pool:
        pool.starmap(save_scores, [(folder, two_corpora(), IDENTITY)] * 40, chunksize=1)
    assert_same(load_scores(folder)[0], two_corpora())
    assert list(tmp_path.iterdir()) == [folder]


def test_missing_scores_are_named(tmp_path):
    with pytest.raises(UserError, match="nowhere holds no scores: .*difficulty.json is missing; .*rmt.difficulty.scor"):
        load_scores(tmp_path / "nowhere")
    save_scores(tmp_path / "scores", two_corpora(), IDENTITY)
    (tmp_path / "scores" / "code.npz").unlink()
    with pytest.raises(UserError, match="scores holds no scores: .*code.npz is missing"):
        load_scores(tmp_path / "scores")


def test_torn_and_altered_scores_are_refused(tmp_path):
    folder = tmp_path / "scores"
    save_scores(folder, two_corpora(), IDENTITY)
    for name in ("chains.npz", "difficulty.json"):
        whole = (folder / name).read_bytes()
        for size in range(0, len(whole) - 1, 7):
            (folder / name).write_bytes(whole[:size])
            with pytest.raises(UserError, match="damaged.*delete the folder"):
                load_scores(folder)
        (folder / name).write_bytes(whole)
    whole = (folder / "chains.npz").read_bytes()
    for place in range(len(whole)):
        (folder / "chains.npz").write_bytes(whole[:place] + bytes([whole[place] ^ 0x41]) + whole[place + 1 :])
        try:
            assert_same(load_scores(folder)[0], two_corpora())  # a time stamp, or another byte that says nothing
        except UserError:
            pass


def test_scores_of_another_format_are_refused(tmp_path):
    save_scores(tmp_path, two_corpora(), IDENTITY)
    file = tmp_path / "difficulty.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"format": 2}))
    with pytest.raises(UserError, match="have format 2, this version reads 1"):
        load_scores(tmp_path)


def test_scores_by_another_model_may_be_used_those_of_other_tokens_not(tmp_path):
    require_scores_of(IDENTITY, {**IDENTITY, "model": "other", "seed": 2}, tmp_path)
    key = "rmt.difficulty.scores=.*"
    remedy = ".*rmt.difficulty.scores=null"
    with pytest.raises(
        UserError, match=f"{key}another tokenizer's tokens .fingerprint t{{12}}, the run's is u{remedy}"
    ):
        require_scores_of(IDENTITY, {**IDENTITY, "tokenizer": "u" * 64}, tmp_path)
    changed = {**IDENTITY, "corpora": {**IDENTITY["corpora"], "code": "e" * 64}}
    with pytest.raises(UserError, match=f"{key}scores of another dataset: .*data.corpora.code. are not{remedy}"):
        require_scores_of(IDENTITY, changed, tmp_path)
    fewer = {**IDENTITY, "corpora": {"chains": "c" * 64}}
    with pytest.raises(
        UserError, match=f"{key}another dataset: of corpora chains, code, the stage reads chains{remedy}"
    ):
        require_scores_of(IDENTITY, fewer, tmp_path)
    with pytest.raises(UserError, match="another dataset: of corpora none, "):
        require_scores_of({"tokenizer": "t" * 64}, IDENTITY, tmp_path)
