"""Distributed checkpoints: atomic, rotated, loadable at any layout, refused when they do not belong.

A checkpoint is written to ``step_XXXXXXXX.tmp`` by Megatron (every rank its shards), completed by ``manifest.json``,
which has the size and checksum of each file, and renamed: a folder named ``step_XXXXXXXX`` is complete. Reading the
manifest needs no torch and lives in ``nemo_rmt.manifest``.
"""

from __future__ import annotations

import contextlib
import logging
import shutil
from collections.abc import Iterator, MutableMapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing

from nemo_rmt import pulse
from nemo_rmt.errors import UserError
from nemo_rmt.manifest import (
    DamagedCheckpoint,
    FileRecord,
    fair_shares,
    inspect_checkpoint,
    step_folders,
    verify_files,
)
from nemo_rmt.megatron.background import BackgroundWriter, copy_cpu_tensors
from nemo_rmt.megatron.cpu import redirected, results_in_process
from nemo_rmt.megatron.model import LogprobGPT
from nemo_rmt.megatron.optimizer import prepare_for_loading
from nemo_rmt.megatron.train_step import TrainedModel
from nemo_rmt.megatron.writing import (
    complete_draft,
    delete_drafts,
    failing_together,
    hash_own,
    make_empty,
    on_every_rank,
    raise_first,
    rank_0,
)

logger = logging.getLogger(__name__)

SAVING = "saving a checkpoint"

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
        self.deferred: list[OSError] = []
        rank_0(lambda: folder.mkdir(parents=True, exist_ok=True))
        rank_0(lambda: delete_drafts(folder))

    def save(self, step: int, model: TrainedModel, progress: dict[str, Any]) -> Path:
        """Save weights, optimizer, schedule, RNG and ``progress`` (what the stage needs to go on: tokens seen, ...).

        Raises on every rank when one cannot write, a background save's error at the next call: OSError with the
        system's reason, or RuntimeError. Earlier checkpoints stay as they are.
        """
        target = self.folder / f"step_{step:08d}"
        draft = target.with_suffix(".tmp")
        pulse.tick(SAVING)
        with self._leaving_no_draft(), redirected():
            if self.writer is not None:
                self.writer.poll(wait=True)
            rank_0(lambda: make_empty(draft))
            state = training_state(model)
            state["progress"] = {"step": step, **progress}
            state["rng"] = torch.get_rng_state()
            if self.writer is None:
                with results_in_process():
                    dist_checkpointing.save(state, str(draft))
                self._complete(draft, target, step, {})
            else:
                copy_cpu_tensors(state)
                with self.writer.collecting_results() as hashed:
                    request = dist_checkpointing.save(state, str(draft), async_sharded_save=True)
                request.add_finalize_fn(lambda: self._complete(draft, target, step, hashed))
                self.writer.schedule(request, hashed)
        pulse.tick()
        return target

    def poll(self) -> None:
        """Let a background save complete if it is ready; call once a step."""
        if self.writer is not None:
            with self._leaving_no_draft():
                self.writer.poll(wait=False)

    def finish(self) -> None:
        """Wait for background saves and end their process."""
        if self.writer is not None:
            pulse.tick(SAVING)
            with self._leaving_no_draft():
                self.writer.close()
            pulse.tick()

    @contextlib.contextmanager
    def _leaving_no_draft(self) -> Iterator[None]:
        """A block that writes. When it fails the drafts are deleted: what else is to be noted may need their room."""
        try:
            with failing_together(self.deferred):
                yield
        except Exception:
            if self.writer is not None:
                self.writer.abort()
            if dist.get_rank() == 0:
                delete_drafts(self.folder)
            raise

    def _complete(self, draft: Path, target: Path, step: int, hashed: MutableMapping[str, FileRecord]) -> None:
        """Hash the shards that are not in ``hashed``; then, on rank 0, write the manifest, rename and rotate."""
        rank_0(lambda: raise_first(self.deferred))
        parts = on_every_rank(lambda: hash_own(draft, hashed))
        shards = {name: record for part in parts for name, record in part.items()}
        rank_0(lambda: self._complete_and_rotate(draft, target, step, shards))

    def _complete_and_rotate(self, draft: Path, target: Path, step: int, shards: dict[str, FileRecord]) -> None:
        complete_draft(draft, target, {"step": step, **self.identity}, shards)
        complete = sorted(path for path in self.folder.glob("step_*") if path.suffix != ".tmp")
        # Later ones were damaged, or this stage would have resumed from them: they must not crowd this one out.
        newest_first = complete[complete.index(target) :: -1]
        for old in set(complete) - set(newest_first[: self.keep]):
            shutil.rmtree(old)


def sound_checkpoint(stage_dir: Path) -> Path | None:
    """The newest complete checkpoint of a stage whose sizes and checksums hold, or None; the same on every rank.

    Collective: the ranks share the reading. Damaged ones are passed over with a warning. Raises UserError on every
    rank when one has another format.
    """
    folders = [step_folders(stage_dir)]
    dist.broadcast_object_list(folders, src=0)  # a shared file system may show them to one node before another
    for folder in folders[0]:
        if (damage := _damage(folder)) is None:
            return folder
        if dist.get_rank() == 0:
            logger.warning("%s; passing over it", damage)
    return None


def require_sound(folder: Path) -> None:
    """Raise UserError on every rank unless a checkpoint's sizes and checksums hold. Collective, as above."""
    if (damage := _damage(folder)) is not None:
        raise UserError(f"{damage}: put a copy that is whole in its place, or delete it and make it again")


def _damage(folder: Path) -> str | None:
    """What is wrong with a checkpoint, found together. Raises UserError when it is none that can be damaged."""
    pulse.tick("verifying a checkpoint")
    complaint, damaged = None, True
    try:
        info = inspect_checkpoint(folder)
        sizes = {name: record.bytes for name, record in info.files.items()}
        verify_files(info, fair_shares(sizes, dist.get_world_size())[dist.get_rank()])
    except UserError as error:
        complaint, damaged = str(error), isinstance(error, DamagedCheckpoint)
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, (complaint, damaged))
    complaint, damaged = next((each for each in found if each[0] is not None), (None, True))
    if not damaged:
        raise UserError(complaint)
    return complaint


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
