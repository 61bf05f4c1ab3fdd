"""Memory of the fullest GPU, part by part, for each stage."""

from __future__ import annotations

from dataclasses import dataclass

from nemo_rmt.config import Model, Parallel, Recipe
from nemo_rmt.plan.activations import (
    backward_of_head,
    backward_of_layer,
    element_size,
    forward_of_layer,
    head_activations,
    layer_input,
    layers_activations,
)
from nemo_rmt.plan.parameters import Widths, padded_rows, product_parameters, rank_parameters
from nemo_rmt.plan.workload import Sampling, Workload

GIB = 2**30
RESERVED, RESERVED_SHARE = 2 * GIB, 0.05
"""CUDA's context and NCCL's buffers in bytes, and the share of the memory that fragmentation takes."""
STANDING = ("weights", "gradients", "optimizer", "frozen")


@dataclass(frozen=True)
class Memory:
    """Bytes on one GPU."""

    weights: int
    """Of the trained model, FP8 copies included."""
    gradients: int
    """In float32."""
    optimizer: int
    """Main parameters and Adam's moments, in float32."""
    frozen: int
    """Weights of the reference models."""
    activations: int
    """Kept for backward by all micro-batches in flight."""
    layer: int
    """One layer's backward, with what it recomputes."""
    head: int
    """The log-probability head's."""
    sampling: int
    """Caches and what fills them."""
    update: int
    """What the optimizer's step needs while it runs."""

    @property
    def standing(self) -> int:
        """What is there throughout."""
        return sum(getattr(self, part) for part in STANDING)

    @property
    def training(self) -> int:
        """Forward and backward, on top: a layer and the head work one after the other."""
        return self.activations + max(self.layer, self.head)

    @property
    def peak(self) -> int:
        """The most at any time: training, sampling and the update take turns."""
        return self.standing + max(self.training, self.sampling, self.update)


def available(recipe: Recipe) -> float:
    """Bytes of a GPU for all this."""
    return recipe.cluster.gpu_memory_gib * GIB * (1 - RESERVED_SHARE) - RESERVED


def memory(recipe: Recipe, workload: Workload, vocab_size: int) -> Memory:
    """Of the pipeline rank that needs most; the ranks of the other dimensions are alike."""
    ranks = range(recipe.parallel.pipeline)
    return max((rank_memory(recipe, workload, vocab_size, rank) for rank in ranks), key=lambda each: each.peak)


def rank_memory(recipe: Recipe, workload: Workload, vocab_size: int, rank: int) -> Memory:
    """Of one pipeline rank."""
    model, parallel = recipe.model, recipe.parallel
    parameters, size = rank_parameters(model, parallel, vocab_size, rank), element_size(model)
    last, layers = rank == parallel.pipeline - 1, model.num_layers // parallel.pipeline
    products = (layers - _bf16_layers(model, parallel, rank)) * product_parameters(model, parallel.tensor)
    products = 0 if model.fp8 is None else products
    shards = recipe.data_parallel if parallel.distributed_optimizer else 1
    # float32 main parameters exist where the model's are not float32 themselves.
    states = 8 if size == 4 else 12
    tokens = workload.rows * _width(workload.sequence, parallel)
    layer = backward_of_layer(model, parallel, tokens)
    kept = layers_activations(model, parallel, tokens, rank * layers, layers)
    if parallel.recompute == "full":
        layer += max(kept) - layer_input(model, parallel, tokens)  # the input is kept already
    head = 0
    if last:
        head = head_activations(model, parallel, tokens)
        head += backward_of_head(model, parallel, tokens, vocab_size, entropy=workload.entropy)
    sampling = 0 if workload.sampling is None else sampling_memory(recipe, workload.sampling, layers, vocab_size, last)
    return Memory(
        weights=parameters * size + 2 * products,  # FP8 copies as they are and transposed
        gradients=4 * parameters,
        optimizer=states * parameters // shards,
        frozen=workload.frozen * (parameters * size + products),
        activations=kept_activations(model, parallel, workload.micro_batches, tokens, rank),
        layer=layer,
        head=head,
        sampling=sampling,
        # torch's AdamW makes one copy of the size of a moment; Transformer Engine's fused Adam does not.
        update=0 if model.layers == "transformer_engine" else 4 * parameters // shards,
    )


