"""Distill in these ranks: the head's divergence against full logits, then steps of training from the same weights.

usage: distillation_worker.py RECIPE (as JSON) POLICY TEACHER (folders of weights) OUT.json
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))

from tiny_model import VOCAB, random_batch

from nemo_rmt.config import Optim, Recipe
from nemo_rmt.data.batch import TokenBatch
from nemo_rmt.megatron.checkpoint import load_weights
from nemo_rmt.megatron.distillation import HiddenTeacher, LikeliestTokens
from nemo_rmt.megatron.head import TokenScores, token_scores
from nemo_rmt.megatron.model import LogprobGPT, build_model
from nemo_rmt.megatron.runtime import Layout, distributed
from nemo_rmt.megatron.train_step import FrozenModel, TrainedModel
from nemo_rmt.objectives import LossOutput, distill_loss

SEQUENCE, BATCH, WIDTH, TEACHER_WIDTH, PADDED = 12, 3, 16, 8, 384
VOCABULARIES = (301, 150)
"""On two ranks the padding leaves the second part of its shard, or none of it."""
STEPS, LIKELIEST = 3, 7
CLOSE = {"rtol": 1e-5, "atol": 1e-5}


def heads_order(values: Tensor) -> Tensor:
    """``[batch, sequence, ...]`` to ``[tokens, ...]`` as the head has them."""
    return values.transpose(0, 1).flatten(0, 1)


def exact_divergence(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(p ‖ q) of whole distributions."""
    return F.kl_div(log_q, log_p, log_target=True, reduction="none").sum(-1)


def bound(tokens: Tensor, logprobs: Tensor, log_q: Tensor) -> Tensor:
    """KL of the distributions over these tokens and one bucket for all others."""
    known, others = log_q.gather(-1, tokens), log_q.scatter(-1, tokens, -torch.inf).logsumexp(-1)
    rest = 1 - logprobs.exp().sum(-1)
    return (logprobs.exp() * (logprobs - known)).sum(-1) + torch.xlogy(rest, rest) - rest * others


