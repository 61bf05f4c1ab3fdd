"""Scoring: a checkpoint's log-probability of every training token, for anneals to read instead of running the model;
with ``top_k``, for distillation, also of the likeliest tokens in the place of each.

Each document is scored from its own start. Training sees the same where a document is whole in its row; where a row
begins in the middle of one, the model sees only what follows the cut, while here the document's tokens before it are in
view too, up to ``sequence_length`` in all.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy
import torch
import torch.distributed as dist

from nemo_rmt import pulse
from nemo_rmt.data import logprob_cache
from nemo_rmt.data.batch import TokenBatch
from nemo_rmt.data.cache_blocks import LOGPROBS, Kind, block_bounds, kinds_of, windows
from nemo_rmt.data.logprob_cache import block_path, encode
from nemo_rmt.data.packing import first_fit_decreasing
from nemo_rmt.megatron.datasets import Documents
from nemo_rmt.megatron.head import TokenScores
from nemo_rmt.megatron.hugging_face import load_published, published_files
from nemo_rmt.megatron.model import build_model
from nemo_rmt.megatron.train_step import FrozenModel, ScoredModel
from nemo_rmt.profiling import part
from nemo_rmt.stages.session import Session

ROWS_PACKED = 64
"""Rows that are filled from one lot of windows: enough to leave little room, few enough to be quick about."""
PROGRESS_S = 10.0
"""Seconds between lines that say how far a block is."""
ROWS_PER_STAGE = 4
"""Micro-batches that are sent through a pipeline at once, for each of its stages."""


@dataclass(frozen=True)
class Block:
    """Documents of one corpus whose numbers are one file."""

    corpus: str
    number: int
    first: int
    """Its first document in the dataset."""
    end: int
    """The document after its last."""
    tokens: int


def run(session: Session) -> None:
    """Write the blocks that are missing from the cache in the stage's folder, then its manifest."""
    began, folder, layout = time.perf_counter(), session.folder, session.layout
    plan = logprob_cache.read_plan(folder)
    kinds = kinds_of(plan)
    corpora = {name: Documents(session.data_folder / name / "train") for name in plan["corpora"]}
    blocks = [block for name, documents in corpora.items() for block in blocks_of(name, documents)]
    missing = missing_blocks(folder, blocks, kinds)
    progress = Progress(folder, blocks, missing, kinds, layout.data_size)
    if missing:
        model = scoring_model(session)
    for block in missing[layout.data_rank :: layout.data_size]:
        documents, scored = corpora[block.corpus], functools.partial(progress.show, block)
        tokens, lengths = documents.tokens(block.first, block.end), documents.lengths[block.first : block.end]
        found = score_documents(session, model, tokens, lengths, plan["sequence_length"], scored, kinds)
        if found is not None:
            with part("checkpoint"):
                for kind, numbers in zip(kinds, found, strict=True):
                    path = block_path(folder, block.corpus, block.number, kind)
                    logprob_cache.write_block(path, numbers, kind)
        progress.show(block, 1.0)
    pulse.tick("waiting for the other ranks")
    dist.barrier()
    if missing and progress.pending:  # written by the others meanwhile
        progress.show(missing[-1], 1.0)
    if layout.rank == 0:
        sizes = {name: [block.tokens for block in blocks if block.corpus == name] for name in corpora}
        logprob_cache.complete(folder, sizes)
    seconds, done = time.perf_counter() - began, sum(block.tokens for block in missing)
    metrics = {
        "score/tokens": sum(block.tokens for block in blocks),
        "score/blocks": len(blocks),
        "score/tokens_per_s": done / seconds,
    }
    session.finish(metrics, checkpoint=None, wall_s=seconds, tokens=done)


def blocks_of(corpus: str, documents: Documents) -> list[Block]:
    """A corpus's blocks, in order."""
    lengths = documents.lengths
    bounds = block_bounds(lengths).tolist()
    return [
        Block(corpus, number, first, end, int(lengths[first:end].sum()))
        for number, (first, end) in enumerate(zip(bounds[:-1], bounds[1:], strict=True))
    ]


def missing_blocks(folder: Path, blocks: list[Block], kinds: list[Kind]) -> list[Block]:
    """Those that are not written yet, as rank 0 finds them: another node may see files late."""
    found = [[block for block in blocks if not is_there(folder, block, kinds)]]
    dist.broadcast_object_list(found, src=0)
    return found[0]


def is_there(folder: Path, block: Block, kinds: list[Kind]) -> bool:
    """Whether all files of a block are written."""
    paths = [block_path(folder, block.corpus, block.number, kind) for kind in kinds]
    return all(logprob_cache.is_written(path, block.tokens, kind) for path, kind in zip(paths, kinds, strict=True))


def scoring_model(session: Session) -> FrozenModel:
    """The checkpoint, or the published model, that the job names. The recipe's model section describes it."""
    if session.job.input_folder(session.folder, "published") is None:
        return session.frozen_model(session.require_input("checkpoint"))
    folder, recipe = session.require_input("published"), session.recipe
    chunks = build_model(recipe.model, recipe.parallel, session.vocab_size, initialize=False)
    load_published(published_files(folder, recipe.model), recipe.model, chunks)
    return FrozenModel(chunks, recipe.parallel)


