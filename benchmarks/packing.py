"""Time of a training step on packed rows against one on padded rows, for SFT and for RL.

``python benchmarks/packing.py`` prints one JSON line per shape. SFT: conversations of lognormal lengths, each padded to
the longest, against several in a row. RL: a prompt with each of its responses in a row of its own, against the prompt
as a trunk and the responses as its branches. Both train on the same tokens, in micro-batches of about as many; a step
is forward, backward and optimizer, through the public training step, and making the rows.

``predicted_by_tokens`` is padded over packed positions, padding included: what a step would save if all of them cost
the same. ``predicted_by_flops`` counts attention too: in padded rows of every position to all before it, in packed rows
of every token to those it sees.
"""

from __future__ import annotations

import argparse
import random

import torch
from measuring import alternately, emit, ratio

from nemo_rmt.config import Model, Optim, Parallel
from nemo_rmt.data.batch import TokenBatch
from nemo_rmt.data.packing import first_fit_decreasing, training_cost
from nemo_rmt.data.tree import BRANCH_MASK, Branch, TokenTree, pack_trees, split_tree
from nemo_rmt.megatron.head import TokenScores
from nemo_rmt.megatron.model import build_model
from nemo_rmt.megatron.runtime import distributed
from nemo_rmt.megatron.train_step import TrainedModel
from nemo_rmt.objectives import LossOutput, grpo_loss, ntp_loss

VOCAB, AT_ONCE = 4096, 2048  # tokens of a micro-batch
MODEL = Model(num_layers=4, hidden_size=256, ffn_hidden_size=768, qk_norm=True)
CONVERSATIONS, MEDIAN, SIGMA, LONGEST = 32, 96, 0.8, 512
PROMPTS, RESPONSES, RESPONSE = 8, 8, 32
EXAMPLE = tuple[list[int], list[float]]


def draw(rng: random.Random, count: int) -> list[int]:
    """Random tokens."""
    return [rng.randrange(VOCAB) for _ in range(count)]


def sft_trees(count: int, seed: int) -> tuple[list[TokenTree], list[EXAMPLE]]:
    """Conversations of lognormal lengths, as trees and as examples."""
    rng = random.Random(seed)
    sizes = [min(LONGEST, max(4, round(MEDIAN * rng.lognormvariate(0, SIGMA)))) for _ in range(count)]
    examples = [(draw(rng, size), [0.0] * (size // 2) + [1.0] * (size - size // 2)) for size in sizes]
    return [TokenTree(tokens, [], mask) for tokens, mask in examples], examples


def rl_trees(prompts: int, length: int, seed: int) -> tuple[list[TokenTree], list[EXAMPLE]]:
    """Groups of responses of one length to prompts of one length, as trees and as examples."""
    rng = random.Random(seed)
    trees, examples = [], []
    for _ in range(prompts):
        prompt, branches = draw(rng, length), []
        for _ in range(RESPONSES):
            response = draw(rng, RESPONSE)
            branches.append(Branch(length - 1, [prompt[-1], *response], [0.0] + [1.0] * RESPONSE, {"advantages": 1.0}))
            examples.append(([*prompt, *response], [0.0] * length + [1.0] * RESPONSE))
        trees.append(TokenTree(prompt[:-1], branches, [0.0] * (length - 1)))
    return trees, examples


def packed(trees: list[TokenTree], row: int) -> list[TokenBatch]:
    """Micro-batches of rows of at most ``row`` tokens."""
    pieces = [piece for tree in trees for piece in split_tree(tree, row)]
    rows = len(first_fit_decreasing([len(piece) for piece in pieces], row))
    count = -(-rows * row // AT_ONCE)
    size = -(-rows // count)
    batch = pack_trees(pieces, row, 0, rows=count * size).narrowed(8)
    return batch.to(torch.cuda.current_device()).micro_batches(size)


def padded(examples: list[EXAMPLE], in_branches: bool) -> list[TokenBatch]:
    """Micro-batches of rows of one example, as wide as the longest of all."""
    width = max(len(tokens) for tokens, _ in examples) - 1
    size = max(count for count in range(1, AT_ONCE // width + 1) if len(examples) % count == 0)
    batch = TokenBatch.from_examples(examples, 0, None, 8)
    if in_branches:
        batch.extras = {BRANCH_MASK: batch.loss_mask, "advantages": batch.loss_mask}
    return batch.to(torch.cuda.current_device()).micro_batches(size)


def policy_gradient(scores: TokenScores, batch: TokenBatch) -> LossOutput:
    """GRPO, strictly on-policy."""
    logprobs, extras = scores.logprobs, batch.extras
    return grpo_loss(logprobs, logprobs.detach(), extras["advantages"], extras[BRANCH_MASK])


def next_token(scores: TokenScores, batch: TokenBatch) -> LossOutput:
    """Cross-entropy."""
    return ntp_loss(scores.logprobs, batch.loss_mask)


def compare(kind: str, shape: dict[str, int], trees: list[TokenTree], examples: list[EXAMPLE], pairs: int) -> None:
    """Print one shape's line."""
    rl, row = kind == "rl", max(LONGEST, max(len(tokens) for tokens, _ in examples))
    objective = policy_gradient if rl else next_token
    with distributed(Parallel(), seed=0):
        model = TrainedModel(build_model(MODEL, Parallel(), VOCAB), MODEL, Parallel(), Optim(lr=1e-5), steps=1000)
        rows = {"padded": lambda: padded(examples, rl), "packed": lambda: packed(trees, row)}
        seconds = alternately(
            {name: lambda make=make: model.train_step(make(), objective) for name, make in rows.items()}, pairs
        )
        shapes = {name: [batch.tokens.shape for batch in make()] for name, make in rows.items()}
    positions = {name: sum(count * width for count, width in found) for name, found in shapes.items()}
    pairs_seen = {
        "padded": sum(count * width * (width + 1) // 2 for count, width in shapes["padded"]),
        "packed": sum(tree.attended for tree in trees),
    }
    flops = {name: training_cost(MODEL, VOCAB, positions[name], pairs_seen[name]) for name in rows}
    emit(
        "packing",
        kind=kind,
        **shape,
        **{f"{name}_positions": count for name, count in positions.items()},
        needed_positions=sum(len(tree) for tree in trees),
        **ratio(seconds, "padded", "packed"),
        predicted_by_tokens=round(positions["padded"] / positions["packed"], 3),
        predicted_by_flops=round(flops["padded"] / flops["packed"], 3),
    )


def main() -> None:
    """Print every shape's line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0, help="of the lengths and tokens")
    parser.add_argument("--quick", action="store_true", help="small shapes, 2 pairs")
    options = parser.parse_args()
    pairs = 2 if options.quick else options.pairs
    conversations, prompts, lengths = (16, 2, (12,)) if options.quick else (CONVERSATIONS, PROMPTS, (12, 256))
    compare("sft", {"conversations": conversations}, *sft_trees(conversations, options.seed), pairs)
    for length in lengths:
        shape = {"prompts": prompts, "prompt": length, "responses": RESPONSES, "response": RESPONSE}
        compare("rl", shape, *rl_trees(prompts, length, options.seed), pairs)


if __name__ == "__main__":
    main()
