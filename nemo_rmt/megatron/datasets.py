"""Token datasets in Megatron's indexed format: written once, blended, read at any position.

A training row is fixed by (dataset, seed, sequence length, index) alone; a resumed stage reads on at the index where it
stopped.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import numpy
import torch
import torch.distributed as dist
from megatron.core.datasets.blended_dataset import BlendedDataset
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
from megatron.core.datasets.indexed_dataset import DType, IndexedDataset, IndexedDatasetBuilder
from torch import Tensor

from nemo_rmt import pulse
from nemo_rmt.data.logprob_cache import Stretches
from nemo_rmt.data.tokenizer import Tokenizer
from nemo_rmt.errors import UserError


def write_dataset(prefix: Path, documents: Iterable[list[int]], vocab_size: int) -> tuple[int, int]:
    """Write tokenized documents (each ending in the end-of-document token) to ``prefix``.bin and ``prefix``.idx.

    Returns the numbers of documents and tokens.
    """
    prefix.parent.mkdir(parents=True, exist_ok=True)
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=DType.optimal_dtype(vocab_size))
    count = tokens = 0
    for document in documents:
        builder.add_document(torch.tensor(document), [len(document)])
        pulse.tick()
        count, tokens = count + 1, tokens + len(document)
    builder.finalize(f"{prefix}.idx")
    return count, tokens


@dataclass
class _TokenizerView:
    """What GPTDataset asks of a tokenizer. Padding is an impossible id: rows are never padded."""

    vocab_size: int
    eod: int
    pad: int = -1
    unique_identifiers: dict = field(default_factory=dict)


class TrainingRows:
    """Rows of a blend of indexed datasets, by index.

    Args:
        prefixes: dataset prefixes with their weights.
        tokenizer: for the end-of-document id.
        sequence_length: tokens per row; rows have one more, to shift by.
        num_rows: rows needed in all (the blend repeats documents in new orders once exhausted).
        seed: of document and row order.
        cache: folder for Megatron's index files; rebuilt when it is incomplete.
    """

    def __init__(
        self,
        prefixes: dict[Path, float],
        tokenizer: Tokenizer,
        *,
        sequence_length: int,
        num_rows: int,
        seed: int,
        cache: Path,
    ):
        if dist.get_rank() == 0 and not (cache / "complete").exists():
            # A kill while the index files are written leaves torn ones, which Megatron would load.
            shutil.rmtree(cache, ignore_errors=True)
        dist.barrier()
        config = GPTDatasetConfig(
            random_seed=seed,
            sequence_length=sequence_length,
            blend_per_split=[([str(prefix) for prefix in prefixes], list(prefixes.values())), None, None],
            tokenizer=_TokenizerView(tokenizer.vocab_size, tokenizer.eod),
            path_to_cache=str(cache),
            reset_position_ids=False,
            reset_attention_mask=False,
            eod_mask_loss=False,
            create_attention_mask=False,
        )
        builder = BlendedMegatronDatasetBuilder(GPTDataset, [num_rows, 0, 0], lambda: True, config)
        pulse.tick("building the index of the training rows")
        self.dataset = builder.build()[0]
        pulse.tick("the index of the training rows is there")
        if dist.get_rank() == 0:
            (cache / "complete").touch()

    def rows(self, indices: Iterable[int]) -> Tensor:
        """``[rows, sequence_length + 1]`` int64 tokens."""
        items = [self.dataset[index] for index in indices]
        return torch.stack([torch.cat([item["tokens"], item["labels"][-1:]]) for item in items])

    def documents(self, index: int) -> list[tuple[Path, int]]:
        """The documents that a row has tokens of, in its order: the dataset's prefix and the document's index there."""
        row = self.stretches(index)
        return [(row.prefix, document) for document in row.documents.tolist()]

    def stretches(self, index: int) -> Stretches:
        """Where the ``sequence_length + 1`` tokens of a row stand in its dataset."""
        part, row = self.dataset, index
        if isinstance(part, BlendedDataset):  # which a single prefix is not
            part, row = part.datasets[part.dataset_index[index]], part.dataset_sample_index[index]
        # The arrays that the dataset itself reads rows with: where each begins, as a place in the order of documents
        # and a token of that document.
        row = part.shuffle_index[row]
        (begin, skipped), (end, last) = part.sample_index[row].tolist(), part.sample_index[row + 1].tolist()
        documents = part.document_index[begin : end + 1].astype(numpy.int64)
        sizes = part.dataset.sequence_lengths[documents].astype(numpy.int64)
        sizes[-1] = last + 1  # with the token to shift by
        first = part.dataset.index.sequence_pointers[documents] // part.dataset.index.dtype_size
        first[0] += skipped
        sizes[0] -= skipped
        return Stretches(Path(part.dataset_path), documents, first, sizes)


class Documents:
    """The documents of a dataset, in its order. ``lengths``: int64 ``[documents]``, tokens of each."""

    def __init__(self, prefix: Path):
        self._dataset = IndexedDataset(str(prefix))  # what it returns points into its memory map: copied
        self.lengths = self._dataset.sequence_lengths.astype(numpy.int64)

    def tokens(self, first: int, end: int) -> numpy.ndarray:
        """The tokens of the documents from ``first`` to before ``end``, end to end."""
        index = self._dataset.index
        count = int(index.sequence_lengths[first:end].sum(dtype=numpy.int64))
        return self._dataset.bin_reader.read(index.dtype, count, int(index.sequence_pointers[first])).copy()


def held_out_rows(prefix: Path, sequence_length: int, max_tokens: int) -> Tensor:
    """The first held-out documents end to end, ``[rows, sequence_length + 1]`` int64; rows overlap by one token.

    What does not fill a row is left out. Raises UserError when there is not even one.
    """
    dataset = IndexedDataset(str(prefix))
    parts, size = [], 0
    for index in range(len(dataset)):
        parts.append(numpy.asarray(dataset[index]))
        size += len(parts[-1])
        if size > max_tokens:
            break
    stream = torch.from_numpy(numpy.concatenate(parts).astype(numpy.int64))[: max_tokens + 1]
    if len(stream) <= sequence_length:
        raise UserError(
            f"held-out dataset {prefix} has {len(stream)} tokens, too few for one row of evaluate.sequence_length="
            f"{sequence_length}: lower it, raise evaluate.max_tokens, or give the corpus a larger held_out"
        )
    return stream.unfold(0, sequence_length + 1, sequence_length).contiguous()


def token_counts(prefix: Path, vocab_size: int) -> numpy.ndarray:
    """How often each token occurs in a dataset, ``[vocab_size]`` int64."""
    dataset = IndexedDataset(str(prefix))
    counts = numpy.zeros(vocab_size, dtype=numpy.int64)
    for index in range(len(dataset)):
        pulse.tick()
        counts += numpy.bincount(numpy.asarray(dataset[index]), minlength=vocab_size)
    return counts


def pieces_of(
    prefix: Path, *, max_tokens: int | None, longest: int, split: bool, seed: int, name: str
) -> tuple[numpy.ndarray, numpy.ndarray]:
    """Documents of a dataset in an order set by ``seed``, so that a part of them is a fair sample.

    max_tokens: stop with the document that reaches as many, None for all. longest: most tokens of a piece, at least 2;
    longer documents are cut into pieces of as many, the last shorter, when ``split``. name: the corpus, for messages.

    Returns int64 ``[pieces, 3]`` (the document's index, the piece's first token in it, its length) and the pieces'
    tokens end to end, int32. A piece of 1 token, which has nothing to predict, is left out.
    Raises UserError for a longer document without ``split``, and when nothing is left.
    """
    if longest < 2:
        raise ValueError(f"longest must be at least 2, got {longest}")
    dataset = IndexedDataset(str(prefix))  # kept: what it returns points into its memory map
    lengths = dataset.sequence_lengths.astype(numpy.int64)
    kept = lengths - (lengths % longest == 1)
    order = numpy.random.default_rng(seed).permutation(len(lengths))
    if max_tokens is not None:
        order = order[: numpy.searchsorted(numpy.cumsum(kept[order]), max_tokens) + 1]
    order = order[kept[order] > 0]
    if not len(order):
        raise UserError(f"data.corpora[{name}] has no document of 2 tokens or more: take it out of rmt.corpora")
    if not split and lengths[order].max() > longest:
        raise UserError(
            f"data.corpora[{name}] has a document of {lengths[order].max()} tokens, more than rmt.document_length="
            f"{longest}: set rmt.long_documents=split, or raise rmt.document_length"
        )
    pieces, parts = [], []
    for document in order.tolist():
        pulse.tick()
        size = int(kept[document])
        pieces += [(document, first, min(longest, size - first)) for first in range(0, size, longest)]
        parts.append(dataset[document][:size])
    return numpy.array(pieces, dtype=numpy.int64), numpy.concatenate(parts, dtype=numpy.int32)
