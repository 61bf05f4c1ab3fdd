"""Batched sampling with a key/value cache, straight from the live training weights, at any layout."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import numpy
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from nemo_rmt import pulse
from nemo_rmt.megatron.cache import Caches, caching
from nemo_rmt.megatron.model import LogprobGPT, set_for_sampling

# Finished rows leave the batch once they are a quarter of it: moving the caches costs more than a few idle rows.
KEEP_WHILE_RUNNING = 0.75


@dataclass
class Sampled:
    """Sampled responses: ``tokens`` int64 and ``logprobs`` float32 ``[batch, steps]``, ``lengths`` int64 ``[batch]``.

    Beyond a row's length both hold zeros. ``finished`` is boolean: a stop token or the marker ended the row.
    """

    tokens: Tensor
    logprobs: Tensor
    lengths: Tensor
    finished: Tensor


@dataclass(frozen=True)
class Trunks:
    """Documents whose prefixes precede the prompts of a batch.

    documents: token ids, every document used. indices: of each prompt's document. positions: how many of its tokens
    precede the prompt.
    """

    documents: list[list[int]]
    indices: list[int]
    positions: list[int]


@torch.no_grad()
def generate(
    chunks: list[LogprobGPT],
    prompts: list[list[int]],
    noise: numpy.ndarray,
    *,
    stop_tokens: frozenset[int],
    temperature: float = 1.0,
    top_p: float = 1.0,
    marker: int | None = None,
    after_marker: int = 0,
    trunks: Trunks | None = None,
) -> Sampled:
    """Sample one response per prompt.

    Args:
        chunks: bare model chunks of this process.
        prompts: token ids, not empty, of any lengths (padded on the left, masked).
        noise: ``[batch, max_new_tokens]`` uniform numbers in [0, 1), see ``rollout.engine.sampling_noise``.
        stop_tokens: ids that end a row; finished rows leave the batch.
        temperature: 0 is greedy; its log-probabilities are then those at temperature 1.
        top_p: nucleus sampling below 1.
        marker: id after whose first occurrence in a response ``after_marker`` tokens, at least one, end the row.
        trunks: what precedes the prompts, computed once per document. The responses are those to the whole sequences.

    Returns:
        Sampled, the same on every model-parallel rank. Log-probabilities are at the sampling temperature over the whole
        vocabulary, before top-p.
    """
    device = torch.device(torch.cuda.current_device())
    width, limit = max(len(prompt) for prompt in prompts), noise.shape[1]
    lengths = torch.tensor([len(prompt) for prompt in prompts], device=device)
    padding = (width - lengths)[:, None]
    tokens = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in prompts], device=device)
    columns = torch.arange(width + limit, device=device)
    visible = columns >= padding  # [batch, width + limit]: real prompt and response positions
    causal = columns[:width, None] >= columns[None, :width]
    # A padding query sees itself, or its softmax would be over nothing.
    mask = causal & visible[:, None, None, :width] | torch.eye(width, dtype=torch.bool, device=device)
    starts = torch.tensor(trunks.positions if trunks else [0] * len(prompts), device=device)[:, None]
    positions = starts + (columns[:width] - padding).clamp(min=0)
    uniform = torch.from_numpy(noise).to(device)
    stops = torch.tensor(sorted(stop_tokens), device=device)
    result = Sampled(
        tokens=torch.zeros(len(prompts), limit, dtype=torch.long, device=device),
        logprobs=torch.zeros(len(prompts), limit, device=device),
        lengths=torch.zeros(len(prompts), dtype=torch.long, device=device),
        finished=torch.zeros(len(prompts), dtype=torch.bool, device=device),
    )
    rows = torch.arange(len(prompts), device=device)  # which sequences the batch holds
    running = torch.ones_like(result.finished)  # and which of those go on
    left = torch.full_like(lengths, limit + 1)  # tokens until the marker ends a row; starts out of reach
    shared = max(trunks.positions) if trunks else 0
    with _inference(chunks, shared or width + limit) as caches:
        if shared:
            _forward_trunks(chunks, [document[:shared] for document in trunks.documents], device)
            caches.fork(torch.tensor(trunks.indices, device=device), starts[:, 0], width + limit)
        for step in range(limit):
            pulse.tick(f"sampling token {step} of up to {limit} of {len(prompts)} responses")
            logits = _forward(chunks, tokens, positions, mask)
            drawn, logprobs = _draw(logits, uniform[rows, step], temperature, top_p)
            result.tokens[rows[running], step] = drawn[running]
            result.logprobs[rows[running], step] = logprobs[running]
            result.lengths[rows[running]] += 1
            left -= 1
            if marker is not None:
                left[rows] = torch.where(drawn == marker, left[rows].clamp(max=after_marker), left[rows])
            ended = (torch.isin(drawn, stops) | (left[rows] == 0)) & running
            result.finished[rows[ended]] = True
            running &= ~ended
            if not running.any():
                break
            if running.sum() <= KEEP_WHILE_RUNNING * len(rows):
                rows, drawn = rows[running], drawn[running]
                caches.select(running)
                running = running[running]
            end = width + step + 1
            tokens, positions = drawn[:, None], starts[rows] + end - 1 - padding[rows]
            mask = visible[rows, None, None, :end]
    steps = int(result.lengths.max())
    return Sampled(result.tokens[:, :steps], result.logprobs[:, :steps], result.lengths, result.finished)


@contextlib.contextmanager
def _inference(chunks: list[LogprobGPT], length: int) -> Iterator[Caches]:
    """Evaluation mode, no sequence parallelism or FP8, a cache in every layer; all undone afterwards."""
    training = [chunk.training for chunk in chunks]
    for chunk in chunks:
        chunk.eval()
    try:
        with set_for_sampling(chunks), caching(chunks, length) as caches:
            yield caches
    finally:
        for chunk, mode in zip(chunks, training, strict=True):
            chunk.train(mode)


def _forward_trunks(chunks: list[LogprobGPT], documents: list[list[int]], device: torch.device) -> None:
    """Fill the caches; what the padding on the right leaves there is before no fork."""
    length = max(map(len, documents))
    tokens = torch.tensor([document + [0] * (length - len(document)) for document in documents], device=device)
    _forward(chunks, tokens, torch.arange(length, device=device).expand_as(tokens), None)


def _forward(chunks: list[LogprobGPT], tokens: Tensor, positions: Tensor, mask: Tensor | None) -> Tensor | None:
    """One forward through all pipeline stages and model chunks; logits ``[batch, vocabulary]`` on the last stage."""
    first, last = parallel_state.is_pipeline_first_stage(), parallel_state.is_pipeline_last_stage()
    output = None
    for index, chunk in enumerate(chunks):
        if not (first and index == 0):
            config = chunk.config
            received = torch.empty(
                tokens.shape[1], tokens.shape[0], config.hidden_size, dtype=config.params_dtype, device=tokens.device
            )
            dist.recv(received, parallel_state.get_pipeline_model_parallel_prev_rank())
            chunk.set_input_tensor(received)
        output = chunk(tokens, positions, mask)
        if not (last and index == len(chunks) - 1):
            dist.send(output.contiguous(), parallel_state.get_pipeline_model_parallel_next_rank())
            output = None
    return output


def _draw(logits: Tensor | None, uniform: Tensor, temperature: float, top_p: float) -> tuple[Tensor, Tensor]:
    """Next tokens and their log-probabilities ``[batch]``, drawn on the last stage and shared with all ranks."""
    drawn = torch.zeros(2, len(uniform), dtype=torch.float64, device=uniform.device)
    if logits is not None:
        logprobs = torch.log_softmax(logits / (temperature or 1.0), dim=-1)
        tokens = logprobs.argmax(-1) if temperature == 0 else _inverse_cumulative(logprobs, uniform, top_p)
        drawn[0], drawn[1] = tokens, logprobs.gather(1, tokens[:, None])[:, 0]
        if parallel_state.get_tensor_model_parallel_world_size() > 1:
            # The ranks hold the same logits, but a cumulative sum on a GPU is not deterministic: one rank decides.
            dist.broadcast(
                drawn,
                parallel_state.get_tensor_model_parallel_src_rank(),
                group=parallel_state.get_tensor_model_parallel_group(),
            )
    if parallel_state.get_pipeline_model_parallel_world_size() > 1:
        dist.broadcast(
            drawn,
            parallel_state.get_pipeline_model_parallel_last_rank(),
            group=parallel_state.get_pipeline_model_parallel_group(),
        )
    return drawn[0].long(), drawn[1].float()


def _inverse_cumulative(logprobs: Tensor, uniform: Tensor, top_p: float) -> Tensor:
    """Invert the cumulative distribution at ``uniform``; in float64, so that layouts agree but for a hair's breadth."""
    probabilities = logprobs.double().exp()
    if top_p < 1:
        ordered, order = probabilities.sort(dim=-1, descending=True)
        beyond = ordered.cumsum(-1) - ordered >= top_p
        probabilities = probabilities.scatter(1, order, ordered.masked_fill(beyond, 0.0))
    cumulative = probabilities.cumsum(-1)
    return torch.searchsorted(cumulative, (uniform * cumulative[:, -1])[:, None], right=True)[:, 0].clamp(
        max=probabilities.shape[1] - 1
    )
