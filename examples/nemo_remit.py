"""A ReMiT anneal at the end of a NeMo 2.7 pre-training recipe.

    python examples/nemo_remit.py REFERENCE DATA_PREFIX

REFERENCE: the RL model's NeMo 2 checkpoint, of the recipe's architecture. DATA_PREFIX: a Megatron indexed dataset,
without .bin and .idx. Needs NeMo 2.7 (.ci/install_nemo makes an environment) and 8 GPUs; without a GPU it prints what
it would run.
"""

from __future__ import annotations

import sys

import nemo_run as run
import torch
from nemo.collections import llm

from nemo_rmt.adapters.nemo2 import remit_stage

GPUS = 8


def annealed(reference: str, data: str) -> run.Partial:
    """NeMo's own recipe with the stage, then overrides as on any other recipe."""
    recipe = remit_stage(
        llm.llama32_1b.pretrain_recipe(name="llama32_1b_remit", dir="runs/nemo", num_gpus_per_node=GPUS),
        reference=reference,
        stable_steps=9_000,
        anneal_steps=1_000,
        epsilon=0.2,
    )
    recipe.data = run.Config(
        llm.PreTrainingDataModule, paths=[data], seq_length=8192, global_batch_size=512, micro_batch_size=1
    )
    recipe.optim.config.lr = 2e-4
    return recipe


def main() -> None:
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    recipe = annealed(*sys.argv[1:])
    if not torch.cuda.is_available():
        print(recipe)
        print(f"not started: this needs {GPUS} GPUs and there is none")
        return
    run.run(recipe, executor=run.LocalExecutor(ntasks_per_node=GPUS, launcher="torchrun"))


if __name__ == "__main__":
    main()
