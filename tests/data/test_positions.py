"""Drawn positions: as many as asked, of the tiers asked for, every token once before any comes again."""

from __future__ import annotations

from collections import Counter

import numpy
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nemo_rmt.data.positions import Asked, PositionSampler

Layout = list[list[list[int]]]
"""For each corpus and document the tiers of its tokens."""

layouts = st.lists(
    st.lists(st.lists(st.integers(-1, 2), min_size=1, max_size=6), max_size=5), min_size=1, max_size=3
).filter(lambda layout: any(tier >= 0 for corpus in layout for document in corpus for tier in document))


def sampler(layout: Layout, seed: int = 0, most: int = 4) -> PositionSampler:
    tiers = [numpy.array(sum(corpus, []), dtype=numpy.int8) for corpus in layout]
    starts = [numpy.cumsum([0, *map(len, corpus)]) for corpus in layout]
    return PositionSampler(tiers, starts, seed=seed, positions_per_document=most)


def sizes(layout: Layout) -> list[int]:
    """Tokens of each tier."""
    return [sum(document.count(tier) for corpus in layout for document in corpus) for tier in range(3)]


def tokens(asked: list[Asked]) -> list[tuple[int, int, int]]:
    return [(entry.corpus, entry.document, position) for entry in asked for position in entry.positions]


@st.composite
def schedules(draw, layout: Layout) -> list[tuple[list[float], int]]:
    """Probabilities and counts of some draws, none of a tier without tokens."""
    weight = st.sampled_from([0.0, 0.0, 0.1, 0.5, 1.0])
    found = []
    for _ in range(draw(st.integers(1, 6))):
        weights = [draw(weight) if size else 0.0 for size in sizes(layout)]
        weights = weights if any(weights) else [float(size > 0) for size in sizes(layout)]
        found.append(([each / sum(weights) for each in weights], draw(st.integers(0, 12))))
    return found


@given(layouts, st.integers(1, 5), st.integers(0, 3), st.data())
def test_every_draw_is_as_asked_and_no_token_comes_again_before_all_of_its_tier(layout, most, seed, data):
    source, drawn = sampler(layout, seed, most), Counter()
    for probabilities, count in data.draw(schedules(layout)):
        asked = source.draw(probabilities, count)
        assert len(tokens(asked)) == count
        for entry in asked:
            assert 1 <= len(entry.positions) <= most
            assert entry.positions == sorted(set(entry.positions))
            assert entry.tiers == [layout[entry.corpus][entry.document][position] for position in entry.positions]
            assert all(tier >= 0 and probabilities[tier] for tier in entry.tiers)
        drawn.update(tokens(asked))
        for tier, size in enumerate(sizes(layout)):
            times = [
                drawn[corpus, document, position]
                for corpus, documents in enumerate(layout)
                for document, found in enumerate(documents)
                for position, each in enumerate(found)
                if each == tier
            ]
            assert not times or max(times) - min(times) <= 1
            assert source.epochs[tier] == pytest.approx(sum(times) / size if size else 0)


@given(layouts, st.integers(1, 4), st.integers(0, 3), st.data())
def test_a_document_comes_again_in_a_draw_only_when_all_others_are_used_up(layout, most, seed, data):
    available = [tier for tier, size in enumerate(sizes(layout)) if size]
    count = data.draw(st.integers(1, min(sizes(layout)[tier] for tier in available)))  # within one epoch
    probabilities = [float(tier in available) / len(available) for tier in range(3)]
    seen, used = set(), set()
    for entry in sampler(layout, seed, most).draw(probabilities, count):
        if (entry.corpus, entry.document) in seen:
            left = [
                {
                    (corpus, document)
                    for corpus, documents in enumerate(layout)
                    for document, found in enumerate(documents)
                    for position, each in enumerate(found)
                    if each == tier and (corpus, document, position) not in used
                }
                for tier in set(entry.tiers)
            ]
            assert any(documents <= seen for documents in left)
        seen.add((entry.corpus, entry.document))
        used.update(tokens([entry]))


@given(layouts, st.integers(0, 3), st.data())
def test_the_seed_fixes_the_sequence_of_draws_so_that_repeating_some_and_going_on_is_the_same(layout, seed, data):
    schedule = data.draw(schedules(layout))
    first, again = sampler(layout, seed), sampler(layout, seed)
    assert [first.draw(*each) for each in schedule] == [again.draw(*each) for each in schedule]


MIXED = [[[-1, *([0, 0, 0, 1, 1, 2] * 3)]] * 60, [[-1, 0, 1, 2, 2]] * 90]


