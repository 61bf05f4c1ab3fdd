"""Training speed of recipes' models on one device: tokens/s, TFLOP/s, and on a GPU the share of its peak (MFU).

``python benchmarks/train_step.py [small olmo2_1b] [--yaml FILE]`` trains each recipe's model for ``--steps`` steps of
its anneal's micro-batch, from random weights on random tokens, and prints one JSON line per recipe, on a GPU with the
peak of its memory. With ``--yaml`` (for instance recipes/variants/fp8.yaml) each is measured without and with the file,
in turn, and the line has the ratio.

TFLOP/s are of the model's arithmetic alone (nemo_rmt.model_flops): what is computed again in backward does not count.
MFU is their share of the BF16 peak ``cluster.gpu_tflops``.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

from measuring import emit

WARMUP = 2  # steps: caches, allocator, and compilation where there is any


def measure(name: str, files: list[Path], rows: int | None, steps: int) -> dict[str, float]:
    """Median tokens/s of one recipe's model in this process."""
    import torch

    from nemo_rmt.config import Parallel
    from nemo_rmt.data.batch import TokenBatch
    from nemo_rmt.megatron.model import build_model
    from nemo_rmt.megatron.runtime import distributed
    from nemo_rmt.megatron.train_step import TrainedModel
    from nemo_rmt.model_flops import training_flops
    from nemo_rmt.plan.parameters import model_vocabulary
    from nemo_rmt.recipe_io import load_recipe
    from nemo_rmt.stages.pretrain import next_token

    one = ["cluster.nodes=1", "cluster.gpus_per_node=1", "parallel.tensor=1", "parallel.sequence=false"]
    recipe = load_recipe(name, files, one)
    gpu, stage, vocab = torch.cuda.is_available(), recipe.anneal, model_vocabulary(recipe)
    rows = rows or stage.micro_batch_size
    with distributed(Parallel(), recipe.seed) as layout:
        parallel = Parallel(recompute=recipe.parallel.recompute)
        model = TrainedModel(build_model(recipe.model, parallel, vocab), recipe.model, parallel, stage.optim, steps)
        tokens = torch.randint(vocab, (rows, stage.sequence_length + 1), generator=torch.Generator().manual_seed(0))
        batch = TokenBatch.from_documents(tokens.to(layout.device), eod=0, document_attention=True)
        seconds = []
        for _ in range(WARMUP + steps):
            began = time.perf_counter()
            model.train_step([batch], next_token)  # ends with the loss on the host
            seconds.append(time.perf_counter() - began)
    speed = rows * stage.sequence_length / statistics.median(seconds[WARMUP:])
    flops = speed * training_flops(recipe.model, vocab, stage.sequence_length)
    found = {"rows": rows, "sequence_length": stage.sequence_length, "tokens_per_s": round(speed, 1)}
    found["model_tflops_per_s"] = round(flops / 1e12, 4)
    if gpu:
        found["mfu"] = round(flops / (recipe.cluster.gpu_tflops * 1e12), 4)
        found["peak_gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 2)
    return found


def main() -> None:
    """Measure every recipe in a process of its own and print one JSON line each."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("recipes", nargs="*", default=["tiny", "small"])
    parser.add_argument("--yaml", type=Path, help="compare with this partial recipe applied")
    parser.add_argument("--rows", type=int, help="rows of a micro-batch (default: the recipe's anneal)")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--quick", action="store_true", help="the recipe tiny, 2 steps")
    parser.add_argument("--inner", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.quick:
        options.recipes, options.steps = ["tiny"], 2
    if options.inner:
        files = [options.yaml] if options.yaml else []
        print(json.dumps(measure(options.recipes[0], files, options.rows, options.steps)))
        return
    for name in options.recipes:
        found = {}
        for variant in ("plain", "yaml") if options.yaml else ("plain",):
            command = [sys.executable, __file__, name, "--inner", "--steps", str(options.steps)]
            command += ["--rows", str(options.rows)] if options.rows else []
            command += ["--yaml", str(options.yaml)] if variant == "yaml" else []
            output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
            found[variant] = json.loads(output.splitlines()[-1])
        line = dict(found["plain"])
        if options.yaml:
            line |= {
                f"yaml_{key}": value for key, value in found["yaml"].items() if key not in ("rows", "sequence_length")
            }
            line |= {"yaml": options.yaml.name, "ratio": round(line["yaml_tokens_per_s"] / line["tokens_per_s"], 3)}
        emit("train_step", recipe=name, **line)


if __name__ == "__main__":
    main()
