"""Token datasets in Megatron's indexed format: written once, blended, read at any position.

A training row is fixed by (dataset, seed, sequence length, index) alone; a resumed stage reads on at the index where it
stopped.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import numpy
import torch
import torch.distributed as dist
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
from megatron.core.datasets.indexed_dataset import DType, IndexedDataset, IndexedDatasetBuilder
from torch import Tensor

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
        self.dataset = builder.build()[0]
        if dist.get_rank() == 0:
            (cache / "complete").touch()

    def rows(self, indices: Iterable[int]) -> Tensor:
        """``[rows, sequence_length + 1]`` int64 tokens."""
        items = [self.dataset[index] for index in indices]
        return torch.stack([torch.cat([item["tokens"], item["labels"][-1:]]) for item in items])


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
            f"{sequence_length}: lower it, raise evaluate.max_tokens, or give the corpus a larger held_out fraction"
        )
    return stream.unfold(0, sequence_length + 1, sequence_length).contiguous()


def token_counts(prefix: Path, vocab_size: int) -> numpy.ndarray:
    """How often each token occurs in a dataset, ``[vocab_size]`` int64."""
    dataset = IndexedDataset(str(prefix))
    counts = numpy.zeros(vocab_size, dtype=numpy.int64)
    for index in range(len(dataset)):
        counts += numpy.bincount(numpy.asarray(dataset[index]), minlength=vocab_size)
    return counts


def dataset_exists(prefix: Path) -> bool:
    """Whether both files of an indexed dataset are there and not empty."""
    paths = [f"{prefix}{suffix}" for suffix in (".bin", ".idx")]
    return all(os.path.isfile(path) and os.path.getsize(path) for path in paths)
