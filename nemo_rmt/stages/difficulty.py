"""How hard every token is for a model: its entropies over the corpora, computed once and kept beside the dataset."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy
import torch.distributed as dist

from nemo_rmt import profiling
from nemo_rmt.compatibility import checkpoint_fingerprint
from nemo_rmt.config import RMT, Corpus
from nemo_rmt.data.batch import TokenBatch
from nemo_rmt.data.difficulty import (
    ScoredCorpus,
    Tiers,
    askable,
    cut_tiers,
    load_scores,
    require_scores_of,
    save_scores,
)
from nemo_rmt.data.fingerprint import dataset_fingerprint
from nemo_rmt.errors import UserError
from nemo_rmt.megatron.datasets import pieces_of
from nemo_rmt.megatron.runtime import broadcast_from_last_stage, gather_over_data_parallel, max_over_ranks
from nemo_rmt.megatron.train_step import ScoredModel
from nemo_rmt.stages.session import Session

ROWS_BETWEEN_LINES = 20_000
"""Documents between two lines of progress."""


def reasoned_corpora(session: Session) -> list[Corpus]:
    """The corpora RMT reads: those named, or every one in the mix."""
    names = session.recipe.rmt.corpora
    return [c for c in session.recipe.data.corpora if (c.name in names if names else c.weight)]


def scorer_checkpoint(settings: RMT, start: Path) -> Path:
    """The checkpoint whose entropies are the difficulty: the one RMT starts from, or the recipe's."""
    return start if settings.difficulty.scorer == "start" else Path(settings.difficulty.scorer)


def training_scores(session: Session, start: Path) -> list[ScoredCorpus]:
    """The corpora RMT trains on, with entropies: from ``rmt.difficulty.scores``, from an earlier start of this stage,
    or computed now and kept in ``difficulty/`` of the data stage's folder. The same on every rank."""
    settings = session.recipe.rmt
    corpora = reasoned_corpora(session)
    scorer = scorer_checkpoint(settings, start)
    identity = {
        "tokenizer": session.tokenizer.fingerprint,
        "corpora": {
            corpus.name: dataset_fingerprint(session.data_folder / corpus.name / "train") for corpus in corpora
        },
        "model": checkpoint_fingerprint(scorer),
        "documents": [settings.difficulty.max_tokens, settings.longest_document, settings.long_documents],
        "shares": [corpus.weight for corpus in corpora],
        "seed": session.recipe.seed,
    }
    if settings.difficulty.scores is not None:
        folder = Path(settings.difficulty.scores)
        scored, found = load_scores(folder)
        require_scores_of(found, identity, folder)
        _require_lengths(scored, settings)
        return scored
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]
    folder = session.data_folder / "difficulty" / digest
    if max_over_ranks([not folder.is_dir()])[0]:  # another process may just be writing the same
        with profiling.part("checkpoint"):
            model = session.frozen_model(scorer)
        scored = score_corpora(session, model, corpora)
        if session.layout.rank == 0:
            save_scores(folder, scored, identity)
        dist.barrier()
    return load_scores(folder)[0]


def _require_lengths(corpora: list[ScoredCorpus], settings: RMT) -> None:
    """Raise UserError when scores were made with longer documents than this recipe has room for."""
    longest = max(int(corpus.pieces[:, 2].max()) for corpus in corpora)
    if longest > settings.longest_document:
        raise UserError(
            f"rmt.difficulty.scores={settings.difficulty.scores} has a document of {longest} tokens, more than "
            f"rmt.document_length={settings.longest_document}: raise it, or score again with scores=null"
        )


def score_corpora(session: Session, model: ScoredModel, corpora: list[Corpus]) -> list[ScoredCorpus]:
    """The entropies of the training documents RMT may draw from."""
    settings = session.recipe.rmt
    total = sum(corpus.weight for corpus in corpora)
    scored = []
    for corpus in corpora:
        budget = settings.difficulty.max_tokens
        scored.append(
            score_corpus(
                session,
                model,
                corpus.name,
                "train",
                None if budget is None else round(budget * (corpus.weight / total if total else 1 / len(corpora))),
            )[0]
        )
    return scored


