"""Time and peak memory of sampling in process, with shared prefixes of documents and with shared prompts.

``python benchmarks/rollout.py`` prints two JSON lines per shape. All variants sample as many responses of one length
through InProcessEngine, all of a shape in one batch; nothing ends a response early:

* ``trunk``: generate_branches, each document computed once;
* ``copies``: generate on the document up to the position with the instruction behind it, once for each position;
* ``distinct``: the same with another instruction for each response, so that every response has a prompt of its own.

``copies`` over ``trunk`` is what a shared document saves, the same responses sampled; ``distinct`` over ``copies`` what
shared prompts save. Peak memory is that of sampling in a process of its own, beyond the model.
"""

from __future__ import annotations

import argparse
import random

from measuring import alternately, emit, peak_beyond, peak_mib, ratio
from rmt_step import MODEL, VOCAB, random_tree

from nemo_rmt.config import Parallel
from nemo_rmt.megatron.model import build_model
from nemo_rmt.megatron.runtime import distributed
from nemo_rmt.rollout.engine import BranchPrompt, Rollout, Sampling
from nemo_rmt.rollout.in_process import InProcessEngine

PROMPT = 16
"""Tokens of the instruction before each response."""
SHAPES, QUICK = ["512,4,8,32"], "64,2,4,8"
"""Trunk tokens, positions, responses per position, tokens per response."""
VARIANTS = ("trunk", "copies", "distinct")


def sample(variant: str, shape: str, earliest: float, engine: InProcessEngine) -> list[Rollout]:
    """All responses of a shape."""
    tree = random_tree(shape, earliest)
    sampling = Sampling(max_new_tokens=len(tree.branches[0].tokens), stop_tokens=frozenset(), seed=0)
    sample_ids = list(range(len(tree.branches)))
    seeds = sample_ids if variant == "distinct" else [0] * len(sample_ids)
    instructions = [random.Random(seed).choices(range(VOCAB), k=PROMPT) for seed in seeds]
    pairs = list(zip(tree.branches, instructions, strict=True))
    if variant == "trunk":
        prompts = [BranchPrompt(0, branch.position, instruction) for branch, instruction in pairs]
        return engine.generate_branches([tree.trunk], prompts, sample_ids, sampling)
    copied = [tree.trunk[: branch.position] + instruction for branch, instruction in pairs]
    return engine.generate(copied, sample_ids, sampling)


def build(shape: str) -> InProcessEngine:
    """An engine whose batch holds the whole shape, in a world of one."""
    return InProcessEngine(build_model(MODEL, Parallel(), VOCAB), len(random_tree(shape, 0).branches))


def peak_of_sampling(variant: str, shape: str, earliest: float) -> float:
    """MiB beyond the model and what a first, tiny call loads."""
    with distributed(Parallel(), seed=0):
        engine = build(shape)
        sample(variant, "4,1,1,2", 0, engine)
        return peak_beyond(lambda: sample(variant, shape, earliest, engine))


def compare(shape: str, options: argparse.Namespace) -> None:
    """One shape's lines."""
    earliest = options.earliest
    with distributed(Parallel(), seed=0):
        engine = build(shape)
        run = {variant: lambda variant=variant: sample(variant, shape, earliest, engine) for variant in VARIANTS}
        shared, copied = ([rollout.response for rollout in run[variant]()] for variant in ("trunk", "copies"))
        seconds = alternately(run, options.pairs)
    peaks = {v: peak_mib(__file__, ["--peak", v, "--shapes", shape, "--earliest", str(earliest)]) for v in VARIANTS}
    for over, under in (("copies", "trunk"), ("distinct", "copies")):
        emit(
            "rollout",
            shape=shape,
            earliest=earliest,
            prompt=PROMPT,
            compared=f"{over}/{under}",
            **ratio(seconds, over=over, under=under),
            **{f"{variant}_peak_mib": peaks[variant] for variant in (over, under)},
            **({"same_responses": shared == copied} if under == "trunk" else {}),
        )


def main() -> None:
    """Compare every shape; or, in a process of its own, print the peak of one variant."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", nargs="+", default=SHAPES, help="trunk,positions,responses,length")
    parser.add_argument("--earliest", type=float, default=0.5, help="share of the document before any position")
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="the smallest shape, 2 pairs")
    parser.add_argument("--peak", choices=VARIANTS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.quick:
        options.shapes, options.pairs = [QUICK], 2
    for shape in options.shapes:
        if options.peak:
            print(peak_of_sampling(options.peak, shape, options.earliest))
        else:
            compare(shape, options)


if __name__ == "__main__":
    main()
