"""Assert on every tensor-parallel rank that the chunked head equals log_softmax of the full logits.

usage: head_worker.py TENSOR_PARALLEL [sequence_parallel]
"""

from __future__ import annotations

import sys
from unittest import mock

import torch
import torch.distributed as dist

from nemo_rmt.config import Parallel
from nemo_rmt.megatron import head
from nemo_rmt.megatron.head import token_scores
from nemo_rmt.megatron.runtime import distributed

SEQUENCE, BATCH, WIDTH, PADDED = 12, 3, 16, 384
VOCABULARIES = (301, 150)
"""On two ranks the padding leaves the second part of its shard, or none of it."""


def independent(hidden, weight, labels, vocab_size, temperature):
    """Log-probability, entropy and argmax hit from full float64 logits over the true vocabulary."""
    logits = torch.einsum("sbh,vh->bsv", hidden.double(), weight[:vocab_size].double())
    logits = logits / (temperature if isinstance(temperature, float) else temperature[:, :, None])
    logprobs = torch.log_softmax(logits, dim=-1)
    entropy = -(logprobs.exp() * logprobs).sum(-1)
    return logprobs.gather(2, labels[:, :, None])[:, :, 0], entropy, (logits.argmax(-1) == labels).float()


def check(layout, sequence_parallel: bool, vocab_size: int, temperature: float | None, chunk: int | None) -> None:
    """Values and both gradients, for random upstream gradients of log-probabilities and entropies.

    temperature: None is another one for every token.
    """
    generator = torch.Generator().manual_seed(3)
    if temperature is None:
        temperature = 0.5 + torch.rand(BATCH, SEQUENCE, generator=generator)
    hidden = torch.randn(SEQUENCE, BATCH, WIDTH, generator=generator)
    weight = torch.randn(PADDED, WIDTH, generator=generator)
    labels = torch.randint(0, vocab_size, (BATCH, SEQUENCE), generator=generator)
    labels[0] = torch.einsum("sh,vh->sv", hidden[:, 0], weight[:vocab_size]).argmax(-1)  # so that some labels are hits
    upstream = torch.randn(2, BATCH, SEQUENCE, generator=generator)

    full_hidden, full_weight = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    expected = independent(full_hidden, full_weight, labels, vocab_size, temperature)
    (upstream[0] * expected[0] + upstream[1] * expected[1]).sum().backward()

    rank, size = layout.tensor_rank, layout.tensor_size
    rows, part = slice(rank * PADDED // size, (rank + 1) * PADDED // size), slice(None)
    if sequence_parallel:
        part = slice(rank * SEQUENCE // size, (rank + 1) * SEQUENCE // size)
    ours_hidden, ours_weight = hidden[part].clone().requires_grad_(), weight[rows].clone().requires_grad_()
    scores = token_scores(
        ours_hidden,
        ours_weight,
        labels,
        vocab_size=vocab_size,
        temperature=temperature,
        with_entropy=True,
        chunk=chunk,
        sequence_parallel=sequence_parallel,
    )
    (upstream[0] * scores.logprobs + upstream[1] * scores.entropy).sum().backward()
    close = {"rtol": 1e-5, "atol": 1e-5}
    for ours, theirs in zip(scores[:3], expected, strict=True):
        torch.testing.assert_close(ours, theirs.float(), **close)
    assert scores.hits[0].min() == 1 and scores.hits.mean() < 1
    torch.testing.assert_close(ours_hidden.grad, full_hidden.grad[part], **close)
    torch.testing.assert_close(ours_weight.grad, full_weight.grad[rows], **close)
    settings = {"vocab_size": vocab_size, "temperature": temperature, "sequence_parallel": sequence_parallel}
    with mock.patch.object(head, "LOGITS_AT_ONCE", 1000):  # a default of several chunks
        plain = token_scores(ours_hidden, ours_weight, labels, **settings)
    torch.testing.assert_close(plain.logprobs, scores.logprobs, **close)


if __name__ == "__main__":
    tensor, sequence_parallel = int(sys.argv[1]), len(sys.argv) > 2
    with distributed(Parallel(tensor=tensor), seed=0) as layout:
        for vocab_size in VOCABULARIES:
            for temperature in (1.0, 0.7, None):
                for chunk in (None, 5, 1):
                    check(layout, sequence_parallel, vocab_size, temperature, chunk)
        dist.barrier()