def score_corpus(
    session: Session, model: ScoredModel, name: str, split: str, max_tokens: int | None
) -> tuple[ScoredCorpus, numpy.ndarray]:
    """Documents of one corpus with their entropies, and whether the model's first choice is each token (float32)."""
    settings = session.recipe.rmt
    with profiling.part("data"):
        pieces, tokens = pieces_of(
            session.data_folder / name / split,
            max_tokens=max_tokens,
            longest=settings.longest_document,
            split=settings.long_documents == "split",
            seed=session.seed("difficulty", name, split),
            name=name,
        )
    entropy, hits = score_documents(session, model, pieces[:, 2], tokens, f"{name}/{split}")
    return ScoredCorpus(name=name, pieces=pieces, tokens=tokens, entropy=entropy), hits


def score_documents(
    session: Session, model: ScoredModel, lengths: numpy.ndarray, tokens: numpy.ndarray, title: str
) -> tuple[numpy.ndarray, numpy.ndarray]:
    """The entropy of the prediction of each token, and 1 where its first choice is right; NaN at first tokens.

    lengths: tokens of each document, ``[documents]``; tokens: all of them, end to end. The same on every rank.
    """
    settings, layout = session.recipe.rmt, session.layout
    starts = numpy.concatenate([[0], numpy.cumsum(lengths)])
    scores = numpy.full((2, len(tokens)), numpy.nan, dtype=numpy.float32)
    mine = []
    batches = list(_of_similar_length(lengths, settings.micro_batch_size * settings.sequence_length))
    for number, documents in enumerate(batches):
        if number % layout.data_size != layout.data_rank:
            continue
        rows = [tokens[starts[index] : starts[index + 1]] for index in documents]
        rows += rows[-1:] * (-len(rows) % layout.pipeline_size)  # a micro-batch for every stage of the pipeline
        examples = [(row, [1.0] * len(row)) for row in rows]
        batch = TokenBatch.from_examples(examples, session.tokenizer.pad, None, session.width_multiple)
        batch = batch.to(layout.device)
        found = model.score(batch, len(rows) // layout.pipeline_size, with_entropy=True)
        if found is not None:
            both = zip(documents, found.entropy.cpu().numpy(), found.hits.cpu().numpy())
            mine += [(i, entropy[: lengths[i] - 1].copy(), hits[: lengths[i] - 1].copy()) for i, entropy, hits in both]
        _show(session, title, number, batches)
    for index, entropy, hits in gather_over_data_parallel(broadcast_from_last_stage(mine)):
        scores[0, starts[index] + 1 : starts[index + 1]] = entropy
        scores[1, starts[index] + 1 : starts[index + 1]] = hits
    return scores[0], scores[1]


def _of_similar_length(lengths: Sequence[int], tokens_at_once: int) -> Iterator[list[int]]:
    """Documents whose padded rows together have at most ``tokens_at_once`` tokens, or one longer document."""
    batch: list[int] = []
    for index in numpy.argsort(lengths, kind="stable").tolist():
        if batch and (len(batch) + 1) * lengths[index] > tokens_at_once:
            yield batch
            batch = []
        batch.append(index)
    yield batch


def _show(session: Session, title: str, number: int, batches: list[list[int]]) -> None:
    """A line of progress when another share of the documents is done."""
    before, done = (sum(len(batch) for batch in batches[:end]) for end in (number, number + 1))
    if session.layout.rank == 0 and (done // ROWS_BETWEEN_LINES > before // ROWS_BETWEEN_LINES):
        total = sum(len(batch) for batch in batches)
        print(
            f"[{session.job.iteration}/{session.job.stage}] scored {done} of {total} documents of {title}", flush=True
        )


def tiers_of(session: Session, corpora: list[ScoredCorpus]) -> Tiers:
    """Every token's tier under the recipe's settings."""
    settings = session.recipe.rmt.difficulty
    asked = [askable(corpus, session.tokenizer, settings.first_position) for corpus in corpora]
    return cut_tiers(corpora, asked, settings)
