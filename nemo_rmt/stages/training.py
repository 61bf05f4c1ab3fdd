"""The loop around the steps of a training stage: resume, log, note what was skipped, save, stop when asked to."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path

from nemo_rmt import profiling, pulse, stopping
from nemo_rmt.compatibility import IMPORTED
from nemo_rmt.errors import Diverged, UserError
from nemo_rmt.megatron.checkpoint import Checkpoints, load_training, sound_checkpoint
from nemo_rmt.megatron.model import build_model
from nemo_rmt.megatron.runtime import gather_over_data_parallel, max_over_ranks
from nemo_rmt.megatron.train_step import TrainedModel
from nemo_rmt.model_flops import training_flops
from nemo_rmt.stages.session import Session
from nemo_rmt.tracking import SAMPLES, SKIPPED, Metrics

logger = logging.getLogger(__name__)

Samples = Callable[[], list[tuple[int, str]]]
"""What this data-parallel rank's part of a step was made of: each sample's place in the step's global order, and who it
is. A place may have several, which stay in their order."""


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
        resumed = sound_checkpoint(session.folder)
        if start is not None and resumed is None and not with_optimizer:
            with profiling.part("checkpoint"):
                session.load_weights(start, chunks)  # before the optimizer copies them into its fp32 main parameters
        updates = self.settings.steps * updates_per_step
        self.model = TrainedModel(chunks, recipe.model, recipe.parallel, self.settings.optim, updates)
        self.token_flops = updates_per_step * training_flops(
            recipe.model, session.vocab_size, self.settings.sequence_length
        )
        self.done, self.tokens, self.wall_s = 0, 0, 0.0
        self.metrics: dict[str, float] = {}
        if resumed is not None:
            with profiling.part("checkpoint"):
                progress = load_training(resumed, self.model, with_schedule=True)
            self.done, self.tokens, self.wall_s = progress["step"], progress["tokens"], progress["wall_s"]
            self.metrics = progress["metrics"]  # the result's, when the last step was saved but the result was not
            self.model.guard.restore(progress["guard"])
        elif start is not None and with_optimizer:
            with profiling.part("checkpoint"):
                session.require_sound(start)
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
        self.saved = self.done

    def steps(self) -> Iterator[int]:
        """The steps still to do, from 0. After each the caller must have called ``record``; ends with result.json.

        When any rank was asked to stop (see ``nemo_rmt.stopping``), raises Stopped on all of them before the next step,
        with what was done saved.
        """
        total, self.title = self.settings.steps, f"{self.session.job.iteration}/{self.session.job.stage}"
        with (
            stopping.waiting(),
            Metrics(
                self.session.folder,
                self.session.recipe.tracking,
                title=self.title,
                total_steps=total,
                resume_step=self.done,
                enabled=self.session.layout.rank == 0,
            ) as self.tracker,
        ):
            self.clock = time.perf_counter()
            for step in range(self.done, total):
                if max_over_ranks([stopping.requested()])[0]:
                    self._stop()
                pulse.tick(f"step {step + 1} of {total}")
                profiling.step()
                yield step
                if self.done != step + 1:
                    raise RuntimeError(f"step {step} ended without a record")
                with profiling.part("checkpoint"):
                    self.checkpoints.poll()
                    if self.done % self.settings.checkpoint_interval == 0 or self.done == total:
                        self._save()
            with profiling.part("checkpoint"):
                self.checkpoints.finish()
            self.session.finish(self.metrics, checkpoint=self.last, wall_s=self.wall_s, tokens=self.tokens)

    def record(self, metrics: dict[str, float], *, tokens: int, samples: Samples) -> None:
        """Log one finished step, and its samples when they are asked for or it was skipped.

        Args:
            metrics: by "group/name", or bare names for the group "train". Lists (histograms) become name_00, ...
            tokens: tokens the step processed over all ranks.
            samples: of this rank; called only when they are needed, then on every rank.

        Raises Diverged, on every rank, after ``optim.max_skipped`` skipped steps in a row.
        """
        with profiling.part("logging"):
            flat = self._log(metrics, tokens)
            self._note_samples(samples)
        if self.model.guard.in_a_row >= self.settings.optim.max_skipped:
            self.checkpoints.finish()
            raise Diverged(
                f"{self.model.guard.in_a_row} optimizer steps in a row were skipped, the last at step {self.done} of "
                f"{self.settings.steps} (loss {flat.get('train/loss', math.nan):.4g}, gradient norm "
                f"{flat['train/grad_norm']:.4g}, lr {flat['train/lr']:.4g}): why and what they were made of is in "
                f"{self.session.folder / SKIPPED}; last checkpoint: {self.last or 'none'}"
            )

    def _log(self, metrics: dict[str, float], tokens: int) -> dict[str, float]:
        """Count and log a finished step; returns what was logged."""
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
        flat |= self._utilisation(tokens / seconds)
        flat["train/skipped_steps"] = self.model.guard.skipped_steps
        self.metrics = {name: value for name, value in flat.items() if "_hist_" not in name and math.isfinite(value)}
        self.tracker.log(self.done, flat)
        return flat

    def _utilisation(self, tokens_per_s: float) -> dict[str, float]:
        """``train/model_tflops_per_s`` of one process and, on GPUs, its share of their peak, ``train/mfu``.

        The FLOPs are those of training on the step's tokens, see ``training_flops``; a token's context is the whole row
        by convention, also where rows hold several documents or a tree's branches, which see less of it. Rollouts and
        scoring take their time here but count no FLOPs: ``rollout/tokens_per_s`` is theirs.
        """
        layout, peak = self.session.layout, self.session.recipe.cluster.gpu_tflops
        tflops = tokens_per_s * self.token_flops / layout.world_size / 1e12
        found = {"train/model_tflops_per_s": tflops}
        return found | {"train/mfu": tflops / peak} if layout.device.type == "cuda" else found

    def _note_samples(self, samples: Samples) -> None:
        """Write what the finished step was made of, where it was skipped or all steps are asked for."""
        skipped, wanted = self.model.guard.report(), self.session.recipe.tracking.samples
        if not skipped and not wanted:
            return
        ordered = sorted(gather_over_data_parallel(samples()), key=lambda pair: pair[0])
        ids = [sample for _, sample in ordered]
        if wanted:
            self.tracker.append(SAMPLES, {"step": self.done, "samples": ids})
        for each in skipped:
            self.tracker.append(SKIPPED, {"step": self.done, **asdict(each), "samples": ids})
            if self.session.layout.rank == 0:
                line = f"[{self.title}] step {self.done} skipped: {each.reason}"
                logger.warning(line)
                print(line, flush=True)

    def _save(self) -> None:
        """Save the training state after the last finished step."""
        guard = self.model.guard.state()
        progress = {"tokens": self.tokens, "wall_s": self.wall_s, "metrics": self.metrics, "guard": guard}
        self.last, self.saved = self.checkpoints.save(self.done, self.model, progress), self.done

    def keep(self) -> None:
        """Save what this start has done, before it ends early."""
        with profiling.part("checkpoint"):
            if self.saved < self.done:
                self._save()
            self.checkpoints.finish()

    def _stop(self) -> None:
        """Leave as asked."""
        self.keep()
        raise stopping.Stopped(f"request after step {self.done} of {self.settings.steps}")
