"""Seconds of a step from its arithmetic, at the share of the peak that the recipe assumes."""

from __future__ import annotations

from dataclasses import dataclass

from nemo_rmt.config import Recipe
from nemo_rmt.model_flops import forward_flops, product_parameters
from nemo_rmt.plan.activations import element_size
from nemo_rmt.plan.memory import cache_bytes
from nemo_rmt.plan.parameters import padded_rows
from nemo_rmt.plan.workload import Sampling, Workload

PRODUCTS_PER_BYTE = 295
"""FLOPs a GPU does in the time it reads a byte of its memory, both at their peaks: 989 TFLOP/s over 3.35 TB/s, an H100
SXM's. Other training GPUs of this kind have 150 to 300."""


@dataclass(frozen=True)
class StepTime:
    """Seconds of one step."""

    training: float
    """Forward and backward of all updates."""
    scoring: float
    """Forward passes of frozen models, and of old log-probabilities."""
    sampling: float
    tokens: float
    """Trained on in the step."""
    overlapped: bool = False
    """Whether the next step's responses are sampled meanwhile, on other GPUs."""

    @property
    def seconds(self) -> float:
        """Of the whole step."""
        computed = self.training + self.scoring
        return max(computed, self.sampling) if self.overlapped else computed + self.sampling

    @property
    def tokens_per_second(self) -> float:
        """Of the whole cluster."""
        return self.tokens / self.seconds


def step_time(recipe: Recipe, workload: Workload, vocab_size: int) -> StepTime:
    """Of one step of a stage."""
    p = recipe.parallel
    layers, head = forward_flops(recipe.model, padded_rows(vocab_size), workload.context)
    gpus = recipe.data_parallel * p.tensor * p.pipeline * p.context
    rate = gpus * _rate(recipe)
    # Each pipeline rank waits while the first and last micro-batches pass the others.
    bubble = 1 + (p.pipeline - 1) / (workload.micro_batches * (p.virtual_pipeline or 1))
    # The backward takes twice the forward; the head always computes its logits again, layers when asked to.
    update = layers * (4 if p.recompute == "full" else 3) + head * 4
    trained = workload.updates * workload.tokens
    sampling = workload.sampling
    return StepTime(
        training=trained * update / rate * bubble,
        scoring=workload.scored * workload.tokens * (layers + head) / rate * bubble,
        sampling=0.0 if sampling is None else sampling_seconds(recipe, sampling, vocab_size),
        tokens=workload.tokens,
        overlapped=recipe.rollout.lag > 0,
    )


def sampling_seconds(recipe: Recipe, sampling: Sampling, vocab_size: int) -> float:
    """Of all batches of a data-parallel rank: prompts by their arithmetic, then a token at a time, each the longer of
    its arithmetic and of reading weights and caches. A pipeline's ranks take turns."""
    model, tensor = recipe.model, recipe.parallel.tensor
    rate = _rate(recipe)
    prompts = sampling.documents * sampling.trunk_length + sampling.responses * sampling.prompt
    layers, head = forward_flops(model, padded_rows(vocab_size), max(sampling.trunk_length, sampling.prompt) / 2)
    seconds = prompts * layers / tensor / rate
    batches = -(-sampling.responses // sampling.rows)
    # Rows that end leave the batch: on average it has as many as the mean response is to the longest.
    rows = sampling.rows * sampling.length / sampling.steps
    context = sampling.trunk_length / 2 + sampling.prompt + sampling.length / 2
    layers, head = forward_flops(model, padded_rows(vocab_size), context)
    arithmetic = rows * (layers + head) / tensor / rate
    weights = (
        model.num_layers * product_parameters(model, tensor) + padded_rows(vocab_size) // tensor * model.hidden_size
    )
    caches = cache_bytes(model, tensor, model.num_layers, 1, 1) * (
        rows * (sampling.prompt + sampling.length / 2) + sampling.trunks * sampling.trunk_length / 2
    )
    reading = (weights * element_size(model) + caches) * PRODUCTS_PER_BYTE / rate
    return seconds + batches * sampling.steps * max(arithmetic, reading)


def _rate(recipe: Recipe) -> float:
    """FLOP/s of one GPU."""
    return recipe.cluster.gpu_tflops * 1e12 * recipe.cluster.gpu_efficiency
