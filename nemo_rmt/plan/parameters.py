"""How many parameters a model has: as published, and on each rank of a layout."""

from __future__ import annotations

from nemo_rmt.config import VOCAB_MULTIPLE, Model, Parallel, Recipe
from nemo_rmt.model_flops import Widths, product_parameters


def model_vocabulary(recipe: Recipe) -> int:
    """Tokens the model predicts over, from the recipe alone."""
    return recipe.model.vocab_size or recipe.tokenizer.vocab_size


def padded_rows(vocab_size: int) -> int:
    """Rows of the embedding."""
    return -(-vocab_size // VOCAB_MULTIPLE) * VOCAB_MULTIPLE


def parameter_count(recipe: Recipe, vocab_size: int | None = None) -> int:
    """Parameters as they are published: once each, without the embedding's padding.

    vocab_size: the tokenizer's, where the recipe does not say the model's; None: recipe.tokenizer.vocab_size.
    """
    model = recipe.model
    rows = model.vocab_size or vocab_size or recipe.tokenizer.vocab_size
    embeddings = rows * model.hidden_size * (1 if model.tie_embeddings else 2)
    return model.num_layers * layer_parameters(model) + embeddings + model.hidden_size


def layer_parameters(model: Model, tensor: int = 1) -> int:
    """Parameters of one layer on one tensor-parallel rank."""
    w = Widths.of(model, tensor)
    count = product_parameters(model, tensor) + 2 * w.hidden  # norms, before or after: as many
    if model.qk_norm:
        count += 2 * w.head_dim if model.qk_norm_span == "head" else w.query + w.key
    if model.qkv_bias:
        count += w.query + 2 * w.key
    return count


def rank_parameters(model: Model, parallel: Parallel, vocab_size: int, pipeline_rank: int) -> int:
    """Parameters of one rank, padding included."""
    last = pipeline_rank == parallel.pipeline - 1
    count = model.num_layers // parallel.pipeline * layer_parameters(model, parallel.tensor)
    # Tied embeddings are on both ends of a pipeline; on one rank they are one.
    tables = (pipeline_rank == 0) + last
    if model.tie_embeddings and parallel.pipeline == 1:
        tables = 1
    return count + tables * padded_rows(vocab_size) // parallel.tensor * model.hidden_size + last * model.hidden_size
