"""Batched sampling with a key/value cache, straight from the live training weights, at any layout."""

from __future__ import annotations

import contextlib
import itertools
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
# Asking a GPU which rows have finished is waiting for it: only every so many tokens. What finished rows draw until then
# is thrown away.
CHECK_EVERY = 4


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
    left = torch.full_like(rows, limit + 1)  # tokens until the marker ends a row; starts out of reach
    endless = not stop_tokens and marker is None
    check_every = CHECK_EVERY if device.type == "cuda" else 1
    with _inference(chunks, (max(trunks.positions) if trunks else 0) or width) as caches:
        logits, positions, visible = _prefill(chunks, caches, prompts, trunks, limit, device)
        for step in range(limit):
            pulse.tick(f"sampling token {step} of up to {limit} of {len(prompts)} responses")
            drawn, logprobs = _draw(logits, uniform[rows, step], temperature, top_p)
            result.tokens[rows, step] = drawn.where(running, 0)
            result.logprobs[rows, step] = logprobs.where(running, 0)
            result.lengths[rows] += running
            if not endless:
                left -= 1
                if marker is not None:
                    left = left.clamp(max=after_marker).where(drawn == marker, left)
                ended = (torch.isin(drawn, stops) | (left == 0)) & running
                result.finished[rows] |= ended
                running = running & ~ended
                if (step + 1) % check_every == 0:
                    going = int(running.sum())
                    if going == 0:
                        break
                    if going <= KEEP_WHILE_RUNNING * len(rows):
                        kept = running.nonzero()[:, 0]
                        caches.select(kept)
                        rows, running, left, drawn = (each[kept] for each in (rows, running, left, drawn))
                        positions, visible = positions[kept], None if visible is None else visible[kept]
            if step + 1 < limit:
                mask = None if visible is None else visible[:, None, None, : width + step + 1]
                logits = _forward(chunks, drawn[:, None], positions + step, mask)
    steps = int(result.lengths.max())
    return Sampled(result.tokens[:, :steps], result.logprobs[:, :steps], result.lengths, result.finished)


def _prefill(
    chunks: list[LogprobGPT],
    caches: Caches,
    prompts: list[list[int]],
    trunks: Trunks | None,
    limit: int,
    device: torch.device,
) -> tuple[Tensor | None, Tensor, Tensor | None]:
    """Fill the caches, each different prompt (after the same tokens of a document) once, with room for the responses.

    Returns:
        Of every prompt: the logits after it, ``[batch, vocabulary]``, None before the last stage; the position of what
        follows it, ``[batch, 1]``; where it and its response are, boolean ``[batch, width + limit]``, or None when
        that is everywhere.
    """
    first, owners = _distinct(prompts, trunks)
    distinct, starts = [prompts[row] for row in first], [trunks.positions[row] if trunks else 0 for row in first]
    lengths = [len(prompt) for prompt in distinct]
    width, shared = max(lengths), max(starts)
    tokens = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in distinct], device=device)
    padding = torch.tensor([width - length for length in lengths], device=device)[:, None]
    forks = torch.tensor(starts, device=device)
    columns = torch.arange(width + limit, device=device)
    visible = columns >= padding if min(lengths) < width else None
    mask = None
    if shared:
        _forward_trunks(chunks, [document[:shared] for document in trunks.documents], device)
        caches.fork(torch.tensor([trunks.indices[row] for row in first], device=device), forks, width)
    if shared or visible is not None:
        causal = columns[:width, None] >= columns[:width]
        # A padding query sees itself, or its softmax would be over nothing.
        mask = (causal & (columns >= padding)[:, None, None, :width]) | torch.eye(
            width, dtype=torch.bool, device=device
        )
    after = forks[:, None] + width - padding
    positions = forks[:, None] + (columns[:width] - padding).clamp(min=0)
    logits = _forward(chunks, tokens, positions, mask)
    rows = torch.tensor(owners, device=device)
    caches.select(rows, width + limit)
    return (*(None if each is None else each[rows] for each in (logits, after, visible)),)


def _distinct(prompts: list[list[int]], trunks: Trunks | None) -> tuple[list[int], list[int]]:
    """The first of each different prompt (index of every one), and which of those each prompt is."""
    before = zip(trunks.indices, trunks.positions, strict=True) if trunks else itertools.repeat(())
    numbers: dict[tuple, int] = {}
    first, owners = [], []
    for row, key in enumerate(zip(before, map(tuple, prompts))):
        if key not in numbers:
            numbers[key] = len(first)
            first.append(row)
        owners.append(numbers[key])
    return first, owners


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
        drawn[0], drawn[1] = _sample(logits, uniform, temperature, top_p)
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


def _sample(logits: Tensor, uniform: Tensor, temperature: float, top_p: float) -> tuple[Tensor, Tensor]:
    """Invert the cumulative distribution at ``uniform``; in float64, so that layouts agree but for a hair's breadth.

    One copy of the vocabulary in float64, changed in place: the log-probability is that of the one token drawn.
    """
    scaled = logits.double().div_(temperature or 1.0)
    peak = scaled.amax(-1, keepdim=True)
    if temperature == 0:
        tokens, total = logits.argmax(-1, keepdim=True), scaled.sub_(peak).exp_().sum(-1, keepdim=True)
    else:
        weights = scaled.sub_(peak).exp_()
        total = weights.sum(-1, keepdim=True)
        cumulative = (_nucleus(weights, top_p * total) if top_p < 1 else weights).cumsum_(-1)
        tokens = torch.searchsorted(cumulative, uniform[:, None] * cumulative[:, -1:], right=True)
        tokens.clamp_(max=logits.shape[1] - 1)
    logprobs = logits.gather(1, tokens).double() / (temperature or 1.0) - peak - total.log()
    return tokens[:, 0], logprobs[:, 0]


def _nucleus(weights: Tensor, share: Tensor) -> Tensor:
    """The weights, with zeros for all but the largest that add up to ``share`` ``[batch, 1]``."""
    ordered, order = weights.sort(dim=-1, descending=True)
    beyond = ordered.cumsum(-1) - ordered >= share
    return weights.scatter(1, order, ordered.masked_fill(beyond, 0.0))
