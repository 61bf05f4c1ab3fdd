"""Sample responses that follow prefixes of documents in these ranks, and those to the same prefixes copied.

usage: shared_trunk_worker.py RECIPE (as JSON) WEIGHTS (a folder) OUT.json
"""

from __future__ import annotations

import json
import random
import sys
from dataclasses import asdict
from pathlib import Path

import torch.distributed as dist

from nemo_rmt.config import Recipe
from nemo_rmt.megatron.checkpoint import load_weights
from nemo_rmt.megatron.model import build_model
from nemo_rmt.megatron.runtime import distributed
from nemo_rmt.rollout.engine import BranchPrompt, Rollout, Sampling
from nemo_rmt.rollout.in_process import InProcessEngine

VOCAB, MARKER, STOPS = 40, 17, frozenset({0, 9})
"""Few tokens: with more, a random number comes near enough to a bound between two that rounding decides."""
FORKS = {
    40: {0: 1, 7: 3, 25: 2, 40: 2},
    9: {9: 2, 5: 1},
    25: {12: 7},
    33: {0: 1},
    17: {1: 1, 16: 2},
}
"""Of documents by length: the responses at each position."""
SAMPLING = Sampling(16, STOPS, seed=3, marker=MARKER, after_marker=4)


def branches() -> tuple[list[list[int]], list[BranchPrompt]]:
    """Documents of random tokens and prompts of 1 to 6 tokens, the documents' in turn."""
    rng = random.Random(0)
    draw = lambda count: [rng.randrange(VOCAB) for _ in range(count)]  # noqa: E731
    documents = [draw(length) for length in FORKS]
    prompts = [
        BranchPrompt(index, position, draw(rng.randrange(1, 7)))
        for index, forks in enumerate(FORKS.values())
        for position, responses in forks.items()
        for _ in range(responses)
    ]
    rng.shuffle(prompts)
    return documents, prompts


def sample_branches(engine: InProcessEngine, sampling: Sampling = SAMPLING) -> list[Rollout]:
    """One response to each branch prompt."""
    documents, prompts = branches()
    return engine.generate_branches(documents, prompts, list(range(len(prompts))), sampling)


def sample_copies(engine: InProcessEngine, sampling: Sampling = SAMPLING) -> list[Rollout]:
    """The same with the prefixes copied."""
    documents, prompts = branches()
    copied = [documents[prompt.document][: prompt.position] + prompt.tokens for prompt in prompts]
    return engine.generate(copied, list(range(len(prompts))), sampling)


def main(recipe: Recipe, weights: Path, out: Path) -> None:
    """Every rank must have sampled the same."""
    with distributed(recipe.parallel, seed=5):
        chunks = build_model(recipe.model, recipe.parallel, VOCAB)
        load_weights(weights, chunks)
        engine = InProcessEngine(chunks, 8)
        sampled = [
            [asdict(rollout) for rollout in rollouts] for rollouts in (sample_branches(engine), sample_copies(engine))
        ]
        everywhere = [None] * dist.get_world_size()
        dist.all_gather_object(everywhere, sampled)
        assert all(other == sampled for other in everywhere)
        if dist.get_rank() == 0:
            out.write_text(json.dumps(sampled))


if __name__ == "__main__":
    main(Recipe.model_validate_json(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3]))
