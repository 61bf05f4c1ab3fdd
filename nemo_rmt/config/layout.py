"""The architecture, how it is laid out over processes, and the machines."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from nemo_rmt.config.section import Section

VOCAB_MULTIPLE = 128
"""Embedding rows are padded to a multiple of this, whatever the layout, so that a checkpoint fits every tensor-parallel
size that divides it."""
LOGITS_AT_ONCE = 2**25
"""Logits that the log-probability head holds at once where logprob_chunk does not say: 128 MiB in fp32, large enough
for an efficient matrix product at a vocabulary of 150 k (220 tokens), small against the activations of one layer."""
FP8_CAPABILITY = {"tensorwise": (8, 9), "delayed": (8, 9), "blockwise": (9, 0)}
"""Compute capability of the oldest GPUs with each fp8_recipe: Ada's; scaling factors per block need Hopper."""


class Model(Section):
    """A dense decoder: RMSNorm, SwiGLU, rotary positions, grouped-query attention, no linear biases."""

    num_layers: PositiveInt = 4
    """Transformer layers."""
    hidden_size: PositiveInt = 128
    """Width of the residual stream."""
    num_attention_heads: PositiveInt = 4
    """Query heads."""
    num_query_groups: PositiveInt = 2
    """Key/value heads; equal to num_attention_heads for plain multi-head attention."""
    head_dim: PositiveInt | None = None
    """Size of one head; null: hidden_size / num_attention_heads."""
    ffn_hidden_size: PositiveInt = 384
    """Inner width of the SwiGLU feed-forward layer."""
    vocab_size: PositiveInt | None = None
    """Tokens the model predicts over; null: the tokenizer's. Published models often have more rows than tokens."""
    norm_position: Literal["before", "after"] = "before"
    """RMSNorm on what goes into attention and feed-forward, or on what comes out of them (OLMo 2)."""
    qk_norm: bool = False
    """RMSNorm on queries and keys (Qwen3, OLMo 2)."""
    qk_norm_span: Literal["head", "all_heads"] = "head"
    """What such a norm is taken over: each head by itself (Qwen3), or all heads together (OLMo 2)."""
    qkv_bias: bool = False
    """Bias on the query, key and value projections (Qwen2)."""
    tie_embeddings: bool = True
    """Use the input embedding as the output projection."""
    rope_base: PositiveFloat = 10000.0
    """Base of the rotary frequencies."""
    rope_skip_interval: PositiveInt | None = None
    """Every how many layers one has no rotary positions (SmolLM3: 4); null: all have them."""
    norm_epsilon: PositiveFloat = 1e-6
    """Epsilon of the RMS norms."""
    init_std: PositiveFloat = 0.02
    """Standard deviation of the initial weights."""
    max_position: PositiveInt = 4096
    """Longest sequence the model may see, in tokens."""
    layers: Literal["local", "transformer_engine"] = "local"
    """Linear and norm layers: Megatron's own, or Transformer Engine's (needs a GPU)."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Parameters and activations; gradients are reduced and optimizer states kept in fp32."""
    fp8: Literal["hybrid", "e4m3"] | None = None
    """Matrix products of the layers in FP8, with Transformer Engine: e4m3 forward and e5m2 backward (hybrid), or e4m3
    throughout. Weights stay in BF16, and responses are sampled in BF16."""
    fp8_recipe: Literal["tensorwise", "delayed", "blockwise"] = "tensorwise"
    """Scaling factors: from the present tensor, from the history of its maxima, or per block of the present tensor."""
    fp8_bf16_layers: tuple[NonNegativeInt, NonNegativeInt] = (0, 0)
    """First and last layers that stay in BF16; not with fp8_recipe=delayed."""
    logprob_chunk: PositiveInt | None = None
    """Tokens whose logits the log-probability head holds at once; null: as many as make 128 MiB."""

    @model_validator(mode="after")
    def _heads(self) -> Model:
        if self.head_dim is None and self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size {self.hidden_size} is not divisible by num_attention_heads "
                f"{self.num_attention_heads}: change one of them or set head_dim"
            )
        if self.num_attention_heads % self.num_query_groups:
            raise ValueError(
                f"num_attention_heads {self.num_attention_heads} is not divisible by "
                f"num_query_groups {self.num_query_groups}"
            )
        if (self.head_dim or self.hidden_size // self.num_attention_heads) % 8:
            raise ValueError("the head size must be a multiple of 8 for rotary positions")
        if self.rope_skip_interval and self.num_layers % self.rope_skip_interval:
            raise ValueError(
                f"rope_skip_interval {self.rope_skip_interval} does not divide num_layers {self.num_layers}"
            )
        return self

    @model_validator(mode="after")
    def _fp8(self) -> Model:
        if self.fp8 is None:
            return self
        if self.layers != "transformer_engine" or self.precision != "bf16":
            raise ValueError(
                f"fp8={self.fp8} needs layers=transformer_engine and precision=bf16, got {self.layers} and "
                f"{self.precision}: set both, or fp8=null"
            )
        if any(self.fp8_bf16_layers) and self.fp8_recipe == "delayed":
            raise ValueError("fp8_bf16_layers cannot go with fp8_recipe=delayed: use tensorwise or blockwise")
        if sum(self.fp8_bf16_layers) >= self.num_layers:
            raise ValueError(f"fp8_bf16_layers {self.fp8_bf16_layers} leave no layer of {self.num_layers} for FP8")
        return self


class Parallel(Section):
    """How one model is laid out over processes; what remains of the world size is data-parallel."""

    tensor: PositiveInt = 1
    """Tensor-parallel size."""
    pipeline: PositiveInt = 1
    """Pipeline-parallel size."""
    virtual_pipeline: PositiveInt | None = None
    """Model chunks per pipeline rank (interleaved schedule)."""
    context: PositiveInt = 1
    """Context-parallel size."""
    sequence: bool = False
    """Sequence parallelism; needs tensor > 1."""
    distributed_optimizer: bool = True
    """Shard optimizer states over data-parallel ranks."""
    overlap: bool = False
    """Overlap gradient reduction with compute (GPU clusters)."""
    recompute: Literal["none", "full"] = "none"
    """Recompute activations in backward: full recomputes every layer."""

    @model_validator(mode="after")
    def _combinations(self) -> Parallel:
        if self.context > 1:
            raise ValueError("context-parallel attention is not supported yet: set parallel.context=1")
        if self.sequence and self.tensor == 1:
            raise ValueError("sequence needs tensor > 1: set parallel.sequence=false or parallel.tensor=2")
        if self.virtual_pipeline and self.pipeline == 1:
            raise ValueError("virtual_pipeline needs pipeline > 1")
        return self


class Cluster(Section):
    """Where the stages run."""

    nodes: PositiveInt = 1
    """Machines."""
    gpus_per_node: PositiveInt = 1
    """Processes started on each machine: one per GPU, or CPU processes where there is no GPU."""
    gpu_memory_gib: PositiveFloat = 80.0
    """Memory of one GPU, for nemo-rmt plan."""
    gpu_tflops: PositiveFloat = 989.0
    """Dense BF16 peak of one GPU in TFLOP/s, for nemo-rmt plan and train/mfu; 989 is an H100 SXM's."""
    gpu_efficiency: float = Field(0.4, gt=0, le=1)
    """Share of that peak that training is assumed to reach, for nemo-rmt plan."""
    gpu_compute_capability: PositiveFloat = 9.0
    """Of one GPU, for nemo-rmt plan where none is visible; 9.0 is an H100's."""
    hang_timeout_s: PositiveFloat = 1200.0
    """Seconds in which no rank does anything (a micro-batch, a token, a document, a file) before a stage counts as hung
    and is stopped; more than the longest checkpoint file takes to write."""
    threads: PositiveInt | None = None
    """CPU threads per process; null: cores divided by processes."""
