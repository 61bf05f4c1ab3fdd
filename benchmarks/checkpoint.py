"""How long training stands still for a checkpoint that is written at once, against one written in the background.

``python benchmarks/checkpoint.py`` prints one JSON line. The stall of a save is the time inside Checkpoints.save, and,
in the background, inside the polls between the steps that follow until the checkpoint is complete. ``ratio`` is the
stall of the former over that of the latter. The background writer needs a core too: ``step_ratio`` is a step's time
while it writes over a step's alone.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from pathlib import Path

import torch
from measuring import emit, ratio, timed

from nemo_rmt.config import Model, Optim, Parallel
from nemo_rmt.data.batch import TokenBatch
from nemo_rmt.megatron.checkpoint import Checkpoints
from nemo_rmt.megatron.model import build_model
from nemo_rmt.megatron.runtime import distributed
from nemo_rmt.megatron.train_step import TrainedModel
from nemo_rmt.stages.pretrain import next_token

MODEL = Model(
    num_layers=8, hidden_size=512, num_attention_heads=8, num_query_groups=4, ffn_hidden_size=1536, qk_norm=True
)
QUICK = Model(num_layers=2)
VOCAB, SEQUENCE = 8192, 128


class Loop:
    """A training loop of one row a step."""

    def __init__(self, model: Model):
        chunks = build_model(model, Parallel(), VOCAB)
        self.trained = TrainedModel(chunks, model, Parallel(), Optim(lr=1e-5), steps=10_000)
        tokens = torch.randint(VOCAB, (1, SEQUENCE + 1), device=torch.cuda.current_device())
        self.batch = TokenBatch.from_documents(tokens, eod=0, document_attention=True)
        self.saved = 0

    @property
    def parameters(self) -> int:
        """Of the model."""
        return sum(parameter.numel() for chunk in self.trained.modules for parameter in chunk.parameters())

    def step(self) -> float:
        """Seconds of a training step."""
        return timed(lambda: self.trained.train_step([self.batch], next_token))

    def save(self, checkpoints: Checkpoints) -> tuple[float, list[float]]:
        """Seconds that a save stands in the way, and those of each step until it is complete."""
        self.saved += 1
        saved: list[Path] = []
        stall = timed(lambda: saved.append(checkpoints.save(self.saved, self.trained, {})))
        steps = []
        while not saved[0].exists():
            steps.append(self.step())
            stall += timed(checkpoints.poll)
        return stall, steps


def measure(model: Model, pairs: int, folder: Path) -> None:
    """Save both ways in turn, and print the line."""
    stalls: dict[str, list[float]] = {"sync": [], "async": []}
    alone, writing = [], []
    with distributed(Parallel(), seed=0):
        loop = Loop(model)
        kinds = {name: Checkpoints(folder / name, keep=1, asynchronous=name == "async", identity={}) for name in stalls}
        loop.step()
        for checkpoints in kinds.values():  # starts the writer's process
            loop.save(checkpoints)
        for pair in range(pairs):
            for name in reversed(kinds) if pair % 2 else kinds:
                stall, steps = loop.save(kinds[name])
                stalls[name].append(stall)
                writing += steps
                alone += [loop.step() for _ in range(3)]
        for checkpoints in kinds.values():
            checkpoints.finish()
        (newest,) = (folder / "sync").glob("step_*")
        size = sum(record["bytes"] for record in json.loads((newest / "manifest.json").read_text())["files"].values())
        emit(
            "checkpoint",
            parameters=loop.parameters,
            checkpoint_mib=round(size / 2**20),
            **ratio(stalls, over="sync", under="async"),
            step_seconds=round(statistics.median(alone), 4),
            step_ratio=round(statistics.median(writing) / statistics.median(alone), 2) if writing else None,
        )


def main() -> None:
    """Measure in a temporary folder."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--folder", type=Path, help="write below this folder (default: the system's temporary one)")
    parser.add_argument("--quick", action="store_true", help="a tiny model, 2 pairs")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        measure(QUICK if options.quick else MODEL, 2 if options.quick else options.pairs, Path(folder))


if __name__ == "__main__":  # the writer's process imports this file
    main()
