"""Which tokens to ask for: tiers by a curriculum's probabilities, tokens without replacement, several in a document."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy

from nemo_rmt.config import TIERS


@dataclass(frozen=True)
class Asked:
    """The positions to ask for in one document."""

    corpus: int
    """Index of the corpus."""
    document: int
    """Index of the document, or piece of one, within the corpus."""
    positions: list[int]
    """Indices of the tokens to predict within the document, ascending."""
    tiers: list[int]
    """The tier of each."""


@dataclass
class _Deck:
    """The tokens of one tier in the order of this epoch."""

    tokens: numpy.ndarray
    """int64, indices of tokens; a permutation."""
    next: int = 0
    """All before it are used."""
    left: int = 0
    """How many are not used yet in this epoch."""
    drawn: int = 0
    """How many were, in all epochs."""


class PositionSampler:
    """Draws of positions, in a sequence fixed by the seed: a resumed stage repeats those of its finished steps.

    A tier's tokens come without replacement, all corpora together: none a second time before every one has come once.
    Each document's prefix is computed once for all positions asked for in it, so that a draw takes several where it
    can; where a document has less to ask for than that, its tokens tend to come later in an epoch.

    Args:
        tiers: int8 ``[total]`` for each corpus, the tier of each token, -1 for those never asked for.
        starts: int64 ``[documents + 1]`` for each corpus: where each document begins in ``tiers``, and the end.
        seed: of every draw.
        positions_per_document: most positions in one ``Asked``.
    """

    def __init__(
        self,
        tiers: Sequence[numpy.ndarray],
        starts: Sequence[numpy.ndarray],
        *,
        seed: int,
        positions_per_document: int,
    ):
        self._most = positions_per_document
        self._rng = numpy.random.default_rng(seed)
        # Tokens and documents are counted through all corpora.
        self._tiers = numpy.concatenate(tiers)
        ends = numpy.cumsum([len(each) for each in tiers])
        offsets = ends - [len(each) for each in tiers]
        self._starts = numpy.concatenate([*(each[:-1] + offset for each, offset in zip(starts, offsets)), ends[-1:]])
        self._first_documents = numpy.cumsum([0, *(len(each) - 1 for each in starts[:-1])])
        self._used = numpy.zeros(len(self._tiers), dtype=bool)
        self._in_draw = numpy.zeros(len(self._starts) - 1, dtype=bool)
        self._decks = [_Deck(numpy.flatnonzero(self._tiers == tier)) for tier in range(len(TIERS))]
        for deck in self._decks:
            self._begin_epoch(deck)

    @property
    def epochs(self) -> tuple[float, ...]:
        """For each tier, how often its tokens have been drawn on average; 0 for a tier without tokens."""
        return tuple(deck.drawn / max(len(deck.tokens), 1) for deck in self._decks)

    def draw(self, probabilities: Sequence[float], count: int) -> list[Asked]:
        """``count`` positions; the tier of each is a draw of its own by ``probabilities``.

        A document comes once, unless a tier's unused tokens all lie in documents that are already in the draw; then it
        is asked again, in an ``Asked`` of its own where the first has no room.
        Raises ValueError for other than three probabilities, or one above 0 for a tier without tokens.
        """
        quotas = self._quotas(probabilities, count)
        groups: list[tuple[int, list[int]]] = []
        latest: dict[int, list[int]] = {}
        while any(quotas):
            anchor = self._anchor(self._tier_of_next(quotas))
            document = self._document(anchor)
            group = latest.get(document)
            if group is None or len(group) == self._most or anchor in group:
                group = latest[document] = []
                groups.append((document, group))
                self._in_draw[document] = True
            self._take(anchor, group, quotas)
            self._take_companions(document, group, quotas)
        self._in_draw[list(latest)] = False
        return [self._asked(document, sorted(group)) for document, group in groups]

    def _begin_epoch(self, deck: _Deck) -> None:
        self._rng.shuffle(deck.tokens)
        self._used[deck.tokens] = False
        deck.next, deck.left = 0, len(deck.tokens)

    def _quotas(self, probabilities: Sequence[float], count: int) -> list[int]:
        """How many positions of each tier."""
        chances = numpy.asarray(probabilities, dtype=numpy.float64)
        if len(chances) != len(self._decks) or (chances < 0).any() or not chances.sum() > 0:
            raise ValueError(f"probabilities must be one per tier ({', '.join(TIERS)}), got {tuple(probabilities)}")
        for name, chance, deck in zip(TIERS, chances, self._decks, strict=True):
            if chance and not len(deck.tokens):
                raise ValueError(f"{name} tokens are drawn with probability {chance:g}, but there are none")
        return self._rng.multinomial(count, chances / chances.sum()).tolist()

    def _tier_of_next(self, quotas: list[int]) -> int:
        """The tier of one of the positions still to be drawn, each as likely: their order favours no tier."""
        place = self._rng.integers(sum(quotas))
        return next(tier for tier in range(len(quotas)) if place < sum(quotas[: tier + 1]))

    def _anchor(self, tier: int) -> int:
        """The tier's next unused token in a document that is not in the draw; if there is none, its next unused one."""
        deck = self._decks[tier]
        if not deck.left:
            self._begin_epoch(deck)
        next_unused = None
        place, size = deck.next, 16
        while place < len(deck.tokens):
            window = deck.tokens[place : place + size]
            unused = window[~self._used[window]]
            if len(unused) and next_unused is None:
                next_unused = int(unused[0])
                deck.next = place + window.tolist().index(next_unused)
            documents = self._starts.searchsorted(unused, side="right") - 1
            elsewhere = unused[~self._in_draw[documents]]
            if len(elsewhere):
                return int(elsewhere[0])
            place, size = place + size, 2 * size
        return next_unused

    def _take_companions(self, document: int, group: list[int], quotas: list[int]) -> None:
        """Fill a document's group with other unused tokens of it, at random, as far as their tiers' quotas go."""
        begin, end = self._starts[document : document + 2]
        wanted = numpy.array([*map(bool, quotas), False])  # the last one answers for tier -1
        eligible = (wanted[self._tiers[begin:end]] & ~self._used[begin:end]).nonzero()[0] + begin
        while len(group) < self._most and len(eligible):
            place = self._rng.integers(len(eligible))
            token = int(eligible[place])
            eligible[place] = eligible[-1]
            eligible = eligible[:-1]
            if token not in group:  # as it can be where an epoch ended within the draw
                self._take(token, group, quotas)
                if not quotas[self._tiers[token]]:
                    eligible = eligible[self._tiers[eligible] != self._tiers[token]]

    def _take(self, token: int, group: list[int], quotas: list[int]) -> None:
        tier = self._tiers[token]
        group.append(token)
        quotas[tier] -= 1
        self._used[token] = True
        self._decks[tier].left -= 1
        self._decks[tier].drawn += 1

    def _document(self, token: int) -> int:
        return int(self._starts.searchsorted(token, side="right")) - 1

    def _asked(self, document: int, tokens: list[int]) -> Asked:
        corpus = int(self._first_documents.searchsorted(document, side="right")) - 1
        positions = [token - int(self._starts[document]) for token in tokens]
        return Asked(corpus, document - int(self._first_documents[corpus]), positions, self._tiers[tokens].tolist())
