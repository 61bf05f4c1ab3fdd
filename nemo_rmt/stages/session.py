"""What every stage has at hand: its job, its place in the layout, its data, models, checkpoints and metrics."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

from nemo_rmt.compatibility import IMPORTED, model_vocab_size, require_compatible
from nemo_rmt.config import Recipe, Stage
from nemo_rmt.data.batch import TokenBatch
from nemo_rmt.data.seeds import derived_seed
from nemo_rmt.data.tasks import TaskFamily, make_task
from nemo_rmt.data.tokenizer import Tokenizer
from nemo_rmt.errors import UserError
from nemo_rmt.megatron.checkpoint import Checkpoints, load_training, load_weights
from nemo_rmt.megatron.datasets import TrainingRows, dataset_exists
from nemo_rmt.megatron.model import build_model
from nemo_rmt.megatron.runtime import Layout
from nemo_rmt.megatron.train_step import ScoredModel, TrainedModel
from nemo_rmt.run_folder import CheckpointInfo, latest_checkpoint, write_json
from nemo_rmt.stages.job import StageJob
from nemo_rmt.tracking import Metrics


class Session:
    """One process of one stage.

    Args:
        job: what to do. folder: the stage's folder. layout: this process's place.
    """

    def __init__(self, job: StageJob, folder: Path, layout: Layout):
        self.job = job
        self.recipe: Recipe = job.recipe
        self.folder = folder
        self.layout = layout
        self.data_folder = self.require_input("data")
        self.tokenizer = Tokenizer.load(self.data_folder / "tokenizer", self.recipe.tokenizer.chat_template)
        self.tasks: list[TaskFamily] = [make_task(task) for task in self.recipe.data.tasks]

    @property
    def vocab_size(self) -> int:
        """Tokens the model predicts over."""
        return model_vocab_size(self.recipe.model, self.tokenizer.vocab_size)

    @property
    def settings(self) -> Stage:
        """This training stage's section of the recipe."""
        return getattr(self.recipe, self.job.stage)

    def require_input(self, role: str) -> Path:
        """The folder given for a role. Raises UserError when the job names none or it does not exist."""
        path = self.job.input_folder(self.folder, role)
        if path is None:
            raise UserError(f"{self.folder / 'stage.yaml'}: inputs.{role} is missing: stage {self.job.stage} needs it")
        if not path.is_dir():
            raise UserError(f"{self.folder / 'stage.yaml'}: inputs.{role}={path} does not exist")
        return path

    def seed(self, *names: str | int) -> int:
        """A 31-bit seed derived from the run's seed for one use."""
        return derived_seed(self.recipe.seed, *names) % 2**31

    def shard(self, size: int) -> range:
        """This data-parallel rank's share of ``size`` items, in order."""
        part = size // self.layout.data_size
        return range(self.layout.data_rank * part, (self.layout.data_rank + 1) * part)

    def whole_rows(self, count: int, micro_batch_size: int) -> int:
        """``count`` rows of one rank rounded up to what its schedule takes: whole micro-batches, and with interleaving
        a multiple of the pipeline size of them."""
        parallel = self.recipe.parallel
        step = micro_batch_size * (parallel.pipeline if parallel.virtual_pipeline else 1)
        return -(-count // step) * step

    def training_rows(self, settings: Stage, *names: str | int) -> TrainingRows:
        """The stage's blend of corpora; ``names`` decide its order."""
        prefixes = {
            self.data_folder / corpus.name / "train": corpus.weight
            for corpus in self.recipe.data.corpora
            if corpus.weight
        }
        for prefix in prefixes:
            if not dataset_exists(prefix):
                raise UserError(f"dataset {prefix} is missing: run the data stage again")
        return TrainingRows(
            prefixes,
            self.tokenizer,
            sequence_length=settings.sequence_length,
            num_rows=settings.steps * settings.global_batch_size,
            seed=self.seed(*names),
            cache=self.folder / "data_index",
        )

    @property
    def width_multiple(self) -> int:
        """What the width of padded rows is a multiple of: with FP8 the tokens of each rank are one of 16."""
        return (8 if self.recipe.model.fp8 is None else 16) * self.recipe.parallel.tensor

    def padded_batch(self, examples: list[tuple[list[int], list[float]]], limit: int) -> TokenBatch:
        """Right-padded rows of (tokens, loss mask) pairs on this device, as wide as the longest, at most ``limit``."""
        longest = max(len(tokens) for tokens, _ in examples) - 1
        multiple = self.width_multiple
        width = limit if longest > limit else min(limit, -(-longest // multiple) * multiple)
        key = f"{self.job.stage}.sequence_length"
        return TokenBatch.from_examples(examples, self.tokenizer.pad, width, key=key).to(self.layout.device)

    def frozen_model(self, checkpoint: Path) -> ScoredModel:
        """A model for forward passes only, in this run's layout."""
        self.require_compatible(checkpoint)
        chunks = build_model(self.recipe.model, self.recipe.parallel, self.vocab_size)
        load_weights(checkpoint, chunks)
        for chunk in chunks:
            chunk.requires_grad_(False)
        return ScoredModel(chunks, self.recipe.parallel)

    def require_compatible(self, checkpoint: Path) -> CheckpointInfo:
        """Raise UserError unless a checkpoint fits this run's architecture and tokenizer."""
        return require_compatible(checkpoint, self.recipe.model, self.tokenizer.vocab_size, self.tokenizer.fingerprint)

    def finish(self, metrics: dict[str, float], *, checkpoint: Path | None, wall_s: float, tokens: int) -> None:
        """Write result.json: the stage is done."""
        if self.layout.rank:
            return
        run_dir = (self.folder / self.job.run_dir).resolve()
        relative = None if checkpoint is None else str(checkpoint.resolve().relative_to(run_dir))
        result = {"status": "done", "metrics": metrics, "checkpoint": relative}
        write_json(self.folder / "result.json", {**result, "wall_s": round(wall_s, 3), "tokens": tokens})


class Training:
    """A stage's training loop around its steps: resume, log, checkpoint.

    Args:
        session: the stage's session.
        start: checkpoint whose weights training starts from; None: initial weights.
        with_optimizer: take the optimizer's state from ``start`` too.
        updates_per_step: optimizer updates in one step of the loop.
    """

    def __init__(
        self, session: Session, start: Path | None, *, with_optimizer: bool = False, updates_per_step: int = 1
    ):
        self.session = session
        recipe, self.settings = session.recipe, session.settings
        if start is not None and session.require_compatible(start).stage == IMPORTED and with_optimizer:
            raise UserError(
                f"checkpoint {start} was imported and has no optimizer state: set "
                f"{session.job.stage}.resume_optimizer=false"
            )
        chunks = build_model(recipe.model, recipe.parallel, session.vocab_size)
        resumed = latest_checkpoint(session.folder)
        if start is not None and resumed is None and not with_optimizer:
            load_weights(start, chunks)  # before the optimizer copies them into its fp32 main parameters
        updates = self.settings.steps * updates_per_step
        self.model = TrainedModel(chunks, recipe.model, recipe.parallel, self.settings.optim, updates)
        self.done, self.tokens, self.wall_s = 0, 0, 0.0
        self.metrics: dict[str, float] = {}
        if resumed is not None:
            progress = load_training(resumed, self.model, with_schedule=True)
            self.done, self.tokens, self.wall_s = progress["step"], progress["tokens"], progress["wall_s"]
            self.metrics = progress["metrics"]  # the result's, when the last step was saved but the result was not
        elif start is not None and with_optimizer:
            load_training(start, self.model, with_schedule=False)
        self.checkpoints = Checkpoints(
            session.folder / "checkpoints",
            keep=recipe.flywheel.keep_checkpoints,
            asynchronous=recipe.flywheel.async_save,
            identity={
                "stage": session.job.stage,
                "iteration": session.job.iteration,
                "model": recipe.model.model_dump(mode="json"),
                "vocab_size": session.vocab_size,
                "tokenizer": session.tokenizer.fingerprint,
            },
        )
        self.last: Path | None = resumed

    def steps(self) -> Iterator[int]:
        """The steps still to do, from 0. After each the caller must have called ``record``; ends with result.json."""
        title = f"{self.session.job.iteration}/{self.session.job.stage}"
        with Metrics(
            self.session.folder,
            self.session.recipe.tracking,
            title=title,
            total_steps=self.settings.steps,
            resume_step=self.done,
            enabled=self.session.layout.rank == 0,
        ) as self.tracker:
            self.clock = time.perf_counter()
            for step in range(self.done, self.settings.steps):
                yield step
                if self.done != step + 1:
                    raise RuntimeError(f"step {step} ended without a record")
                self.checkpoints.poll()
                if self.done % self.settings.checkpoint_interval == 0 or self.done == self.settings.steps:
                    progress = {"tokens": self.tokens, "wall_s": self.wall_s, "metrics": self.metrics}
                    self.last = self.checkpoints.save(self.done, self.model, progress)
            self.checkpoints.finish()
        self.session.finish(self.metrics, checkpoint=self.last, wall_s=self.wall_s, tokens=self.tokens)

    def record(self, metrics: dict[str, float], *, tokens: int) -> None:
        """Log one finished step.

        Args:
            metrics: by "group/name", or bare names for the group "train". Lists (histograms) become name_00, ...
            tokens: tokens the step processed over all ranks.
        """
        now = time.perf_counter()
        seconds, self.clock = now - self.clock, now
        self.done, self.tokens, self.wall_s = self.done + 1, self.tokens + tokens, self.wall_s + seconds
        flat: dict[str, float] = {}
        for name, value in metrics.items():
            name = name if "/" in name else f"train/{name}"
            if isinstance(value, list):
                flat.update({f"{name}_{index:02d}": entry for index, entry in enumerate(value)})
            else:
                flat[name] = value
        flat |= {"train/tokens": self.tokens, "train/tokens_per_s": tokens / seconds, "train/step_s": seconds}
        self.metrics = {name: value for name, value in flat.items() if not name.startswith("remit/weight_hist")}
        self.tracker.log(self.done, flat)