def kept_activations(model: Model, parallel: Parallel, micro_batches: int, tokens: int, rank: int) -> int:
    """What the layers keep for backward, of all micro-batches in flight, when the first backward begins."""
    chunks = parallel.pipeline * (parallel.virtual_pipeline or 1)
    layers = model.num_layers // chunks
    if parallel.recompute == "full":
        kept = layers * layer_input(model, parallel, tokens)
    else:
        # Where layers differ, the fullest chunk of this rank counts for all.
        starts = range(rank * layers, model.num_layers, parallel.pipeline * layers)
        kept = max(sum(layers_activations(model, parallel, tokens, start, layers)) for start in starts)
    kept += 4 * tokens * Widths.of(model).head_dim  # rotary angles, in float32, shared by the layers
    if rank < parallel.pipeline - 1 or parallel.virtual_pipeline:
        kept += layer_input(model, parallel, tokens)  # what is sent on is held until its gradient is back
    return in_flight(parallel, micro_batches, rank) * kept


def in_flight(parallel: Parallel, micro_batches: int, rank: int) -> int:
    """Micro-batches, of one model chunk each, whose backward has not begun: Megatron's 1F1B, or its interleaved one."""
    if parallel.pipeline == 1:
        return 1
    behind = parallel.pipeline - rank - 1
    if parallel.virtual_pipeline is None:
        return min(micro_batches, behind + 1)
    ahead = 2 * behind + (parallel.virtual_pipeline - 1) * parallel.pipeline + 1
    return min(micro_batches * parallel.virtual_pipeline, ahead)


def cache_bytes(model: Model, tensor: int, layers: int, rows: int, length: int) -> int:
    """Keys and values of ``rows`` sequences of ``length`` tokens in ``layers`` layers of one rank."""
    return 2 * layers * rows * length * Widths.of(model, tensor).key * element_size(model)


def sampling_memory(recipe: Recipe, sampling: Sampling, layers: int, vocab_size: int, last: bool) -> int:
    """Caches of a batch and what computing with them needs: documents come first, then prompts and responses.

    A colocated vLLM takes its share of the GPU whatever it samples; a server is on other GPUs.
    """
    model, parallel, rollout = recipe.model, recipe.parallel, recipe.rollout
    if rollout.engine == "vllm":
        share = rollout.vllm.gpu_memory_utilization if rollout.vllm.placement == "colocated" else 0.0
        return int(share * recipe.cluster.gpu_memory_gib * GIB)
    w = Widths.of(model, parallel.tensor)
    length = sampling.prompt + sampling.limit
    trunks = cache_bytes(model, parallel.tensor, layers, sampling.trunks, sampling.trunk_length)
    own = cache_bytes(model, parallel.tensor, layers, sampling.rows, length)
    documents = forward_of_layer(model, parallel, sampling.trunks * sampling.trunk_length)
    prompts = forward_of_layer(model, parallel, sampling.rows * sampling.prompt)
    # Logits, their log-softmax and, in float64, probabilities and their sums.
    drawing = 24 * sampling.rows * padded_rows(vocab_size) if last else 0
    attention = 0
    if sampling.trunks:  # one layer's keys in float32, of the rows or the trunks, and scores
        attention = 4 * w.key * max(sampling.rows * length, sampling.trunks * sampling.trunk_length)
        attention += 2 * 4 * sampling.rows * w.heads * (length + sampling.trunk_length)
    return trunks + max(documents, own + max(prompts, drawing, attention))


def _bf16_layers(model: Model, parallel: Parallel, rank: int) -> int:
    """Layers of a pipeline rank that stay in BF16 under FP8: Megatron keeps those of an end in one stage."""
    begin, end = model.fp8_bf16_layers
    return begin * (rank == 0) + end * (rank == parallel.pipeline - 1)


def _width(sequence: int, parallel: Parallel) -> int:
    """Tokens of a row, rounded up to what sequence parallelism divides."""
    multiple = parallel.tensor if parallel.sequence else 1
    return -(-sequence // multiple) * multiple
