"""FLOPs of a model, from its shape alone: what throughput and utilisation are reported in, and the plan computes with.

Imports neither torch nor any other part: the stages, the plan and the benchmarks count with the same numbers.
"""

from __future__ import annotations

from dataclasses import dataclass

from nemo_rmt.config import Model


@dataclass(frozen=True)
class Widths:
    """Sizes of a layer's tensors on one tensor-parallel rank."""

    hidden: int
    """Of the residual stream, which is not divided."""
    query: int
    """Of all query heads of this rank."""
    key: int
    """Of all key heads, and of all value heads."""
    ffn: int
    """Inside the feed-forward layer."""
    heads: int
    """Query heads."""
    groups: int
    """Key/value heads."""
    head_dim: int

    @classmethod
    def of(cls, model: Model, tensor: int = 1) -> Widths:
        """The widths at a tensor-parallel size."""
        head_dim = model.head_dim or model.hidden_size // model.num_attention_heads
        heads, groups = model.num_attention_heads // tensor, model.num_query_groups // tensor
        ffn = model.ffn_hidden_size // tensor
        return cls(model.hidden_size, heads * head_dim, groups * head_dim, ffn, heads, groups, head_dim)


def product_parameters(model: Model, tensor: int = 1) -> int:
    """Parameters of one layer on one tensor-parallel rank that are the weights of matrix products."""
    w = Widths.of(model, tensor)
    return w.hidden * (2 * w.query + 2 * w.key) + 3 * w.hidden * w.ffn


def forward_flops(model: Model, rows: int, context: float) -> tuple[float, float]:
    """FLOPs of one token's forward, in all layers and in the output projection.

    rows: of the output projection, tokens predicted over. context: tokens that it attends to.
    """
    attention = 4 * Widths.of(model).query * context
    return model.num_layers * (2 * product_parameters(model) + attention), 2 * rows * model.hidden_size


def training_flops(model: Model, rows: int, context: float) -> float:
    """Model FLOPs of training on one token: PaLM's 6 N + 12 L H Q T (arXiv 2204.02311, appendix B).

    N: weights of matrix products, the output projection included and the input embedding, which is looked up, not.
    T: ``context``, by that convention the row's whole length, although half of it is masked. The backward counts twice
    the forward; what is computed again in it (layers with parallel.recompute, the head's logits) counts nothing.
    """
    return 3 * sum(forward_flops(model, rows, context))
