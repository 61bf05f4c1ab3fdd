"""Which documents a training row was cut from, by the tokens that only they have."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy
import pytest
from megatron.core.datasets.indexed_dataset import IndexedDataset
from tiny_model import world

from nemo_rmt.data.logprob_cache import Stretches
from nemo_rmt.megatron.datasets import Documents, TrainingRows, write_dataset

SIZES = {"web": [5, 1, 40, 9, 2, 7, 30, 8], "code": [3, 17, 26, 4, 1, 12]}
EOD, VOCAB = 0, 20_000
ROW = 16


@pytest.fixture(scope="module", autouse=True)
def alone():
    with world():
        yield


@pytest.fixture(scope="module")
def prefixes(tmp_path_factory) -> list[Path]:
    """Datasets in which no two documents share a token but the end-of-document one."""
    folder, token, found = tmp_path_factory.mktemp("data"), 0, []
    for name, sizes in SIZES.items():
        documents = []
        for size in sizes:
            documents.append([*range(token + 1, token + size), EOD])
            token += size
        found.append(folder / name / "train")
        write_dataset(found[-1], documents, VOCAB)
    return found


def tokens_at(row: Stretches) -> list[int]:
    """What stands in the dataset where a row says that its tokens do."""
    everything = Documents(row.prefix)
    tokens = everything.tokens(0, len(everything.lengths)).tolist()
    starts = numpy.cumsum(everything.lengths) - everything.lengths
    assert (row.first >= starts[row.documents]).all()
    assert (row.first + row.sizes <= (starts + everything.lengths)[row.documents]).all()
    return [token for first, size in zip(row.first, row.sizes, strict=True) for token in tokens[first : first + size]]


@pytest.mark.parametrize("names", [("web",), ("web", "code")], ids=["one_corpus", "blend"])
def test_a_rows_tokens_are_those_of_its_documents_end_to_end(prefixes, tmp_path, names):
    chosen = {
        prefix: weight for prefix, weight in zip(prefixes, (0.7, 0.3), strict=True) if prefix.parent.name in names
    }
    tokenizer = SimpleNamespace(vocab_size=VOCAB, eod=EOD)
    rows = TrainingRows(chosen, tokenizer, sequence_length=ROW, num_rows=40, seed=3, cache=tmp_path / "index")
    datasets = {prefix: IndexedDataset(str(prefix)) for prefix in chosen}
    seen = set()
    for index in range(40):  # several epochs of each
        documents = rows.documents(index)
        row = rows.rows([index])[0].tolist()
        assert tokens_at(rows.stretches(index)) == row
        seen |= set(documents)
        text = [token for prefix, document in documents for token in datasets[prefix][document].tolist()]
        first_size = len(datasets[documents[0][0]][documents[0][1]])
        starts = [start for start in range(first_size) if text[start : start + ROW + 1] == row]
        assert starts, (index, documents)
        last_size = len(datasets[documents[-1][0]][documents[-1][1]])
        assert min(starts) + ROW + 1 > len(text) - last_size  # it reaches into the last one
    assert {prefix.parent.name for prefix, _ in seen} == set(names)
    assert len(seen) == sum(len(SIZES[name]) for name in names)
