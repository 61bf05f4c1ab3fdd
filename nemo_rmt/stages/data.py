"""The data stage: a tokenizer of the run, and every corpus as indexed datasets with a held-out split."""

from __future__ import annotations

import itertools
import os
import shutil
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy

from nemo_rmt import profiling, pulse
from nemo_rmt.config import Corpus
from nemo_rmt.data.corpora import check_corpus, documents, mixture
from nemo_rmt.data.seeds import derived_seed
from nemo_rmt.data.tables import DOWNLOAD_VARIABLE
from nemo_rmt.data.tokenizer import Tokenizer, train_tokenizer
from nemo_rmt.errors import UserError
from nemo_rmt.megatron.datasets import token_counts, write_dataset
from nemo_rmt.run_folder import write_json
from nemo_rmt.stages.job import StageJob

ENCODED_AT_ONCE = 1000
PROGRESS_S = 10.0
"""Seconds between lines that say how far a corpus is."""


def run(job: StageJob, folder: Path) -> None:
    """Write tokenizer and datasets into the stage's folder. One process; begins anew when it was interrupted."""
    began = time.perf_counter()
    with profiling.part("data"):
        metrics, tokens = build(job, folder)
    result = {
        "status": "done",
        "metrics": metrics,
        "checkpoint": None,
        "wall_s": round(time.perf_counter() - began, 3),
        "tokens": tokens,
    }
    write_json(folder / "result.json", result)


def build(job: StageJob, folder: Path) -> tuple[dict[str, float], int]:
    """Write them; the stage's metrics, and the tokens to train on."""
    recipe = job.recipe
    if not recipe.data.corpora:
        raise UserError("data.corpora is empty: name at least one corpus to train on")
    for corpus in recipe.data.corpora:  # before hours of work on those that stand in front of a wrong one
        check_corpus(corpus, recipe.data, download=may_download())
    target = folder / "tokenizer"
    if recipe.tokenizer.path is not None:
        tokenizer = Tokenizer.load(Path(recipe.tokenizer.path), recipe.tokenizer.chat_template)
        shutil.rmtree(target, ignore_errors=True)
        tokenizer.save(target)
    else:
        seed = derived_seed(recipe.seed, "tokenizer")
        texts = mixture(recipe.data, seed, run_seed=recipe.seed, download=may_download())
        tokenizer = train_tokenizer(texts, recipe.tokenizer, target)
    metrics: dict[str, float] = {"tokenizer/vocab_size": tokenizer.vocab_size}
    counts = {}
    for corpus in recipe.data.corpora:
        counts[corpus.name] = write_corpus(corpus, job, tokenizer, folder, metrics)
    return metrics | unigram_nll(counts), int(sum(train.sum() for train, _ in counts.values()))


def write_corpus(
    corpus: Corpus, job: StageJob, tokenizer: Tokenizer, folder: Path, metrics: dict[str, float]
) -> tuple[numpy.ndarray, numpy.ndarray]:
    """Write both splits of a corpus; the token counts of each, ``[vocabulary]``."""
    counts = []
    seed = derived_seed(job.recipe.seed, "corpus", corpus.name)
    for split in ("train", "held_out"):
        prefix = folder / corpus.name / split
        texts = documents(corpus, job.recipe.data, split, seed, run_seed=job.recipe.seed, download=may_download())
        rows = with_progress(encoded(texts, tokenizer), f"[{job.iteration}/data] {corpus.name}, {split}")
        size, tokens = write_dataset(prefix, rows, tokenizer.vocab_size)
        if not tokens:
            raise UserError(
                f"data.corpora[{corpus.name}] has no {split} documents: give it more documents or another held_out "
                f"than {corpus.held_out}"
            )
        metrics |= {f"data/{corpus.name}/{split}_documents": size, f"data/{corpus.name}/{split}_tokens": tokens}
        counts.append(token_counts(prefix, tokenizer.vocab_size))
    return counts[0], counts[1]


def may_download() -> bool:
    """Whether this stage was started by ``nemo-rmt data build``, which may fetch hub corpora."""
    return os.environ.get(DOWNLOAD_VARIABLE) == "1"


def encoded(texts: Iterable[str], tokenizer: Tokenizer) -> Iterator[list[int]]:
    """Token ids of each text, ended with the end-of-document token."""
    texts = iter(texts)
    while batch := list(itertools.islice(texts, ENCODED_AT_ONCE)):
        pulse.tick("tokenizing documents")
        for tokens in tokenizer.encode_batch(batch):
            yield [*tokens, tokenizer.eod]


def with_progress(rows: Iterable[list[int]], title: str) -> Iterator[list[int]]:
    """The same rows; every PROGRESS_S seconds a line with the documents and tokens so far, and tokens per second."""
    began = said = time.monotonic()
    count = tokens = 0
    for row in rows:
        yield row
        count, tokens = count + 1, tokens + len(row)
        if time.monotonic() - said >= PROGRESS_S:
            said = time.monotonic()
            speed = tokens / (said - began)
            print(f"{title}: {count:,} documents, {tokens:,} tokens, {speed:,.0f} tokens/s", flush=True)


def unigram_nll(counts: dict[str, tuple[numpy.ndarray, numpy.ndarray]]) -> dict[str, float]:
    """Nats per held-out token of a unigram model of the training split with add-one smoothing.

    ``lm/<domain>/unigram_nll`` for a model of each domain; ``lm/all/unigram_nll`` for one model of all of them.
    """
    everything = (sum(train for train, _ in counts.values()), sum(held_out for _, held_out in counts.values()))
    metrics = {}
    for name, (train, held_out) in {**counts, "all": everything}.items():
        logprobs = numpy.log((train + 1) / (train.sum() + len(train)))
        metrics[f"lm/{name}/unigram_nll"] = float(-(held_out * logprobs).sum() / held_out.sum())
    return metrics
