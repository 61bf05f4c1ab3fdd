"""What cannot work, and what is still to be done before a recipe can start."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path

from nemo_rmt import preflight, recipes
from nemo_rmt.config import Recipe
from nemo_rmt.errors import UserError
from nemo_rmt.plan.inputs import input_checks
from nemo_rmt.plan.parameters import Widths, padded_rows
from nemo_rmt.run_folder import RunFolder

CACHES = "anneal.*.reference.cache"
REMEDIES = {
    "tokenizer.path": "give the folder of the model's tokenizer.json",
    "pretrain.checkpoint": "make it with nemo-rmt import source=HF_FOLDER target={path}",
    CACHES: "make it with nemo-rmt data score {recipe} checkpoint=RL_MODEL cache={path}, once the data is built",
    "anneal.*.reference*": "make it with nemo-rmt import source=HF_FOLDER target={path}",
    "rmt.difficulty.scorer": "make it with nemo-rmt import source=HF_FOLDER target={path}",
    "rmt.difficulty.scores": "give the difficulty folder of an earlier run's data stage",
    "data.sft_path": 'put a file of {{"messages": [...]}} lines there',
    "data.tasks*": "put a file of questions and answers there",
    "data.corpora*": "put the corpus there",
    "evaluate.lm_eval.include": "put the task YAMLs there",
}
"""Where what a key names comes from: by the first pattern that fits the key."""


@dataclass
class Findings:
    """Lines for people."""

    problems: list[str] = field(default_factory=list)
    """What is wrong, with what to change: the recipe cannot work."""
    before: list[str] = field(default_factory=list)
    """What the recipe counts on and is not here yet, with what to do."""

    def run(self, check: Callable[[], object]) -> None:
        """Keep what a check refuses."""
        try:
            check()
        except UserError as error:
            if str(error) not in self.problems:
                self.problems.append(str(error))


def check_all(recipe: Recipe, vocab_size: int) -> Findings:
    """Everything but memory. How many nodes and GPUs this machine has does not count."""
    findings = Findings(layout_problems(recipe, vocab_size))
    findings.run(lambda: preflight.check_accelerator(recipe))
    findings.run(lambda: preflight.check_lengths(recipe))
    findings.run(lambda: preflight.check_published(recipe))
    state = None
    try:
        state = preflight.check_state(recipe, RunFolder(Path(recipe.run_dir)))
    except UserError as error:
        findings.problems.append(str(error))
    built = state is not None and state.record(0, "data").status == "done"
    own = _own_paths(recipe)
    for check in input_checks(recipe, data_built=built, download=True):
        missing = {key: path for key, path in check.paths.items() if not Path(path).expanduser().exists()}
        if not missing:
            findings.run(check.run)
        for key, path in missing.items():
            # A cache is made of the data that the run builds first.
            lines = findings.before if own.get(key) == path or fnmatchcase(key, CACHES) else findings.problems
            line = f"{key}={path} is not there: {_remedy(key, path, recipe)}"
            if line not in lines:
                lines.append(line)
    hub = [corpus for corpus in recipe.data.corpora if corpus.kind == "hub"]
    if hub and not built:
        names = ", ".join(dict.fromkeys(corpus.path or "" for corpus in hub))
        findings.before.append(f"nemo-rmt data build {recipe.name} (where there is internet; downloads {names})")
    return findings


def layout_problems(recipe: Recipe, vocab_size: int) -> list[str]:
    """Divisions that do not work out and that the recipe itself does not refuse."""
    model, p, problems = recipe.model, recipe.parallel, []
    rows, w = padded_rows(vocab_size), Widths.of(model, p.tensor)
    if rows % p.tensor:
        problems.append(
            f"parallel.tensor={p.tensor} does not divide the embedding's {rows} rows ({vocab_size} tokens, padded to "
            "a multiple of 128): use a power of two"
        )
    if model.fp8 is None:
        return problems
    for size, what in ((w.query, "query"), (w.query + 2 * w.key, "query, key and value")):
        if size % 16:
            problems.append(
                f"model.fp8={model.fp8}: the {what} heads of one rank have {size} numbers, which is not a multiple of "
                f"16: choose another parallel.tensor than {p.tensor}, or model.fp8=null"
            )
    return problems


def _own_paths(recipe: Recipe) -> dict[str, str]:
    """The paths that the recipe of this name has by itself, by key."""
    if recipe.name not in recipes.RECIPES:
        return {}
    return {key: path for check in input_checks(recipes.build(recipe.name)) for key, path in check.paths.items()}


def _remedy(key: str, path: str, recipe: Recipe) -> str:
    """Where what a path names comes from."""
    checkpoint = recipe.pretrain.checkpoint
    if key == "tokenizer.path" and checkpoint is not None and Path(checkpoint) in Path(path).parents:
        return "it comes with pretrain.checkpoint"
    text = next(text for pattern, text in REMEDIES.items() if fnmatchcase(key, pattern))
    return text.format(path=path, recipe=recipe.name)
