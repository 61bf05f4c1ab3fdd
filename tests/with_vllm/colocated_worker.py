"""Two training ranks with vLLM inside, before and after an update of the weights.

usage: colocated_worker.py RECIPE (as JSON) FOLDER
"""

from __future__ import annotations

import sys
from pathlib import Path

from colocated_model import MARKER, STOPS, build, prompts, require_same, running

from nemo_rmt.config import Recipe
from nemo_rmt.megatron.runtime import distributed
from nemo_rmt.rollout.engine import Sampling
from nemo_rmt.rollout.in_process import InProcessEngine

SAMPLING = Sampling(12, STOPS, seed=3, temperature=0.0, marker=MARKER, after_marker=3)


def main(settings: Recipe, folder: Path) -> None:
    done = 4
    with distributed(settings.parallel, seed=5) as layout:
        chunks = build(settings)
        asked = prompts(8 + 3 * layout.data_rank, seed=layout.data_rank)
        ids = list(range(len(asked)))
        in_process = InProcessEngine(chunks, 64, version=lambda: done)
        with running(settings, layout, chunks, folder, version=lambda: done) as engine:
            first = engine.generate(asked, ids, SAMPLING)
            require_same(first, in_process.generate(asked, ids, SAMPLING))
            for parameter in chunks[0].parameters():
                parameter.data *= 1.3
            done = 5
            engine.update_weights()
            second = engine.generate(asked, ids, SAMPLING)
            require_same(second, in_process.generate(asked, ids, SAMPLING))
            assert first != second and {rollout.version for rollout in second} == {5}
    print("sampled alike", flush=True)


if __name__ == "__main__":
    main(Recipe.model_validate_json(sys.argv[1]), Path(sys.argv[2]))
