"""How a training step's time and peak memory grow with what it is made of, beside how they should.

``python benchmarks/cost_curves.py [--curves NAME...]`` prints a JSON line per point. Its ``ratio`` is the time's growth
from the curve's first point over the growth of the arithmetic (matrix products by tokens, attention by what each token
sees): 1 is as it should be, less is a fixed cost spread over more. ``memory_ratio`` is the peak over that of nemo-rmt
plan. A last line per curve has the exponents of both growths, beside those of arithmetic and plan. Points of a curve
are measured in turn in one process. Peak memory is a whole step's, model, gradients and optimizer included, in a
process of its own.

The curve ``ranks`` divides one global batch over data-parallel processes of one thread each. The arithmetic stays the
same, so its time should be divided by the number of processes as far as there are cores, and ``ratio`` is what the
ranks' working together costs.
"""

from __future__ import annotations

import argparse
import functools
import gc
import os
import statistics
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass

import numpy
import torch
from measuring import alternately, emit, peak_beyond, peak_mib, ratio, timed
from rmt_step import VOCAB as TREE_VOCAB
from rmt_step import dual_loss, micro_batches, random_tree, seen

from nemo_rmt.config import Optim, Parallel, Recipe
from nemo_rmt.data.batch import TokenBatch
from nemo_rmt.megatron.model import build_model
from nemo_rmt.megatron.runtime import distributed
from nemo_rmt.megatron.train_step import TrainedModel
from nemo_rmt.model_flops import forward_flops
from nemo_rmt.plan.memory import rank_memory
from nemo_rmt.plan.workload import Workload
from nemo_rmt.recipe_io import load_recipe
from nemo_rmt.stages.pretrain import next_token

RANK_STEPS = 5
"""Of which a process takes the median, after one more."""


@dataclass(frozen=True)
class Point:
    """One step, of rows of documents or of a token tree."""

    vocab: int = 512
    hidden_size: int = 128
    num_layers: int = 4
    rows: int = 4
    micro_batch: int = 4
    sequence: int = 256
    document: int = 128
    """Tokens of each document in a row."""
    tree: str | None = None
    """trunk,positions,responses,length."""
    ranks: int = 1

    @property
    def recipe(self) -> Recipe:
        """Its model and layout, for the model of what a step costs."""
        model = {"num_layers": self.num_layers, "hidden_size": self.hidden_size, "qk_norm": True}
        model["ffn_hidden_size"] = 3 * self.hidden_size
        settings = [f"model.{key}={value}" for key, value in model.items()]
        settings += ["iterations=1", *(f"{stage}.enabled=false" for stage in ("rmt", "sft", "rl"))]
        settings += [f"{stage}.micro_batch_size=1" for stage in ("pretrain", "anneal")]
        return load_recipe(None, [], [*settings, f"cluster.gpus_per_node={self.ranks}"])

    def batches(self, data_rank: int) -> list[TokenBatch]:
        """One rank's micro-batches of random tokens, on the training device."""
        if self.tree:
            return micro_batches("tree", random_tree(self.tree, earliest=0))
        tokens = torch.randint(1, self.vocab, (self.rows, self.sequence + 1))
        tokens[:, self.document - 1 :: self.document] = 0
        batch = TokenBatch.from_documents(tokens, eod=0, document_attention=True)
        return batch.to(torch.cuda.current_device()).micro_batches(self.micro_batch)[data_rank :: self.ranks]

    def tokens_and_pairs(self) -> tuple[int, float]:
        """Tokens of a step, and what each of them sees, added up."""
        if self.tree:
            return seen(random_tree(self.tree, earliest=0), "tree")
        tokens = self.rows * self.sequence
        return tokens, tokens * self.document / 2

    def flops(self) -> float:
        """Of a step; the head computes its logits again in backward."""
        tokens, pairs = self.tokens_and_pairs()
        layers, head = forward_flops(self.recipe.model, self.vocab, pairs / tokens)
        return tokens * (3 * layers + 4 * head)

    def expected_seconds(self) -> float:
        """In units of one FLOP of one core."""
        return self.flops() / min(self.ranks, os.cpu_count() or 1)

    def expected_mib(self) -> float:
        """Peak of one rank by the plan."""
        tokens, pairs = self.tokens_and_pairs()
        rows, sequence = (1, tokens) if self.tree else (self.micro_batch, self.sequence)
        micro_batches = 1 if self.tree else self.rows // (self.micro_batch * self.ranks)
        work = Workload("point", "pretrain", 1, 1, rows, sequence, micro_batches, tokens, pairs / tokens)
        return rank_memory(self.recipe, work, self.vocab, 0).peak / 2**20

    def build(self, data_rank: int = 0) -> Callable[[], object]:
        """A step of a model with random weights."""
        model = self.recipe.model
        trained = TrainedModel(build_model(model, Parallel(), self.vocab), model, Parallel(), Optim(lr=1e-5), 10_000)
        batches, loss = self.batches(data_rank), dual_loss if self.tree else next_token
        return lambda: trained.train_step(batches, loss)


