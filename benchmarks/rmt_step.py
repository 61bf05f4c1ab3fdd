"""Time and peak memory of a training step on a token tree against one with the prefix copied into every response.

``python benchmarks/rmt_step.py`` prints one JSON line per shape. Both steps carry the same two losses: the policy
gradient on the responses and next-token prediction on the document, for which the copies need a row of their own.
Copies run in micro-batches of 8 rows as long as the longest of them; the responses of one position fill whole
micro-batches. A step is forward, backward and optimizer, through the public training step. Times are medians over
``--pairs``, both variants in turn in one process; peak memory is that of a step in a process of its own, beyond the
model, its gradients and its optimizer's states.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from nemo_rmt.config import Model, Optim, Parallel
from nemo_rmt.data.batch import TokenBatch
from nemo_rmt.data.tree import BRANCH_MASK, Branch, TokenTree, pack_trees
from nemo_rmt.megatron.head import TokenScores
from nemo_rmt.megatron.model import build_model
from nemo_rmt.megatron.runtime import distributed
from nemo_rmt.megatron.train_step import TrainedModel
from nemo_rmt.objectives import LossOutput, grpo_loss, ntp_loss

VOCAB, MICRO_BATCH = 4096, 8
MODEL = Model(num_layers=4, hidden_size=256, ffn_hidden_size=768, qk_norm=True)
SHAPES = ["512,4,8,32", "1024,1,8,64"]
"""Trunk tokens, positions, responses per position, tokens per response."""


def dual_loss(scores: TokenScores, batch: TokenBatch) -> LossOutput:
    """The policy gradient on the responses and next-token prediction on the document."""
    logprobs, extras = scores.logprobs, batch.extras
    rl = grpo_loss(logprobs, logprobs.detach(), extras["advantages"], extras[BRANCH_MASK])
    ntp = ntp_loss(logprobs, batch.loss_mask)
    return LossOutput(rl.loss_sum + 0.1 * ntp.loss_sum, rl.num_tokens + ntp.num_tokens, {"loss": rl.metrics["loss"]})


def random_tree(shape: str, earliest: float) -> TokenTree:
    """Random tokens; positions in the middle of equal parts of what follows the share ``earliest`` of the document."""
    trunk, positions, responses, length = map(int, shape.split(","))
    rng = random.Random(0)
    draw = lambda count: [rng.randrange(VOCAB) for _ in range(count)]  # noqa: E731
    mask = [0.0] + [1.0] * (length - 1)
    branches = []
    for index in range(positions):
        position = int(trunk * (earliest + (1 - earliest) * (index + 0.5) / positions))
        for _ in range(responses):
            branches.append(Branch(position, draw(length), mask, {"advantages": rng.gauss(0, 1)}))
    return TokenTree(draw(trunk), branches)


def copies(tree: TokenTree) -> list[TokenBatch]:
    """Micro-batches of responses with their prefix, and one of the document; each as wide as its longest row."""
    batches = []
    for start in range(0, len(tree.branches), MICRO_BATCH):
        part = tree.branches[start : start + MICRO_BATCH]
        rows = [([*tree.trunk[: b.position], *b.tokens], [0.0] * b.position + list(b.mask)) for b in part]
        batch = TokenBatch.from_examples(rows, 0, None)
        batch.extras[BRANCH_MASK], batch.loss_mask = batch.loss_mask, torch.zeros_like(batch.loss_mask)
        advantages = torch.tensor([b.extras["advantages"] for b in part])
        batch.extras["advantages"] = advantages[:, None] * batch.extras[BRANCH_MASK]
        batches.append(batch)
    document = TokenBatch.from_examples([(tree.trunk, [1.0] * len(tree.trunk))], 0, None)
    zeros = torch.zeros_like(document.loss_mask)
    document.extras.update({BRANCH_MASK: zeros, "advantages": zeros})
    return [*batches, document]


def micro_batches(variant: str, tree: TokenTree) -> list[TokenBatch]:
    """One step's, on the training device."""
    batches = [pack_trees([tree], None, pad=0)] if variant == "tree" else copies(tree)
    return [batch.to(torch.cuda.current_device()) for batch in batches]


