"""Distributed checkpoints: atomic, rotated, loadable at any layout, refused when they do not belong.

A checkpoint is written to ``step_XXXXXXXX.tmp`` by Megatron (every rank its shards), completed by ``manifest.json``,
which lists its files and their sizes, and renamed: a folder named ``step_XXXXXXXX`` is complete. Reading the manifest
and finding the latest complete checkpoint needs no torch and lives in ``nemo_rmt.run_folder``.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing

from nemo_rmt.megatron.background import BackgroundWriter, copy_cpu_tensors
from nemo_rmt.megatron.cpu import redirected, results_in_process
from nemo_rmt.megatron.model import LogprobGPT
from nemo_rmt.megatron.optimizer import prepare_for_loading
from nemo_rmt.megatron.train_step import TrainedModel
from nemo_rmt.run_folder import METADATA

# Optimizer states that load at another tensor, pipeline or data-parallel size.
RESHARDABLE = {"distrib_optim_sharding_type": "fully_reshardable"}

# Ends the names of Transformer Engine's FP8 scaling factors. Megatron's own layers have the names too, but not all of
# them and nothing under them.
SCALING = "_extra_state"


class Checkpoints:
    """Saves one stage's training state.

    Args:
        folder: the stage's ``checkpoints`` folder.
        keep: complete checkpoints kept.
        asynchronous: write in a background process; ``finish`` must be called before the process ends.
        identity: what ``manifest.json`` says besides step and files: stage, iteration, model, vocab_size, tokenizer.
    """

    def __init__(self, folder: Path, *, keep: int, asynchronous: bool, identity: dict[str, Any]):
        self.folder = folder
        self.keep = keep
        self.identity = identity
        self.writer = BackgroundWriter() if asynchronous else None
        if dist.get_rank() == 0:
            folder.mkdir(parents=True, exist_ok=True)
            for leftover in folder.glob("*.tmp"):
                shutil.rmtree(leftover)
        dist.barrier()

    def save(self, step: int, model: TrainedModel, progress: dict[str, Any]) -> Path:
        """Save weights, optimizer, schedule, RNG and ``progress`` (what the stage needs to go on: tokens seen, ...)."""
        target = self.folder / f"step_{step:08d}"
        draft = target.with_suffix(".tmp")
        if self.writer is not None:
            self.writer.poll(wait=True)
        if dist.get_rank() == 0:
            shutil.rmtree(draft, ignore_errors=True)
            draft.mkdir()
        dist.barrier()
        state = training_state(model)
        state["progress"] = {"step": step, **progress}
        state["rng"] = torch.get_rng_state()
        with redirected():
            if self.writer is None:
                with results_in_process():
                    dist_checkpointing.save(state, str(draft))
                self._complete(draft, target, step)
            else:
                copy_cpu_tensors(state)
                with self.writer.collecting_results():
                    request = dist_checkpointing.save(state, str(draft), async_sharded_save=True)
                request.add_finalize_fn(lambda: self._complete(draft, target, step))
                self.writer.schedule(request)
        return target

    def poll(self) -> None:
        """Let a background save complete if it is ready; call once a step."""
        if self.writer is not None:
            self.writer.poll(wait=False)

    def finish(self) -> None:
        """Wait for background saves and end their process."""
        if self.writer is not None:
            self.writer.close()

    def _complete(self, draft: Path, target: Path, step: int) -> None:
        """Write the manifest, sync, rename, rotate: on rank 0, while the others wait."""
        dist.barrier()
        if dist.get_rank() == 0:
            complete_draft(draft, target, {"step": step, **self.identity})
            complete = sorted(path for path in self.folder.glob("step_*") if path.suffix != ".tmp")
            # Later ones were damaged, or this stage would have resumed from them: they must not crowd this one out.
            newest_first = complete[complete.index(target) :: -1]
            for old in set(complete) - set(newest_first[: self.keep]):
                shutil.rmtree(old)
        dist.barrier()


def complete_draft(draft: Path, target: Path, identity: dict[str, Any]) -> None:
    """Write a draft's manifest, with ``identity`` and all its files, and rename it to ``target``, which it replaces."""
    paths = [path for path in sorted(draft.rglob("*")) if path.is_file()]
    files = {str(path.relative_to(draft)): path.stat().st_size for path in paths}
    with open(draft / METADATA, "w") as file:
        json.dump({"format": 1, **identity, "files": files}, file)
        file.flush()
        os.fsync(file.fileno())
    shutil.rmtree(target, ignore_errors=True)
    os.replace(draft, target)


def model_state(modules: list[LogprobGPT]) -> dict[str, Any]:
    """The sharded weights, under the keys every checkpoint uses."""
    if len(modules) == 1:
        return {"model": modules[0].sharded_state_dict(metadata=RESHARDABLE)}
    return {f"model{index}": module.sharded_state_dict(metadata=RESHARDABLE) for index, module in enumerate(modules)}


def training_state(model: TrainedModel, *, is_loading: bool = False) -> dict[str, Any]:
    """Weights, optimizer and schedule as Megatron's sharded state dict."""
    with redirected():
        if is_loading:
            prepare_for_loading(model.optimizer)
        state = model_state(model.modules)
        weights = dict(state)
        state["optimizer"] = model.optimizer.sharded_state_dict(weights, is_loading=is_loading, metadata=RESHARDABLE)
    state["scheduler"] = model.scheduler.state_dict()
    return state


def save_weights(folder: Path, modules: list[LogprobGPT]) -> None:
    """Write the weights of bare model chunks, and nothing else, into an empty folder."""
    with redirected(), results_in_process():
        dist_checkpointing.save(_weights(modules), str(folder))


def load_weights(folder: Path, modules: list[LogprobGPT]) -> None:
    """Load weights into bare model chunks, whatever layout and layers saved them."""
    with redirected():
        state = dist_checkpointing.load(_weights(modules), str(folder), strict="assume_ok_unexpected")
    _fill(modules, state)


def _weights(modules: list[LogprobGPT]) -> dict[str, Any]:
    """The sharded weights without scaling factors."""
    return {
        part: {key: tensor for key, tensor in tensors.items() if not key.endswith(SCALING)}
        for part, tensors in model_state(modules).items()
    }


def _fill(modules: list[LogprobGPT], state: dict[str, Any]) -> None:
    """Copy loaded weights into the modules. Raises RuntimeError when any is missing, or one too many."""
    for index, module in enumerate(modules):
        tensors = state["model" if len(modules) == 1 else f"model{index}"]
        absent = {key: None for key in module.state_dict() if key.endswith(SCALING)}
        module.load_state_dict({**absent, **tensors})


def load_training(folder: Path, model: TrainedModel, *, with_schedule: bool) -> dict[str, Any]:
    """Load weights and optimizer, and when resuming the schedule and RNG too.

    Returns the ``progress`` that was saved.
    """
    template = training_state(model, is_loading=True)
    kept = ("params", "step")
    settings = [{key: group[key] for key in group if key not in kept} for group in model.optimizer.param_groups]
    with redirected():
        state = dist_checkpointing.load(template, str(folder), strict="assume_ok_unexpected")
        _fill(model.modules, state)
        model.optimizer.load_state_dict(state["optimizer"])
    if with_schedule:
        model.scheduler.load_state_dict(state["scheduler"])
        torch.set_rng_state(state["rng"])
    else:
        # Megatron keeps peak learning rate, decay and betas in the optimizer's groups: take this stage's.
        for group, ours in zip(model.optimizer.param_groups, settings, strict=True):
            group.update(ours)
        model.scheduler.step(0)
    return state["progress"]
