"""What every stage has at hand: its job, its place in the layout, its data and models."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from nemo_rmt.compatibility import model_vocab_size, require_compatible
from nemo_rmt.config import Recipe, Stage
from nemo_rmt.data.batch import TokenBatch
from nemo_rmt.data.fingerprint import dataset_exists
from nemo_rmt.data.packing import balanced, first_fit_decreasing, training_cost
from nemo_rmt.data.seeds import derived_seed
from nemo_rmt.data.tasks import TaskFamily, make_task
from nemo_rmt.data.tokenizer import Tokenizer
from nemo_rmt.data.tree import TokenTree, pack_trees, split_tree
from nemo_rmt.errors import UserError
from nemo_rmt.manifest import CheckpointInfo
from nemo_rmt.megatron.checkpoint import load_weights, require_sound
from nemo_rmt.megatron.datasets import TrainingRows
from nemo_rmt.megatron.model import build_model
from nemo_rmt.megatron.runtime import Layout, gather_over_data_parallel, max_over_data_parallel
from nemo_rmt.megatron.train_step import FrozenModel
from nemo_rmt.run_folder import write_json
from nemo_rmt.stages.job import StageJob


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
        self._sound: set[Path] = set()

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

    def packed_batch(self, trees: list[TokenTree]) -> tuple[TokenBatch, int]:
        """This rank's share of all data-parallel ranks' trees in rows of the stage's sequence_length, on this device,
        and how many of the rows make a micro-batch: as many micro-batches on every rank. Collective.

        A tree longer than a row is split. The ranks' shares are about as much work. Raises UserError for a tree of
        which a branch does not fit.
        """
        limit, key = self.settings.sequence_length, f"{self.job.stage}.sequence_length"
        pieces = self._share([piece for tree in trees for piece in split_tree(tree, limit, key)])
        # A rank without any tree still takes part, with padding.
        pieces = pieces or [TokenTree([self.tokenizer.pad], [])]
        rows = int(max_over_data_parallel(len(first_fit_decreasing([len(piece) for piece in pieces], limit))))
        count, size = self.micro_batches(rows)
        multiple = self.recipe.parallel.tensor if self.recipe.parallel.sequence else 1
        batch = pack_trees(pieces, limit, self.tokenizer.pad, multiple, rows=count * size, key=key)
        return batch.narrowed(self.width_multiple).to(self.layout.device), size

    def micro_batches(self, rows: int) -> tuple[int, int]:
        """How many micro-batches packed rows make, and of how many rows each: of the stage's micro_batch_size at most,
        but not fewer than a pipeline has ranks, where there are as many rows, and with interleaving a multiple of
        that."""
        parallel = self.recipe.parallel
        count = max(-(-rows // self.settings.micro_batch_size), min(rows, parallel.pipeline))
        if parallel.virtual_pipeline:
            count = -(-count // parallel.pipeline) * parallel.pipeline
        return count, -(-rows // count)

    def _share(self, trees: list[TokenTree]) -> list[TokenTree]:
        """This rank's part of all ranks' trees, balanced by the FLOPs of training on them."""
        layout = self.layout
        if layout.data_size == 1:
            return trees
        trees = gather_over_data_parallel(trees)
        costs = [training_cost(self.recipe.model, self.vocab_size, len(tree), tree.attended) for tree in trees]
        return [trees[index] for index in balanced(costs, layout.data_size)[layout.data_rank]]

    def frozen_model(self, checkpoint: Path, *, offload: bool = False) -> FrozenModel:
        """A model for forward passes only, in this run's layout. offload: keep its weights in host memory meanwhile."""
        self.require_compatible(checkpoint)  # before time is spent on building it
        chunks = build_model(self.recipe.model, self.recipe.parallel, self.vocab_size)
        self.load_weights(checkpoint, chunks)
        return FrozenModel(chunks, self.recipe.parallel, offload=offload)

    def load_weights(self, checkpoint: Path, modules: list[nn.Module]) -> None:
        """Load another stage's weights. Raises UserError when the checkpoint does not fit this run, or is damaged."""
        self.require_compatible(checkpoint)
        self.require_sound(checkpoint)
        load_weights(checkpoint, modules)

    def require_sound(self, checkpoint: Path) -> None:
        """Raise UserError unless every file's checksum holds. Collective; reads each checkpoint once."""
        if checkpoint not in self._sound:
            require_sound(checkpoint)
            self._sound.add(checkpoint)

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