def check_head(layout: Layout, sequence_parallel: bool, vocab_size: int, chunk: int | None, likeliest: int) -> None:
    """Values and gradients for random upstream gradients of log-probabilities, entropies and divergences.

    likeliest: of the teacher's tokens are known; 0 for its hidden states.
    """
    generator = torch.Generator().manual_seed(3)
    normal = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    hidden, weight = normal(SEQUENCE, BATCH, WIDTH), normal(PADDED, WIDTH)
    teacher_hidden, teacher_weight = normal(SEQUENCE, BATCH, TEACHER_WIDTH), normal(PADDED, TEACHER_WIDTH)
    labels = torch.randint(0, vocab_size, (BATCH, SEQUENCE), generator=generator)
    temperature, upstream = 0.5 + torch.rand(BATCH, SEQUENCE, generator=generator), normal(3, BATCH, SEQUENCE)

    full_hidden, full_weight = (tensor.double().requires_grad_() for tensor in (hidden, weight))
    logits = torch.einsum("sbh,vh->bsv", full_hidden, full_weight[:vocab_size]) / temperature[:, :, None]
    log_q = logits.log_softmax(-1)
    log_p = torch.einsum("sbh,vh->bsv", teacher_hidden.double(), teacher_weight[:vocab_size].double()).log_softmax(-1)
    known, tokens = log_p.topk(likeliest)
    partly = 0 < likeliest < vocab_size
    divergence = bound(tokens, known, log_q) if partly else exact_divergence(log_p, log_q)
    logprobs, entropy = log_q.gather(2, labels[:, :, None])[:, :, 0], -(log_q.exp() * log_q).sum(-1)
    (upstream * torch.stack([logprobs, entropy, divergence])).sum().backward()

    rank, size = layout.tensor_rank, layout.tensor_size
    rows, part = slice(rank * PADDED // size, (rank + 1) * PADDED // size), slice(None)
    if sequence_parallel:
        part = slice(rank * SEQUENCE // size, (rank + 1) * SEQUENCE // size)
    if likeliest:
        teacher = LikeliestTokens(heads_order(tokens), heads_order(known.float()))
    else:
        teacher = HiddenTeacher(teacher_hidden.flatten(0, 1), teacher_weight[rows])
    ours_hidden, ours_weight = hidden[part].clone().requires_grad_(), weight[rows].clone().requires_grad_()
    settings = {"vocab_size": vocab_size, "temperature": temperature, "sequence_parallel": sequence_parallel}
    settings |= {"with_entropy": True, "chunk": chunk}
    scores = token_scores(ours_hidden, ours_weight, labels, teacher=teacher, top_k=LIKELIEST, **settings)
    (upstream * torch.stack([scores.logprobs, scores.entropy, scores.divergence])).sum().backward()
    torch.testing.assert_close(scores.divergence, divergence.float(), **CLOSE)
    torch.testing.assert_close(ours_hidden.grad, full_hidden.grad[part].float(), **CLOSE)
    torch.testing.assert_close(ours_weight.grad, full_weight.grad[rows].float(), **CLOSE)

    expected = log_q.topk(LIKELIEST)
    assert torch.equal(scores.top_tokens, expected.indices)
    torch.testing.assert_close(scores.top_logprobs, expected.values.float(), **CLOSE)
    plain = token_scores(ours_hidden, ours_weight, labels, **settings)
    for name in ("logprobs", "entropy", "hits"):
        assert torch.equal(getattr(plain, name), getattr(scores, name)), name
    assert plain[3:] == (None, None, None)


def check_ties(layout: Layout) -> None:
    """Equal logits, on both sides of where the vocabulary is divided, come in the order of their tokens."""
    weight = torch.tensor([0.0, 3.0, -1.0])[torch.arange(PADDED) % 3, None].expand(PADDED, WIDTH) / WIDTH
    rows = PADDED // layout.tensor_size
    own = weight[layout.tensor_rank * rows :][:rows].contiguous()
    hidden, labels = torch.tensor([1.0, -1.0])[:, None, None].expand(2, 1, WIDTH), torch.zeros(1, 2, dtype=torch.int64)
    found = token_scores(hidden, own, labels, vocab_size=301, top_k=250).top_tokens[0].tolist()
    values = [[0, 3, -1][token % 3] for token in range(301)]
    assert found[0] == sorted(range(301), key=lambda token: (-values[token], token))[:250]
    assert found[1] == sorted(range(301), key=lambda token: (values[token], token))[:250]


def distilled(scores: TokenScores, batch: TokenBatch) -> LossOutput:
    return distill_loss(scores.logprobs, scores.divergence, batch.loss_mask, coefficient=0.7)


def loaded(recipe: Recipe, weights: Path) -> list[LogprobGPT]:
    chunks = build_model(recipe.model, recipe.parallel, VOCAB)
    load_weights(weights, chunks)
    return chunks


def steps(recipe: Recipe, policy: Path, teacher: Path) -> dict[str, list[dict[str, float]]]:
    """The metrics of some steps, by what is known of the teacher."""
    found = {}
    frozen = FrozenModel(loaded(recipe, teacher), recipe.parallel)
    for kind in ("hidden states", "likeliest tokens"):
        model = TrainedModel(loaded(recipe, policy), recipe.model, recipe.parallel, Optim(lr=1e-2), STEPS)
        found[kind] = []
        for step in range(STEPS):
            batch = random_batch(4, seed=step)
            if kind == "hidden states" and (states := frozen.hidden_states(batch, 2)) is not None:
                assert states.shape == (4, 24, recipe.model.hidden_size)
                batch.extras["teacher_hidden"] = states
            if kind == "likeliest tokens" and (scores := frozen.score(batch, 2, top_k=LIKELIEST)) is not None:
                batch.extras |= {"teacher_tokens": scores.top_tokens, "teacher_logprobs": scores.top_logprobs}
            metrics = model.train_step(batch.micro_batches(2), distilled, teacher_weight=frozen.output_weight)
            found[kind].append(metrics)
    return found


def main(recipe: Recipe, policy: Path, teacher: Path, out: Path) -> None:
    with distributed(recipe.parallel, seed=5) as layout:
        if layout.tensor_size > 1:
            check_ties(layout)
            for sequence_parallel in (False, True):
                for vocab_size in VOCABULARIES:
                    for likeliest in (0, LIKELIEST, vocab_size):
                        check_head(layout, sequence_parallel, vocab_size, 5, likeliest)
        found = steps(recipe, policy, teacher)
        if layout.rank == 0:
            out.write_text(json.dumps(found))


if __name__ == "__main__":
    main(Recipe.model_validate_json(sys.argv[1]), *map(Path, sys.argv[2:]))
