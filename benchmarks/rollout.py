"""Time and peak memory of sampling with the documents' prefixes shared against one prefill per response.

``python benchmarks/rollout.py`` prints one JSON line per shape. Both variants sample the same responses through
InProcessEngine, all of a shape in one batch: ``trunk`` with generate_branches, ``copies`` with generate on the document
up to the position, copied in front of every prompt. Nothing ends a response early. Times are medians over ``--pairs``,
both variants in turn in one process; peak memory is that of sampling in a process of its own, beyond the model.
"""

from __future__ import annotations

import random

from rmt_step import MODEL, VOCAB, main, measured, random_tree, resident_peak, timed

from nemo_rmt.config import Parallel
from nemo_rmt.megatron.model import build_model
from nemo_rmt.megatron.runtime import distributed
from nemo_rmt.rollout.engine import BranchPrompt, Rollout, Sampling
from nemo_rmt.rollout.in_process import InProcessEngine

PROMPT = 16
"""Tokens of the instruction before each response."""
SHAPES = ["512,4,8,32"]
"""Trunk tokens, positions, responses per position, tokens per response."""
VARIANTS = ("trunk", "copies")


def sample(variant: str, shape: str, earliest: float, engine: InProcessEngine) -> list[Rollout]:
    """All responses of a shape."""
    tree = random_tree(shape, earliest)
    instruction = random.Random(1).choices(range(VOCAB), k=PROMPT)
    sampling = Sampling(max_new_tokens=len(tree.branches[0].tokens), stop_tokens=frozenset(), seed=0)
    sample_ids = list(range(len(tree.branches)))
    if variant == "trunk":
        prompts = [BranchPrompt(0, branch.position, instruction) for branch in tree.branches]
        return engine.generate_branches([tree.trunk], prompts, sample_ids, sampling)
    return engine.generate([tree.trunk[: b.position] + instruction for b in tree.branches], sample_ids, sampling)


def build(shape: str) -> InProcessEngine:
    """An engine whose batch holds the whole shape, in a world of one."""
    return InProcessEngine(build_model(MODEL, Parallel(), VOCAB), len(random_tree(shape, 0).branches))


def peak_of_sampling(variant: str, shape: str, earliest: float) -> float:
    """MiB beyond the model and what a first, tiny call loads."""
    with distributed(Parallel(), seed=0):
        engine = build(shape)
        sample(variant, "4,1,1,2", 0, engine)
        before = resident_peak()
        sample(variant, shape, earliest, engine)
        return resident_peak() - before


def compare(shape: str, earliest: float, pairs: int) -> dict[str, object]:
    """One shape's line."""
    line: dict[str, object] = {"benchmark": "rollout", "trunk,positions,responses,length": shape, "prompt": PROMPT}
    line["positions"] = sorted({branch.position for branch in random_tree(shape, earliest).branches})
    seconds: dict[str, list[float]] = {variant: [] for variant in VARIANTS}
    with distributed(Parallel(), seed=0):
        engine = build(shape)
        first, second = ([r.response for r in sample(variant, shape, earliest, engine)] for variant in VARIANTS)
        line["same_responses"] = first == second
        for _ in range(pairs):
            for variant, values in seconds.items():
                values.append(timed(lambda variant=variant: sample(variant, shape, earliest, engine)))
    return measured(line, seconds, __file__, shape, earliest)


if __name__ == "__main__":
    main(__doc__.splitlines()[0], VARIANTS, SHAPES, compare, peak_of_sampling)