CURVES: dict[str, dict[int, Point]] = {
    "sequence, documents of 128": {n: Point(rows=1, micro_batch=1, sequence=n) for n in (512, 1024, 2048, 4096)},
    "sequence, one document": {
        n: Point(rows=1, micro_batch=1, sequence=n, document=n) for n in (512, 1024, 2048, 4096)
    },
    "vocabulary": {n: Point(vocab=n) for n in (2_048, 8_192, 32_768, 131_072)},
    "positions × 8 samples": {8 * n: Point(TREE_VOCAB, tree=f"512,{n},8,32") for n in (1, 2, 4, 8)},
    "hidden size": {n: Point(hidden_size=n) for n in (64, 128, 256, 512)},
    "layers": {n: Point(num_layers=n) for n in (2, 4, 8, 16)},
    "ranks": {n: Point(hidden_size=256, rows=8, micro_batch=1, ranks=n) for n in (1, 2, 4)},
}
QUICK = {"layers": (2, 4), "ranks": (2,)}


def seconds_in_turn(points: dict[int, Point], pairs: int) -> dict[int, list[float]]:
    """Of a step at every point, all in this process."""
    with distributed(Parallel(), seed=0):
        found = alternately({str(x): point.build() for x, point in points.items()}, pairs)
    return {int(x): values for x, values in found.items()}


def seconds_of_worlds(name: str, points: dict[int, Point], pairs: int) -> dict[int, list[float]]:
    """The same where every point is a world of processes: the worlds start in turn."""
    found: dict[int, list[float]] = {x: [] for x in points}
    for pair in range(pairs):
        for x in reversed(points) if pair % 2 else points:
            command = [sys.executable, *world(name, x, "seconds")]
            environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
            output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment).stdout
            found[x].append(float(output.splitlines()[-1]))
    return found


def world(name: str, x: int, what: str) -> list[str]:
    """What to start Python with, so that a point is measured by itself."""
    alone = [__file__, "--curves", name, "--point", str(x), "--what", what]
    ranks = CURVES[name][x].ranks
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    return alone if ranks == 1 else [*torchrun, *alone]


def measure_alone(point: Point, what: str) -> None:
    """Rank 0 prints the seconds of a step, or the most that building the model and two steps take, in MiB."""
    with distributed(Parallel(), seed=0) as layout:
        Point(hidden_size=32, rows=point.ranks, micro_batch=1, sequence=8, ranks=point.ranks).build(layout.rank)()
        gc.collect()  # what is loaded at the first step is loaded now
        if what == "seconds":
            step = point.build(layout.rank)
            step()
            value = statistics.median(timed(step) for _ in range(RANK_STEPS))
        else:

            def two_steps() -> None:
                step = point.build(layout.rank)
                step(), step()  # the first creates the optimizer's states

            value = peak_beyond(two_steps)
        if layout.rank == 0:
            print(value)


def exponent(growth: dict[int, float]) -> float:
    """Slope of the values over their places, both in logarithms."""
    return round(float(numpy.polyfit(numpy.log(list(growth)), numpy.log(list(growth.values())), 1)[0]), 2)


def measure(name: str, points: dict[int, Point], pairs: int) -> None:
    """One curve's lines."""
    several = any(point.ranks > 1 for point in points.values())
    seconds = (functools.partial(seconds_of_worlds, name) if several else seconds_in_turn)(points, pairs)
    first = next(iter(points))
    medians = {x: statistics.median(values) for x, values in seconds.items()}
    expected = {x: point.expected_seconds() for x, point in points.items()}
    peaks, plan = {}, {x: point.expected_mib() for x, point in points.items()}
    for x in points:
        script, *arguments = world(name, x, "memory")
        peaks[x] = peak_mib(script, arguments)
        growth = ratio({"now": seconds[x], "first": seconds[first]}, over="now", under="first")
        due = expected[x] / expected[first]
        emit(
            "cost_curves",
            curve=name,
            x=x,
            seconds=round(medians[x], 4),
            expected_seconds=round(medians[first] * due, 4),
            **{key: round(growth[key] / due, 3) for key in ("ratio", "ratio_min", "ratio_max")},
            peak_mib=peaks[x],
            plan_mib=round(plan[x], 1),
            memory_ratio=round(peaks[x] / plan[x], 2),
        )
    if len(points) > 1:
        emit(
            "cost_curves",
            curve=name,
            time_exponent=exponent(medians),
            expected_time_exponent=exponent(expected),
            memory_exponent=exponent(peaks),
            plan_memory_exponent=exponent(plan),
        )


def main() -> None:
    """Measure the curves; or, in a process or world of its own, one point."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--curves", nargs="+", default=list(CURVES), choices=CURVES, metavar="NAME", help=str([*CURVES])
    )
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="two points of one curve, one of another, 2 pairs")
    parser.add_argument("--point", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--what", choices=("seconds", "memory"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.point:
        measure_alone(CURVES[options.curves[0]][options.point], options.what)
        return
    chosen = {name: CURVES[name] for name in options.curves}
    if options.quick:
        chosen = {name: {x: CURVES[name][x] for x in places} for name, places in QUICK.items()}
    for name, points in chosen.items():
        measure(name, points, 2 if options.quick else options.pairs)


if __name__ == "__main__":
    main()
