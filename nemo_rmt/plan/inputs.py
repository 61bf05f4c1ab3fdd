"""What a run reads from outside, and whether it is there, whole, and agrees with the recipe.

``preflight`` stops at the first that is not, before a stage starts; ``plan`` lists all of them.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from nemo_rmt.compatibility import IMPORTED, model_vocab_size, require_compatible
from nemo_rmt.config import EARLIER_MODELS, Corpus, Recipe, Task
from nemo_rmt.errors import UserError
from nemo_rmt.reference_cache import cached_reference, model_digest, open_reference
from nemo_rmt.stages.lm_eval import tasks as lm_eval_tasks

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Check:
    """One input of a run."""

    run: Callable[[], object]
    """Raises UserError unless it is there, whole, and agrees with the rest."""
    paths: dict[str, str] = field(default_factory=dict)
    """The files and folders it reads, by the recipe's key."""
    of_training: bool = False
    """Whether the data stage does without it."""


def input_checks(recipe: Recipe, *, data_built: bool = False, download: bool = False) -> list[Check]:
    """What a run reads: corpora (unless its data stage is done), tasks, scores, caches, tokenizer and checkpoints.

    download: corpora of the Hugging Face hub may be fetched by the data stage.
    """
    checks = [] if data_built else _corpora(recipe, download)
    checks += [Check(functools.partial(_check_tasks, recipe))]
    checks += [_task(task) for task in recipe.data.tasks]
    if recipe.sft.enabled:
        path = recipe.data.sft_path
        paths = {} if path is None else {"data.sft_path": path}
        checks.append(Check(functools.partial(_check_sft, recipe), paths, of_training=True))
    if recipe.rmt.enabled and (scores := recipe.rmt.difficulty.scores) is not None:
        paths = {"rmt.difficulty.scores": scores}
        checks.append(Check(functools.partial(_check_scores, scores), paths, of_training=True))
    if (reference := cached_reference(recipe)) is not None:
        key = f"{recipe.anneal.guide_key}.reference"
        paths = {f"{key}.cache": reference.cache}
        checks.append(Check(functools.partial(open_reference, recipe, Path(reference.cache)), paths, of_training=True))
        if reference.checkpoint is not None:
            key, folder = f"{key}.checkpoint", reference.checkpoint
            checks.append(Check(functools.partial(model_digest, Path(folder), key), {key: folder}, of_training=True))
    if recipe.evaluate.lm_eval.enabled:
        include = recipe.evaluate.lm_eval.include
        paths = {} if include is None else {"evaluate.lm_eval.include": include}
        checks.append(Check(functools.partial(lm_eval_tasks.check_tasks, recipe), paths, of_training=True))
    return checks + _tokenizer_and_checkpoints(recipe)


def _corpora(recipe: Recipe, download: bool) -> list[Check]:
    if not recipe.data.corpora:
        return [Check(_refuse_no_corpora)]
    return [
        Check(
            functools.partial(_check_corpus, recipe, corpus, download),
            {} if corpus.path is None or corpus.kind == "hub" else {f"data.corpora[{corpus.name}].path": corpus.path},
        )
        for corpus in recipe.data.corpora
    ]


def _refuse_no_corpora() -> None:
    raise UserError("data.corpora is empty: name at least one corpus, or start from a recipe such as tiny")


def _check_corpus(recipe: Recipe, corpus: Corpus, download: bool) -> None:
    from nemo_rmt.data.corpora import check_corpus  # data code is loaded for runs only

    check_corpus(corpus, recipe.data, download=download)


def _check_tasks(recipe: Recipe) -> None:
    if recipe.rl.enabled and not recipe.data.tasks:
        raise UserError("data.tasks is empty: RL needs at least one task, for example [{name: chains}]")


def _task(task: Task) -> Check:
    def run() -> None:
        from nemo_rmt.data.tasks import make_task

        make_task(task)

    given = {"options": task.options, "longer": task.longer or {}}
    files = {
        f"data.tasks[{task.name}].{where}.path": options["path"]
        for where, options in given.items()
        if "path" in options
    }
    return Check(run, {key: path for key, path in files.items() if isinstance(path, str)})


