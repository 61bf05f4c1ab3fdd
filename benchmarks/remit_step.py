"""Time of an annealing step with ReMiT against one with plain next-token prediction.

``python benchmarks/remit_step.py`` prints two JSON lines per shape: with the reference's log-probabilities looked up in
a cache on disk (``cached``), and from a forward pass of a reference of the same model in every step (``online``). All
steps make their batch from the same rows, and are forward, backward and optimizer through the public training step.

Beside the ratio stand the shares of a plain step that ReMiT's parts take alone: looking up or scoring (``reference``),
and the loss, its gradient and its metrics, less those of a plain step (``objective``).
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy
import torch
from measuring import alternately, emit, ratio

from nemo_rmt.config import Model, Optim, Parallel, ReMiT
from nemo_rmt.data import logprob_cache
from nemo_rmt.data.batch import TokenBatch
from nemo_rmt.data.logprob_cache import LogprobCache, Stretches
from nemo_rmt.megatron.head import TokenScores
from nemo_rmt.megatron.model import build_model
from nemo_rmt.megatron.runtime import distributed
from nemo_rmt.megatron.train_step import FrozenModel, Objective, TrainedModel
from nemo_rmt.recipe_io import load_recipe
from nemo_rmt.stages import anneal
from nemo_rmt.stages.pretrain import next_token

EOD, DOCUMENT = 0, 80  # tokens of a document, on average
CORPUS = Path("random/train")


@dataclass(frozen=True)
class Shape:
    """A model and its rows."""

    model: Model
    vocab: int
    rows: int
    length: int


def shapes() -> dict[str, Shape]:
    """By name: the tiny recipe's, and two of a few million parameters."""
    medium, large = (Model(num_layers=layers, hidden_size=256, ffn_hidden_size=768, qk_norm=True) for layers in (4, 6))
    return {
        "tiny": Shape(load_recipe("tiny", [], []).model, 512, 8, 128),
        "medium": Shape(medium, 2048, 4, 512),
        "large": Shape(large, 4096, 2, 1024),
    }


class Corpus:
    """A step's rows of random documents, and a cache with a number for each of their tokens."""

    def __init__(self, shape: Shape, folder: Path):
        self.shape = shape
        generator = numpy.random.default_rng(0)
        tokens = generator.integers(1, shape.vocab, shape.rows * shape.length + 1)
        ends = generator.random(len(tokens)) < 1 / DOCUMENT
        ends[-1] = True
        tokens[ends] = EOD
        self.starts = numpy.append(0, numpy.flatnonzero(ends) + 1)
        firsts = range(0, len(tokens) - 1, shape.length)
        self.tokens = torch.from_numpy(numpy.stack([tokens[first : first + shape.length + 1] for first in firsts]))
        self.stretches = [self._stretches(first, first + shape.length + 1) for first in firsts]
        numbers = logprob_cache.encode(-generator.gamma(2.0, 1.5, len(tokens)))
        plan = {"format": logprob_cache.FORMAT, "corpora": {CORPUS.parent.name: {"dataset": ""}}, "tokenizer": ""}
        plan |= {"model": {"digest": "", "path": ""}, "precision": "fp32", "sequence_length": shape.length}
        logprob_cache.begin(folder, plan)
        logprob_cache.write_block(logprob_cache.block_path(folder, CORPUS.parent.name, 0), numbers)
        logprob_cache.complete(folder, {CORPUS.parent.name: [len(numbers)]})
        self.cache = LogprobCache(folder)

    def _stretches(self, begin: int, end: int) -> Stretches:
        """The documents of a row, from its first token to its last."""
        inner = self.starts[(self.starts > begin) & (self.starts < end)]
        first = numpy.append(begin, inner)
        documents = numpy.searchsorted(self.starts, first, "right") - 1
        return Stretches(CORPUS, documents, first, numpy.diff(numpy.append(first, end)))

    def batch(self) -> TokenBatch:
        """A step's rows, on the training device."""
        return TokenBatch.from_documents(self.tokens.to(torch.cuda.current_device()), EOD, document_attention=True)

    def looked_up(self, batch: TokenBatch) -> torch.Tensor:
        """The reference's log-probabilities of the labels, as stages/references.py takes them from the cache."""
        found = torch.from_numpy(self.cache.logprobs(self.stretches)[:, 1:]).to(batch.tokens.device)
        return torch.where(batch.loss_mask > 0, found, 0.0)


def compare(name: str, shape: Shape, pairs: int) -> None:
    """Print one shape's lines."""
    with tempfile.TemporaryDirectory() as folder, distributed(Parallel(), seed=0):
        corpus = Corpus(shape, Path(folder))
        model = TrainedModel(
            build_model(shape.model, Parallel(), shape.vocab), shape.model, Parallel(), Optim(lr=1e-5), steps=10_000
        )
        frozen = FrozenModel(build_model(shape.model, Parallel(), shape.vocab), Parallel())
        weighted, _ = anneal.remit(ReMiT())
        scored = lambda batch: frozen.score(batch, shape.rows).logprobs  # noqa: E731

        def remit(reference: Callable[[TokenBatch], torch.Tensor]) -> None:
            batch = corpus.batch()
            batch.extras["reference_logprobs"] = reference(batch)
            model.train_step([batch], weighted)

        batch = corpus.batch()
        batch.extras["reference_logprobs"] = corpus.looked_up(batch)
        scores = frozen.score(batch, shape.rows)
        seconds = alternately(
            {
                "plain": lambda: model.train_step([corpus.batch()], next_token),
                "cached": lambda: remit(corpus.looked_up),
                "online": lambda: remit(scored),
                "looking up": lambda: corpus.looked_up(batch),
                "scoring": lambda: scored(batch),
                "plain loss": lambda: evaluate(next_token, scores, batch),
                "weighted loss": lambda: evaluate(weighted, scores, batch),
            },
            pairs,
        )
    medians = {part: statistics.median(values) for part, values in seconds.items()}
    for variant, part in (("cached", "looking up"), ("online", "scoring")):
        emit(
            "remit_step",
            shape=name,
            rows=shape.rows,
            length=shape.length,
            parameters=sum(parameter.numel() for parameter in model.modules[0].parameters()),
            variant=variant,
            **ratio(seconds, variant, "plain"),
            reference_share=round(medians[part] / medians["plain"], 4),
            objective_share=round((medians["weighted loss"] - medians["plain loss"]) / medians["plain"], 4),
        )


def evaluate(objective: Objective, scores: TokenScores, batch: TokenBatch) -> None:
    """The loss, its gradient and its metrics, without a model."""
    output = objective(scores._replace(logprobs=scores.logprobs.detach().requires_grad_()), batch)
    output.loss_sum.backward()


def main() -> None:
    """Print every shape's lines."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=15)
    parser.add_argument("--quick", action="store_true", help="the tiny recipe's shape, 2 pairs")
    options = parser.parse_args()
    for name, shape in shapes().items():
        if not options.quick or name == "tiny":
            compare(name, shape, 2 if options.quick else options.pairs)


if __name__ == "__main__":
    main()