def test_another_seed_gives_other_draws():
    asked = {seed: sampler(MIXED, seed).draw((0.5, 0.3, 0.2), 16) for seed in range(3)}
    assert asked[0] != asked[1] != asked[2]


@pytest.mark.parametrize("probabilities", [(0.6, 0.3, 0.1), (0.1, 0.3, 0.6), (0.0, 1.0, 0.0)])
def test_shares_of_the_tiers_follow_the_probabilities_each_position_by_itself(probabilities):
    source, draws, count = sampler(MIXED), 2000, 8
    found = numpy.array([
        numpy.bincount(sum((entry.tiers for entry in source.draw(probabilities, count)), []), minlength=3)
        for _ in range(draws)
    ])  # fmt: skip
    chances = numpy.array(probabilities)
    variance = count * chances * (1 - chances)
    assert (abs(found.mean(0) - count * chances) <= 5 * numpy.sqrt(variance / draws)).all()
    assert found.var(0) == pytest.approx(variance, rel=0.15)


def chi_square_is_plausible(counts: list[int]) -> bool:
    """Whether the categories may be equally likely, beyond 6 standard deviations."""
    mean, freedom = sum(counts) / len(counts), len(counts) - 1
    return abs(sum((count - mean) ** 2 for count in counts) / mean - freedom) < 6 * (2 * freedom) ** 0.5


def first_drawn(layout: Layout, tier: int, count: int, most: int, seeds: int = 3000) -> list[int]:
    """How often each token of a tier is in the first draw, over many seeds."""
    probabilities = [float(each == tier) for each in range(3)]
    drawn = Counter()
    for seed in range(seeds):
        drawn.update(tokens(sampler(layout, seed, most).draw(probabilities, count)))
    return [
        drawn[corpus, document, position]
        for corpus, documents in enumerate(layout)
        for document, found in enumerate(documents)
        for position, each in enumerate(found)
        if each == tier
    ]


@pytest.mark.parametrize("tier", [0, 2])
def test_a_single_position_is_uniform_over_its_tier_whatever_document_and_corpus_it_is_in(tier):
    layout = [[[-1, 0, 0, 0, 2], [2, 2, 0]], [], [[0], [1, 2], [2, 0, 2, 0, 0, 0, 0, 2]]]
    assert chi_square_is_plausible(first_drawn(layout, tier, count=1, most=4))


def test_several_positions_are_uniform_over_documents_alike():
    assert chi_square_is_plausible(first_drawn([[[1, 0, 1, 1, 0]] * 4, [[1, 0, 1, 1, 0]] * 2], 1, count=4, most=2))


def test_positions_share_documents_and_documents_are_spread():
    asked = sampler(MIXED).draw((0.4, 0.3, 0.3), 32)
    assert len(asked) <= 12 and max(len(entry.positions) for entry in asked) == 4
    alone = sampler(MIXED, most=1)
    for _ in range(10):
        assert len({(entry.corpus, entry.document) for entry in alone.draw((0.4, 0.3, 0.3), 32)}) == 32


def test_no_tier_comes_first():
    layout = [[[0, 0]] * 20, [[2, 2]] * 20]
    first = [sampler(layout, seed).draw((0.5, 0, 0.5), 8)[0].tiers[0] for seed in range(400)]
    assert first.count(0) == pytest.approx(200, abs=50)


def test_a_document_without_fellows_is_asked_again_by_itself():
    source = sampler([[[-1, 2, 2]]])
    assert [entry.positions for entry in source.draw((0, 0, 1), 3)][0] == [1, 2]
    assert [len(entry.positions) for entry in sampler([[[2] * 9]]).draw((0, 0, 1), 9)] == [4, 4, 1]


def test_a_token_that_an_ended_epoch_frees_joins_its_document_where_there_is_room():
    joined = 0
    for seed in range(20):
        source = sampler([[[0, 2]]], seed)
        source.draw((1, 0, 0), 1)  # the easy token's next epoch begins in the draw that follows
        asked = source.draw((0.5, 0, 0.5), 2)
        if sorted(tier for entry in asked for tier in entry.tiers) == [0, 2]:
            joined += 1
            assert asked == [Asked(0, 0, [0, 1], [0, 2])]
    assert joined


def test_wrong_probabilities_are_refused():
    source = sampler([[[0, 0, 1]]])
    with pytest.raises(ValueError, match="hard tokens are drawn with probability 0.1, but there are none"):
        source.draw((0.6, 0.3, 0.1), 4)
    for wrong in ((0.5, 0.5), (1.5, -0.5, 0), (0, 0, 0)):
        with pytest.raises(ValueError, match="probabilities must be one per tier"):
            source.draw(wrong, 4)