def build() -> TrainedModel:
    """The model of a world of one."""
    return TrainedModel(build_model(MODEL, Parallel(), VOCAB), MODEL, Parallel(), Optim(lr=1e-5), steps=1000)


def timed(step: Callable[[], object]) -> float:
    """Seconds."""
    began = time.perf_counter()
    step()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - began


def resident_peak() -> float:
    """The peak so far in MiB, of the GPU's memory or the process's. Not getrusage: its peak outlives fork and exec."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) / 2**10


def peak_of_a_step(variant: str, shape: str, earliest: float) -> float:
    """MiB beyond the model, its gradients and its optimizer's states, which a first, tiny step creates."""
    tree = random_tree(shape, earliest)
    with distributed(Parallel(), seed=0):
        model = build()
        tiny = TokenTree(tree.trunk[:2], [Branch(1, [1, 2], [0.0, 1.0], {"advantages": 1.0})])
        model.train_step(micro_batches("tree", tiny), dual_loss)
        before = resident_peak()
        model.train_step(micro_batches(variant, tree), dual_loss)
        return resident_peak() - before


def compare(shape: str, earliest: float, pairs: int) -> dict[str, object]:
    """One shape's line."""
    tree = random_tree(shape, earliest)
    line: dict[str, object] = {"benchmark": "rmt_step", "trunk,positions,responses,length": shape}
    line["positions"] = sorted({branch.position for branch in tree.branches})
    seconds: dict[str, list[float]] = {"tree": [], "copies": []}
    with distributed(Parallel(), seed=0):
        model = build()
        steps = {variant: micro_batches(variant, tree) for variant in seconds}
        for variant, batches in steps.items():
            line[f"{variant}_tokens"] = sum(batch.tokens.numel() for batch in batches)
            model.train_step(batches, dual_loss)
        for _ in range(pairs):
            for variant, batches in steps.items():
                seconds[variant].append(timed(lambda batches=batches: model.train_step(batches, dual_loss)))
    return measured(line, seconds, __file__, shape, earliest)


def measured(
    line: dict[str, object], seconds: dict[str, list[float]], script: str, shape: str, earliest: float
) -> dict[str, object]:
    """Complete a line: medians, the second variant over the first pair by pair, peaks in processes of their own."""
    for variant, values in seconds.items():
        line[f"{variant}_seconds"] = round(statistics.median(values), 4)
    ratios = [copied / shared for shared, copied in zip(*seconds.values(), strict=True)]
    line["ratio"], line["ratios"] = round(statistics.median(ratios), 2), [round(ratio, 2) for ratio in ratios]
    for variant in seconds:
        command = [sys.executable, script, "--variant", variant, "--shapes", shape, "--earliest", str(earliest)]
        quiet = {**os.environ, "PYTHONWARNINGS": "ignore"}
        output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=quiet)
        line[f"{variant}_peak_mib"] = round(float(output.stdout.splitlines()[-1]))
    line["threads"], line["device"] = torch.get_num_threads(), "cuda" if torch.cuda.is_available() else "cpu"
    return line


def main(description: str, variants: Sequence[str], shapes: Sequence[str], compare: Callable, peak: Callable) -> None:
    """Compare every shape; or, in a process of its own, print the peak of one variant."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--shapes", nargs="+", default=shapes, help="trunk,positions,responses,length")
    parser.add_argument("--earliest", type=float, default=0.5, help="share of the document before any position")
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--variant", choices=variants, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.variant:
        print(peak(options.variant, options.shapes[0], options.earliest))
        return
    for shape in options.shapes:
        print(json.dumps(compare(shape, options.earliest, options.pairs)), flush=True)


if __name__ == "__main__":
    main(__doc__.splitlines()[0], ("tree", "copies"), SHAPES, compare, peak_of_a_step)
