"""``nemo-rmt data score``: a checkpoint's log-probability of every training token of a run, kept in a folder; with
``top_k`` also of the likeliest tokens in its place.

The folder is that of a stage named score, which runs on all ranks of the recipe's layout. Imports no torch.
"""

from __future__ import annotations

import functools
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemo_rmt import preflight
from nemo_rmt.compatibility import NOT_ARCHITECTURE, architecture, model_vocab_size, require_compatible
from nemo_rmt.config import Model, Recipe
from nemo_rmt.data.cache_blocks import kinds_of
from nemo_rmt.data.logprob_cache import FORMAT, MANIFEST, LogprobCache, begin
from nemo_rmt.errors import UserError
from nemo_rmt.exit_codes import DONE
from nemo_rmt.families import model_from_config
from nemo_rmt.launch.meeting import Meeting
from nemo_rmt.launch.node import take_part
from nemo_rmt.launch.ranks import worker_command
from nemo_rmt.launch.stage import Command, run_stage
from nemo_rmt.lone_stage import exit_status
from nemo_rmt.manifest import inspect_checkpoint
from nemo_rmt.recipe_io import validate
from nemo_rmt.reference_cache import is_published, model_digest, training_data
from nemo_rmt.run_folder import RunFolder, check_writable, nearest_existing, readable_size
from nemo_rmt.stages.job import StageJob


@dataclass(frozen=True)
class Scoring:
    """What to score, with what, and where to."""

    checkpoint: Path
    """The model: a checkpoint of ours, or a Hugging Face folder."""
    cache: Path
    """The folder to write, or to go on with."""
    sequence_length: int
    """Most tokens of a document that the model sees at once."""
    top_k: int = 0
    """How many of the likeliest tokens are kept in the place of each; 0: log-probabilities of the tokens alone."""

    @classmethod
    def of(
        cls, recipe: Recipe, checkpoint: str, cache: str, sequence_length: str | None = None, top_k: str | None = None
    ) -> Scoring:
        """From the command's words. Raises UserError for a number that is none, or too small."""
        given = str(recipe.anneal.sequence_length) if sequence_length is None else sequence_length
        longest, kept = _number(given, 2, "sequence_length"), 0 if top_k is None else _number(top_k, 1, "top_k")
        return cls(Path(checkpoint).absolute(), Path(cache).absolute(), longest, kept)


def _number(given: str, least: int, key: str) -> int:
    """A whole number from the command's words."""
    if not given.isdecimal() or int(given) < least:
        raise UserError(f"{key}={given} is not a whole number of {least} or more")
    return int(given)


def run_scoring(recipe: Recipe, scoring: Scoring, command: Command = worker_command) -> int:
    """Write the cache, or what is missing of it; returns the exit status as run_flywheel does.

    Raises UserError before anything is started when the run's data is not built, the model cannot score it, or the
    cache was begun as another one or has no room.
    """
    data = built_data(recipe)
    job = scoring_job(recipe, scoring, data)
    preflight.check_machine(job.recipe)
    guide = recipe.anneal.guide_key if recipe.anneal.guide is not None else "anneal.remit"

    def lead(meeting: Meeting) -> int:
        check_writable(scoring.cache, "cache")
        plan = cache_plan(job.recipe, scoring, data)
        with RunFolder(scoring.cache).lock() as lock:
            check_room(scoring.cache, plan, training_tokens(recipe))
            begin(scoring.cache, plan)
            if is_complete(scoring.cache):
                print(f"{scoring.cache} is complete: set {guide}.reference.cache={scoring.cache}")
                return DONE
            for name in (MANIFEST, "result.json"):
                (scoring.cache / name).unlink(missing_ok=True)
            stage_yaml = scoring.cache / "stage.yaml"
            job.save(stage_yaml)
            status = exit_status(run_stage(stage_yaml, job.recipe, command, meeting, lock), "data score")
        if status == DONE:
            print(f"wrote {scoring.cache}: set {guide}.reference.cache={scoring.cache}")
        return status

    check = functools.partial(preflight.check_machine, job.recipe)
    return take_part(scoring.cache, job.recipe, command, lead=lead, check=check)


def built_data(recipe: Recipe) -> Path:
    """The folder of the run's data stage. Raises UserError when that is not done, or the run is another recipe's."""
    run = RunFolder(Path(recipe.run_dir))
    state = preflight.check_state(recipe, run)
    if state is None or state.record(0, "data").status != "done" or run.result(0, "data") is None:
        raise UserError(
            f"run_dir={run.path} has no data to score yet: nemo-rmt data build {recipe.name} run_dir={run.path} first"
        )
    return run.stage_dir(0, "data").absolute()


def training_tokens(recipe: Recipe) -> int:
    """Tokens of the datasets that training reads, as the data stage counted them."""
    metrics = RunFolder(Path(recipe.run_dir)).result(0, "data")["metrics"]
    return int(sum(metrics[f"data/{corpus.name}/train_tokens"] for corpus in recipe.data.corpora if corpus.weight))


