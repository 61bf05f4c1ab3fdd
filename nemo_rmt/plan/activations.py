"""Bytes of one forward and backward on a GPU: what autograd keeps, and what is there only while it is worked on.

Counted from the modules that run: Megatron's layers without fusions, our attention, our log-probability head. An
attention kernel keeps queries, keys, values, output and one number a head; an RMSNorm kernel keeps its input. On a CPU
both keep more.
"""

from __future__ import annotations

from nemo_rmt.config import LOGITS_AT_ONCE, Model, Parallel
from nemo_rmt.plan.parameters import Widths, padded_rows


def element_size(model: Model) -> int:
    """Bytes of a number of the model."""
    return 4 if model.precision == "fp32" else 2


def layer_activations(model: Model, parallel: Parallel, tokens: int, *, rotary: bool = True, fp8: bool = False) -> int:
    """What autograd keeps of one layer for a micro-batch of ``tokens``.

    rotary: whether the layer has rotary positions. fp8: whether its matrix products are in FP8 (they keep their inputs
    in one byte; only with Transformer Engine, whose layers otherwise keep what Megatron's do).
    """
    w, size = Widths.of(model, parallel.tensor), element_size(model)
    split = parallel.tensor if parallel.sequence else 1
    product = 1 if fp8 else size
    count = 2 * w.hidden * (size + product) / split + 2 * 4 / split  # two norms' and two products' inputs
    count += (w.query + 2 * w.key) * size  # queries, keys and values as they come, kept whole by the values
    copied = w.heads > w.groups  # queries in groups are copied into heads
    if model.qk_norm and model.qk_norm_span == "head":
        count += copied * w.query * size + 4 * (w.heads + w.groups)
    elif model.qk_norm:  # in float32, before and after the division
        count += 4 * (w.query + w.key) + 2 * 4
        count += copied * w.query * size if size == 4 else 4 * (w.query + w.key)
    if rotary or model.qk_norm:
        count += (w.query + w.key) * size
    elif copied:
        count += w.query * size
    if rotary:
        count += 4 * w.head_dim * size  # cosines and sines, of queries and of keys
    count += w.query * size + 4 * w.heads  # attention's output and normalisers
    count += w.query if fp8 else 0  # which the product after it keeps again
    count += 4 * w.ffn * size + w.ffn * product  # both halves, SiLU of one, the other, and their product
    return round(tokens * count)


def layers_activations(model: Model, parallel: Parallel, tokens: int, first: int, count: int) -> list[int]:
    """The same for each of the layers from ``first`` on."""
    found = []
    begin, end = model.fp8_bf16_layers
    for layer in range(first, first + count):
        skipped = model.rope_skip_interval is not None and (layer + 1) % model.rope_skip_interval == 0
        fp8 = model.fp8 is not None and begin <= layer < model.num_layers - end
        found.append(layer_activations(model, parallel, tokens, rotary=not skipped, fp8=fp8))
    return found


def layer_input(model: Model, parallel: Parallel, tokens: int) -> int:
    """A layer's input: what recomputation keeps of it, and what a pipeline stage sends."""
    return tokens * model.hidden_size * element_size(model) // (parallel.tensor if parallel.sequence else 1)


def backward_of_layer(model: Model, parallel: Parallel, tokens: int) -> int:
    """What one layer's backward needs while it runs: gradients around the feed-forward layer, and of its weight."""
    w, size = Widths.of(model, parallel.tensor), element_size(model)
    return size * (tokens * (4 * w.ffn + 2 * w.hidden) + 2 * w.ffn * w.hidden)


def forward_of_layer(model: Model, parallel: Parallel, tokens: int) -> int:
    """What one layer's forward needs while it runs, when nothing is kept."""
    w, size = Widths.of(model, parallel.tensor), element_size(model)
    return size * tokens * (2 * w.hidden + max(5 * w.ffn, 3 * w.query + 4 * w.key))


def head_activations(model: Model, parallel: Parallel, tokens: int) -> int:
    """What autograd keeps of the last norm and the log-probability head."""
    split = parallel.tensor if parallel.sequence else 1
    return round(tokens * (model.hidden_size * element_size(model) * (1 + 1 / split) + 4 / split + 8 + 2 * 4))


def backward_of_head(model: Model, parallel: Parallel, tokens: int, vocab_size: int, *, entropy: bool) -> int:
    """What the head's backward needs while it runs: a chunk's logits, the weight's gradient, that of its input."""
    rows, size = padded_rows(vocab_size) // parallel.tensor, element_size(model)
    chunk = min(tokens, model.logprob_chunk or max(1, LOGITS_AT_ONCE // rows))
    logits = (4 if entropy else 3) * 4 * chunk * rows
    # Accumulated in float32, beside a chunk's share; in fp32 beside the copy that padding rows are added to.
    weight = rows * model.hidden_size * (8 if size == 4 else 6)
    return logits + weight + 2 * tokens * model.hidden_size * size
