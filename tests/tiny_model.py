"""A model and rows of random tokens for tests of one process, without a tokenizer or data on disk."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from small_recipe import small_recipe

from nemo_rmt.config import Optim, Recipe
from nemo_rmt.data.batch import TokenBatch
from nemo_rmt.megatron.head import TokenScores
from nemo_rmt.megatron.model import build_model
from nemo_rmt.megatron.runtime import distributed
from nemo_rmt.megatron.train_step import TrainedModel
from nemo_rmt.objectives import LossOutput, ntp_loss

VOCAB, EOD = 300, 0


@contextlib.contextmanager
def world(seed: int = 5) -> Iterator[None]:
    """A world of this process alone."""
    with distributed(small_recipe("unused").parallel, seed):
        yield


def tiny_recipe(**changes: dict) -> Recipe:
    """Two layers of small_recipe's model, without its options; ``changes`` as small_recipe takes them."""
    model = {"num_layers": 2, "hidden_size": 32, "ffn_hidden_size": 48, "qk_norm": False, "qkv_bias": False}
    return small_recipe("unused", **{**changes, "model": {**model, **changes.get("model", {})}})


def trained(recipe: Recipe, optim: Optim | None = None, steps: int = 10, seed: int = 1) -> TrainedModel:
    """A model ready to train, the same initial weights for the same seed."""
    torch.manual_seed(seed)
    chunks = build_model(recipe.model, recipe.parallel, VOCAB)
    return TrainedModel(chunks, recipe.model, recipe.parallel, optim or Optim(lr=1e-2), steps)


def random_rows(rows: int, sequence: int = 24, seed: int = 0) -> torch.Tensor:
    """``[rows, sequence + 1]`` tokens of documents that end with EOD about every eighth token."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(1, VOCAB, (rows, sequence + 1), generator=generator)
    tokens[torch.rand(tokens.shape, generator=generator) < 1 / 8] = EOD
    return tokens


def random_batch(rows: int, sequence: int = 24, seed: int = 0) -> TokenBatch:
    """Packed documents."""
    return TokenBatch.from_documents(random_rows(rows, sequence, seed), EOD, document_attention=True)


def next_token(scores: TokenScores, batch: TokenBatch) -> LossOutput:
    """Cross-entropy, weighted when the batch carries weights."""
    return ntp_loss(scores.logprobs, batch.loss_mask, batch.extras.get("weights"))