def score_documents(
    session: Session,
    model: ScoredModel,
    tokens: numpy.ndarray,
    lengths: numpy.ndarray,
    longest: int,
    scored: Callable[[float], None],
    kinds: Sequence[Kind] = (LOGPROBS,),
) -> list[numpy.ndarray] | None:
    """The numbers of documents, ``[tokens, width]`` of each kind, on the one rank of each model that is to write them;
    None on the others.

    tokens: the documents', end to end. lengths: of each. longest: most tokens of a document that are seen at once.
    scored: called with the share of the work that is done, less than 1, after each part of it.
    """
    size, layout = session.recipe.anneal.micro_batch_size, session.layout
    width = -(-longest // session.width_multiple) * session.width_multiple
    with part("data"):
        rows = list(filled_rows(windows(lengths, longest), longest))
    writes = layout.is_last_stage and layout.tensor_rank == 0
    found = [kind.empty(len(tokens)) for kind in kinds] if writes else None
    top_k = kinds[1].width if len(kinds) > 1 else 0
    at_once = size * (1 if layout.pipeline_size == 1 else ROWS_PER_STAGE * layout.pipeline_size)
    for begin in range(0, len(rows), at_once):
        with part("data"):
            chosen = rows[begin : begin + at_once]
            count = session.whole_rows(len(chosen), size)
            batch, places = packed(tokens, chosen, count, width, session.tokenizer.pad)
        scores = model.score(batch.to(layout.device), size, top_k=top_k)
        if found is not None:
            taken = places >= 0
            for numbers, values in zip(found, stored(scores), strict=True):
                numbers[places[taken]] = values[taken]
        scored(begin / len(rows))
    return found


def stored(scores: TokenScores) -> list[numpy.ndarray]:
    """``[rows, sequence, width]`` of each kind, as files have them."""
    numbers = [encode(scores.logprobs[..., None].cpu().numpy())]
    if scores.top_tokens is not None:
        numbers += [scores.top_tokens.cpu().numpy(), encode(scores.top_logprobs.cpu().numpy())]
    return numbers


def filled_rows(found: numpy.ndarray, longest: int) -> Iterator[numpy.ndarray]:
    """Windows (see ``cache_blocks.windows``) that share a row of ``longest`` tokens, row after row."""
    lots = numpy.cumsum(found[:, 1]) // (ROWS_PACKED * longest)
    for lot in numpy.split(found, numpy.flatnonzero(numpy.diff(lots)) + 1):
        for row in first_fit_decreasing(lot[:, 1].tolist(), longest):
            yield lot[row]


def packed(
    tokens: numpy.ndarray, rows: list[numpy.ndarray], count: int, width: int, pad: int
) -> tuple[TokenBatch, numpy.ndarray]:
    """Rows of windows as a batch, and which of the block's tokens each of its labels is.

    count: rows of the batch, the last ones padding only. The places are int64 ``[count, width]``, -1 where a label's
    score is not taken.
    """
    inputs, labels = (numpy.full((count, width), pad, dtype=numpy.int64) for _ in range(2))
    segments, places = (numpy.full((count, width), -1, dtype=numpy.int64) for _ in range(2))
    positions = numpy.zeros((count, width), dtype=numpy.int64)
    for row, members in enumerate(rows):
        column = 0
        for segment, (first, size, taken) in enumerate(members.tolist()):
            end = column + size
            inputs[row, column:end] = tokens[first : first + size]
            labels[row, column : end - 1] = inputs[row, column + 1 : end]
            segments[row, column:end] = segment
            positions[row, column:end] = numpy.arange(size)
            places[row, column + taken - 1 : end - 1] = numpy.arange(first + taken, first + size)
            column = end
    mask = (places >= 0).astype(numpy.float32)
    return TokenBatch(*map(torch.from_numpy, (inputs, labels, mask, segments, positions))), places


class Progress:
    """Lines that say how far the cache is; on rank 0, which sees the files of all.

    folder: the cache. blocks: all of its. missing: those that are to be written now, by ``ranks`` at a time. kinds: of
    each block's files.
    """

    def __init__(self, folder: Path, blocks: list[Block], missing: list[Block], kinds: list[Kind], ranks: int):
        self.folder, self.blocks, self.pending, self.kinds, self.ranks = folder, blocks, missing, kinds, ranks
        self.tokens = sum(block.tokens for block in missing)
        self.began = self.said = time.monotonic()

    def show(self, block: Block, share: float) -> None:
        """``share`` of a block is scored. A line every PROGRESS_S seconds, and when the block is written."""
        now = time.monotonic()
        if dist.get_rank() or (share < 1 and now - self.said < PROGRESS_S):
            return
        self.said = now
        self.pending = [each for each in self.pending if not is_there(self.folder, each, self.kinds)]
        # The other ranks are as far with theirs.
        scored = share * sum(each.tokens for each in self.pending[: self.ranks]) if share < 1 else 0
        left = sum(each.tokens for each in self.pending) - scored
        own = [each for each in self.blocks if each.corpus == block.corpus]
        done = len(own) - sum(each.corpus == block.corpus for each in self.pending)
        tokens, speed = self.tokens - left, (self.tokens - left) / (now - self.began)
        seconds = round(left / max(speed, 1e-9))
        print(
            f"[score] {block.corpus}: {done} of {len(own)} blocks, {tokens:,.0f} tokens, {speed:,.0f} tokens/s, "
            f"{seconds // 60}:{seconds % 60:02} left",
            flush=True,
        )
