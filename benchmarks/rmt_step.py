"""Time and peak memory of a training step on a token tree against one with the prefix copied into every response.

``python benchmarks/rmt_step.py`` prints one JSON line per shape. Both steps carry the same two losses: the policy
gradient on the responses and next-token prediction on the document, for which the copies need a row of their own.
Copies run in micro-batches of 8 rows as long as the longest of them; the responses of one position fill whole
micro-batches. A step is forward, backward and optimizer, through the public training step. Beside the measured ratio
stand those of the tokens and of the arithmetic (matrix products, and attention to what each token sees): what the tree
saves if both steps are equally efficient. Peak memory is a step's, in a process of its own, beyond the model, its
gradients and its optimizer's states.
"""

from __future__ import annotations

import argparse
import random

import torch
from measuring import alternately, emit, peak_beyond, peak_mib, ratio

from nemo_rmt.config import Model, Optim, Parallel
from nemo_rmt.data.batch import TokenBatch
from nemo_rmt.data.tree import BRANCH_MASK, Branch, TokenTree, pack_trees
from nemo_rmt.megatron.head import TokenScores
from nemo_rmt.megatron.model import build_model
from nemo_rmt.megatron.runtime import distributed
from nemo_rmt.megatron.train_step import TrainedModel
from nemo_rmt.model_flops import forward_flops
from nemo_rmt.objectives import LossOutput, grpo_loss, ntp_loss
from nemo_rmt.recipe_io import load_recipe

VOCAB, MICRO_BATCH = 4096, 8
MODEL = Model(num_layers=4, hidden_size=256, ffn_hidden_size=768, qk_norm=True)
SHAPES = ["256,1,8,64", "256,4,8,32", "512,1,8,64", "512,4,8,32", "512,8,8,32", "1024,1,8,64", "1024,4,8,32"]
"""Trunk tokens, positions, responses per position, tokens per response."""
QUICK = "64,2,4,8"
VARIANTS = ("tree", "copies")


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


def seen(tree: TokenTree, variant: str) -> tuple[int, float]:
    """Tokens of a step, and the tokens that they attend to, added up; without padding."""
    trunk = len(tree.trunk)
    tokens, pairs = trunk, trunk * trunk / 2
    for branch in tree.branches:
        own, prefix = len(branch.tokens), branch.position
        tokens += own if variant == "tree" else prefix + own
        pairs += own * (prefix + own / 2) + (0 if variant == "tree" else prefix * prefix / 2)
    return tokens, pairs


def predicted(tree: TokenTree, model: Model) -> dict[str, float]:
    """How many times the copies take the tree's tokens, and its arithmetic."""
    flops, tokens = {}, {}
    for variant in VARIANTS:
        tokens[variant], pairs = seen(tree, variant)
        layers, head = forward_flops(model, VOCAB, pairs / tokens[variant])
        flops[variant] = tokens[variant] * (3 * layers + 4 * head)  # the head computes its logits again in backward
    return {
        "ratio_of_tokens": round(tokens["copies"] / tokens["tree"], 2),
        "ratio_of_flops": round(flops["copies"] / flops["tree"], 2),
    }


def model_of(options: argparse.Namespace) -> Model:
    """A recipe's model with its changes, or the small one."""
    return load_recipe(options.recipe, [], options.change).model if options.recipe else MODEL


def build(model: Model) -> TrainedModel:
    """The model of a world of one."""
    return TrainedModel(build_model(model, Parallel(), VOCAB), model, Parallel(), Optim(lr=1e-5), steps=1000)


def peak_of_a_step(variant: str, shape: str, earliest: float, model: Model) -> float:
    """MiB beyond the model, its gradients and its optimizer's states, which a first, tiny step creates."""
    tree = random_tree(shape, earliest)
    with distributed(Parallel(), seed=0):
        trained = build(model)
        tiny = TokenTree(tree.trunk[:2], [Branch(1, [1, 2], [0.0, 1.0], {"advantages": 1.0})])
        trained.train_step(micro_batches("tree", tiny), dual_loss)
        batches = micro_batches(variant, tree)
        return peak_beyond(lambda: trained.train_step(batches, dual_loss))


def compare(shape: str, options: argparse.Namespace) -> None:
    """One shape's line."""
    tree, model = random_tree(shape, options.earliest), model_of(options)
    with distributed(Parallel(), seed=0):
        trained = build(model)
        steps = {variant: micro_batches(variant, tree) for variant in VARIANTS}
        run = {name: lambda batches=batches: trained.train_step(batches, dual_loss) for name, batches in steps.items()}
        seconds = alternately(run, options.pairs)
    same = ["--shapes", shape, "--earliest", str(options.earliest)]
    same += ["--recipe", options.recipe, *(f"--change={change}" for change in options.change)] if options.recipe else []
    emit(
        "rmt_step",
        shape=shape,
        earliest=options.earliest,
        **ratio(seconds, over="copies", under="tree"),
        **predicted(tree, model),
        **{f"{name}_tokens": sum(batch.tokens.numel() for batch in batches) for name, batches in steps.items()},
        **{f"{name}_peak_mib": peak_mib(__file__, ["--peak", name, *same]) for name in VARIANTS},
    )


def main() -> None:
    """Compare every shape; or, in a process of its own, print the peak of one variant."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", nargs="+", default=SHAPES, help="trunk,positions,responses,length")
    parser.add_argument("--earliest", type=float, default=0.5, help="share of the document before any position")
    parser.add_argument("--recipe", help="take this recipe's model")
    parser.add_argument("--change", action="append", default=[], metavar="key=value", help="in the recipe")
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="the smallest shape of the small model, 2 pairs")
    parser.add_argument("--peak", choices=VARIANTS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.quick:
        options.shapes, options.pairs, options.recipe = [QUICK], 2, None
    for shape in options.shapes:
        if options.peak:
            print(peak_of_a_step(options.peak, shape, options.earliest, model_of(options)))
        else:
            compare(shape, options)


if __name__ == "__main__":
    main()