def check_room(folder: Path, plan: dict[str, Any], tokens: int) -> None:
    """Say what a cache takes; raise UserError unless what is not written of it has room."""
    needed = tokens * sum(kind.token_bytes for kind in kinds_of(plan))
    print(f"{tokens:,} tokens take {readable_size(needed)} in {folder}", flush=True)
    needed -= sum(path.stat().st_size for path in folder.glob("*/block_*"))
    free = shutil.disk_usage(nearest_existing(folder)).free
    if free < needed:
        remedy = "free some space, lower top_k" if plan["top_k"] else "free some space"
        raise UserError(
            f"cache={folder} has {readable_size(free)} free, {readable_size(needed)} are to come: {remedy}, or give "
            "another cache="
        )


def scoring_job(recipe: Recipe, scoring: Scoring, data: Path) -> StageJob:
    """The stage's job, whose recipe has the checkpoint's model. Raises UserError when that cannot score the data."""
    from nemo_rmt.data.tokenizer import Tokenizer  # here: the driver starts without the tokenizers' library

    checkpoint, tokenizer = scoring.checkpoint, Tokenizer.load(data / "tokenizer")
    model, longest = scoring_model(recipe.model, checkpoint)
    if scoring.sequence_length > longest:
        raise UserError(
            f"sequence_length={scoring.sequence_length} exceeds the {longest} positions of checkpoint={checkpoint}: "
            "give a smaller one"
        )
    if is_published(checkpoint):
        role = "published"
        if tokenizer.vocab_size > model.vocab_size:
            raise UserError(
                f"checkpoint={checkpoint} predicts over {model.vocab_size} tokens, the run's tokenizer has "
                f"{tokenizer.vocab_size}: score with a model of that tokenizer"
            )
        if (checkpoint / "tokenizer.json").is_file():
            theirs = Tokenizer.load(checkpoint).fingerprint
            if theirs != tokenizer.fingerprint:
                raise UserError(
                    f"checkpoint={checkpoint} has another tokenizer (fingerprint {theirs[:12]}, the run's is "
                    f"{tokenizer.fingerprint[:12]}): build the data with tokenizer.path={checkpoint}"
                )
    else:
        role = "checkpoint"
        require_compatible(checkpoint, model, tokenizer.vocab_size, tokenizer.fingerprint)
    vocab_size = model_vocab_size(model, tokenizer.vocab_size)
    if scoring.top_k > vocab_size:
        raise UserError(
            f"top_k={scoring.top_k} exceeds the {vocab_size} tokens that checkpoint={checkpoint} predicts over"
        )
    own = validate(Recipe, {**recipe.model_dump(), "model": model.model_dump()})
    inputs = {"data": str(data), role: str(checkpoint)}
    return StageJob(stage="score", iteration=0, run_dir=".", inputs=inputs, recipe=own)


def scoring_model(model: Model, checkpoint: Path) -> tuple[Model, int]:
    """A checkpoint's architecture, computed as the recipe's ``model`` says; and how many positions it has.

    Raises UserError when the folder holds no model.
    """
    if is_published(checkpoint):
        found = model_from_config(checkpoint)
    else:
        try:
            info = inspect_checkpoint(checkpoint)
        except UserError as error:
            raise UserError(f"{error}; checkpoint= takes a checkpoint of ours or a Hugging Face folder") from None
        known = {key: value for key, value in info.model.items() if key in Model.model_fields}
        found = Model(**{**known, "vocab_size": info.vocab_size})
    computed = {key: getattr(model, key) for key in NOT_ARCHITECTURE - {"vocab_size"}}
    return found.model_copy(update=computed), found.max_position


def cache_plan(recipe: Recipe, scoring: Scoring, data: Path) -> dict[str, Any]:
    """What the cache is of: see ``nemo_rmt.data.logprob_cache``. recipe: the job's."""
    from nemo_rmt.data.tokenizer import Tokenizer

    tokenizer = Tokenizer.load(data / "tokenizer")
    return {
        "format": FORMAT,
        "corpora": {name: {"dataset": found} for name, found in training_data(recipe, data).items()},
        "tokenizer": tokenizer.fingerprint,
        "vocab_size": model_vocab_size(recipe.model, tokenizer.vocab_size),
        "model": {
            "digest": model_digest(scoring.checkpoint, "checkpoint"),
            "path": str(scoring.checkpoint),
            "architecture": architecture(recipe.model.model_dump()),
        },
        "precision": recipe.model.fp8 or recipe.model.precision,
        "sequence_length": scoring.sequence_length,
        "top_k": scoring.top_k,
        "overlap": scoring.sequence_length - scoring.sequence_length // 2,
    }


def is_complete(folder: Path) -> bool:
    """Whether a cache can be read. One whose blocks have been lost since is not."""
    try:
        LogprobCache(folder)
    except UserError:
        return False
    return True
