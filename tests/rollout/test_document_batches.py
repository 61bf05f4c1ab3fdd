"""Which branch prompts are sampled together."""

from __future__ import annotations

from nemo_rmt.rollout.engine import BranchPrompt
from nemo_rmt.rollout.in_process import _document_batches

FORKS = [(0, 90), (1, 10), (0, 80), (2, 100), (3, 12), (1, 11), (0, 5), (2, 100), (2, 7), (2, 8), (2, 9)]
"""Document and position of each prompt."""


def batches(size: int) -> list[list[tuple[int, int]]]:
    found = _document_batches([BranchPrompt(document, position, [1]) for document, position in FORKS], size)
    assert sorted(index for batch in found for index in batch) == list(range(len(FORKS)))
    return [[FORKS[index] for index in batch] for batch in found]


def test_whole_documents_of_similar_length_share_a_batch():
    assert [{document for document, _ in batch} for batch in batches(5)] == [{1, 3}, {0}, {2}]
    assert [{document for document, _ in batch} for batch in batches(8)] == [{1, 3, 0}, {2}]


def test_a_document_with_more_branches_than_a_batch_is_split_by_position():
    found = batches(3)
    assert max(map(len, found)) == 3
    assert [(2, 7), (2, 8), (2, 9)] in found and [(2, 100), (2, 100)] in found