def _check_sft(recipe: Recipe) -> None:
    from nemo_rmt.data.sft import SFTExamples

    SFTExamples(recipe.data, recipe.seed)  # reads every line of sft_path


def _check_scores(scores: str) -> None:
    if not (Path(scores) / "difficulty.json").is_file():
        raise UserError(
            f"rmt.difficulty.scores={scores} has no difficulty.json: give the folder of an earlier run's scores "
            "(iteration_000/data/difficulty/...), or null to score the corpora"
        )


def _tokenizer_and_checkpoints(recipe: Recipe) -> list[Check]:
    """tokenizer.path, and the checkpoints given as folders."""
    path, given = recipe.tokenizer.path, _given_checkpoints(recipe)
    if path is None:
        return [Check(functools.partial(_refuse_new_tokenizer, key, folder)) for key, folder in given.items()]
    tokenizer = {"tokenizer.path": path}
    return [Check(functools.partial(_check_tokenizer, recipe), tokenizer)] + [
        Check(functools.partial(_check_checkpoint, recipe, key, folder), {**tokenizer, key: folder}, of_training=True)
        for key, folder in given.items()
    ]


def _given_checkpoints(recipe: Recipe) -> dict[str, str]:
    """Checkpoint folders from outside of the run, by key."""
    given = {}
    if recipe.pretrain.checkpoint is not None:
        given["pretrain.checkpoint"] = recipe.pretrain.checkpoint
    guide = recipe.anneal.guide if recipe.anneal.enabled else None
    if guide is not None and isinstance(guide.reference, str):
        if guide.reference not in EARLIER_MODELS:
            given[f"{recipe.anneal.guide_key}.reference"] = guide.reference
        elif recipe.iterations == 1:
            logger.info("note: with iterations=1 there is no earlier RL model, so the only anneal is uniform")
    if recipe.rmt.enabled and recipe.rmt.difficulty.scorer != "start":
        given["rmt.difficulty.scorer"] = recipe.rmt.difficulty.scorer
    return given


def _refuse_new_tokenizer(key: str, folder: str) -> None:
    raise UserError(
        f"{key}={folder} needs the tokenizer it was trained with, and tokenizer.path is null (a new one would "
        "be trained): set tokenizer.path to that run's iteration_000/data/tokenizer"
    )


def _check_tokenizer(recipe: Recipe) -> None:
    from nemo_rmt.data.thoughts import branch_prompt
    from nemo_rmt.data.tokenizer import Tokenizer

    tokenizer = Tokenizer.load(_tokenizer_folder(recipe.tokenizer.path))
    model_vocab_size(recipe.model, tokenizer.vocab_size)
    if recipe.rmt.enabled and recipe.rmt.objective == "rmt":
        branch_prompt(tokenizer, recipe.rmt.prompt, recipe.rmt.budget.initial)  # needs <think> and </think>


def _check_checkpoint(recipe: Recipe, key: str, folder: str) -> None:
    from nemo_rmt.data.tokenizer import Tokenizer

    tokenizer = Tokenizer.load(_tokenizer_folder(recipe.tokenizer.path))
    info = require_compatible(Path(folder), recipe.model, tokenizer.vocab_size, tokenizer.fingerprint, key)
    resumes = recipe.anneal.enabled and recipe.anneal.resume_optimizer
    if key == "pretrain.checkpoint" and info.stage == IMPORTED and resumes:
        raise UserError(
            f"{key}={folder} holds imported weights, which come without optimizer states: set "
            "anneal.resume_optimizer=false (and perhaps anneal.optim.warmup_steps)"
        )


def _tokenizer_folder(path: str) -> Path:
    if not (Path(path) / "tokenizer.json").is_file():
        raise UserError(f"tokenizer.path={path} is not a tokenizer folder: it has no tokenizer.json")
    return Path(path)


def tokenizer_size(recipe: Recipe) -> int:
    """Tokens of the given tokenizer, or where there is none yet, those that the recipe expects."""
    path = recipe.tokenizer.path
    if path is None or not (Path(path) / "tokenizer.json").is_file():
        return recipe.tokenizer.vocab_size
    from nemo_rmt.data.tokenizer import Tokenizer

    return Tokenizer.load(Path(path)).vocab_size
