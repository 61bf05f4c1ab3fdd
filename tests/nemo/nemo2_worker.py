"""A rank that trains small NeMo recipes, with and without the ReMiT stage: nemo2_worker.py OUTPUT LAYOUT...

Writes what happened to OUTPUT/rank_<rank>.json: {layout: {run: {...}}}.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import fiddle as fdl
import nemo_run as run
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.dist_checkpointing import load_tensors_metadata
from megatron.core.num_microbatches_calculator import unset_num_microbatches_calculator
from nemo.collections.llm.recipes.precision.mixed_precision import bf16_mixed
from nemo.lightning import _strategy_lib
from nemo.lightning.pytorch.strategies import MegatronStrategy
from nemo2_model import PEAK, SEQUENCE, STABLE, STEPS, WARMUP, loss_mask, tiny_recipe
from nemo2_recorder import Recorder
from nemo_cpu import nemo_on_cpu
from torch import Tensor

from nemo_rmt.adapters.nemo2 import remit_stage
from nemo_rmt.adapters.nemo2_schedule import StableThenDecayScheduler
from nemo_rmt.adapters.weighted import weighted_token_loss
from nemo_rmt.errors import UserError

LAYOUTS = {
    "one": {},
    "tp2": {"tensor": 2},
    "dp2": {},
    "pp2": {"pipeline": 2},
    "vpp2": {"pipeline": 2, "virtual_pipeline": 2},
}
EPSILON, SCALE = 0.05, 4.0
"""Weights differ much, and some reach the bounds."""


def train(recipe: run.Partial, resume: Path | None = None, **recorder) -> dict:
    """Run a recipe as nemo_run would, and say what it did; ``error`` is the UserError that ended it."""
    task = fdl.build(recipe)
    trainer = task.keywords["trainer"]
    record = Recorder(task.keywords.get("remit"), **recorder)
    trainer.callbacks.append(record)
    trainer.ckpt_path = resume
    try:
        task()
    except UserError as error:
        record.facts["error"] = str(error)
    return record.facts


def tensors(checkpoint: Path) -> list[str]:
    return sorted(load_tensors_metadata(str(checkpoint / "weights")))


def layout_facts(folder: Path, layout: str, ranks: int) -> dict:
    """NeMo's own loss, the stage with weights of 1, and the stage: whole runs from the same initial weights."""

    def recipe(**changes: float) -> run.Partial:
        base = tiny_recipe(folder / "logs", devices=ranks, **LAYOUTS[layout])
        if not changes:
            base.optim.lr_scheduler = run.Config(StableThenDecayScheduler, warmup_steps=WARMUP, stable_steps=STABLE)
            return base
        return remit_stage(base, reference=str(end), stable_steps=STABLE, anneal_steps=STEPS - STABLE, **changes)

    end, middle, annealed = folder / "end", folder / "middle", folder / "annealed"
    facts = {"plain": train(recipe(), save={STEPS: end}, score_rows=layout == "one")}
    facts["uniform"] = train(recipe(epsilon=1e-9))
    weighted = {"epsilon": EPSILON, "scale": SCALE}
    facts["remit"] = train(recipe(**weighted), save={4: middle, STEPS: annealed}, context=annealed / "context")
    facts["new_tensors"] = sorted(set(tensors(annealed)) ^ set(tensors(end)))
    if layout == "one":
        # another peak and another place for the switch: the recipe decides, not the checkpoint
        facts["resumed"] = train(recipe(**weighted), resume=middle)
        resumed = recipe(**weighted)
        resumed.optim.config.lr, resumed.remit.stable_steps = 2 * PEAK, 2
        facts["rescheduled"] = train(resumed, resume=middle)
        half = recipe(**weighted)
        half.trainer.plugins, half.optim.config.bf16 = bf16_mixed(), True
        facts["bf16"] = train(half)
        facts["context"] = (annealed / "context/io.json").read_text()
        for name, value in {"ffn_hidden_size": 64, "num_layers": 3, "vocab_size": 128}.items():
            other = recipe(**weighted)
            setattr(other.model.config, name, value)
            facts[f"other {name}"] = train(other)
    return facts


def context_parallel_facts() -> dict:
    """Rows cut in two halves, one a rank, against the whole rows; once each row a sequence, once with documents."""
    group, half = dist.group.WORLD, SEQUENCE // 2
    own = slice(group.rank() * half, (group.rank() + 1) * half)
    generator = torch.Generator().manual_seed(1)
    losses, reference = torch.rand(2, 3, SEQUENCE, generator=generator) * 4
    mask = loss_mask(torch.arange(3 * SEQUENCE).view(3, SEQUENCE))
    documents = torch.tensor([5] * 2 + [7] * 3 + [9] * 7 + [2] * 4).expand(3, -1)

    def weighted(part: slice, segment_ids: Tensor | None, group: dist.ProcessGroup | None):
        leaf = losses[:, part].clone().requires_grad_()
        segments = None if segment_ids is None else segment_ids[:, part]
        output = weighted_token_loss(
            leaf,
            -reference[:, part],
            mask[:, part],
            epsilon=0.5,
            scale=1.0,
            segment_ids=segments,
            context_parallel_group=group,
        )
        output.loss_sum.backward()
        return output, leaf.grad

    facts = {}
    for name, segment_ids in {"rows": None, "documents": documents}.items():
        (whole, gradient), (part, own_gradient) = (
            weighted(slice(None), segment_ids, None),
            weighted(own, segment_ids, group),
        )
        _, uncentred = weighted(own, segment_ids, None)
        total = torch.stack([part.loss_sum.detach(), part.num_tokens.float()])
        dist.all_reduce(total)
        facts[name] = {
            "loss": total[0].item(),
            "whole_loss": whole.loss_sum.item(),
            "tokens": total[1].item(),
            "whole_tokens": whole.num_tokens.item(),
            "gradient_error": (own_gradient - gradient[:, own]).abs().max().item(),
            "error_without_group": (uncentred - gradient[:, own]).abs().max().item(),
        }
    return facts


def set_up_again(setup_distributed):
    """Of a second layout in the same processes: Lightning starts process groups only once."""

    def setup(self) -> None:
        again = dist.is_initialized()
        if again:
            parallel_state.destroy_model_parallel()
            unset_num_microbatches_calculator()
        setup_distributed(self)
        if again:
            _strategy_lib.init_model_parallel(self.model)

    return setup


def main(output: Path, layouts: list[str]) -> None:
    rank, ranks = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    MegatronStrategy.setup_distributed = set_up_again(MegatronStrategy.setup_distributed)
    with nemo_on_cpu():
        facts = {layout: layout_facts(output / layout, layout, ranks) for layout in layouts}
    if ranks > 1:
        facts["context_parallel"] = context_parallel_facts()
    (output / f"rank_{rank}.json").write_text(json.dumps(facts))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
