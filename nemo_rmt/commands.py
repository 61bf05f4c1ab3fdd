"""What each command of ``nemo-rmt`` does with the words it is given."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import TYPE_CHECKING

from nemo_rmt.config import Recipe
from nemo_rmt.errors import UserError

if TYPE_CHECKING:
    from nemo_rmt.scoring import Scoring


class Starter:
    """How commands start stages: one after the other, on this machine. ``nemo rmt`` has another."""

    def run_flywheel(self, recipe: Recipe, *, dry_run: bool) -> int:
        """Every stage of the recipe; returns as nemo_rmt.flywheel.run_flywheel does."""
        from nemo_rmt.flywheel import run_flywheel

        return run_flywheel(recipe, dry_run=dry_run)

    def run_one_stage(self, recipe: Recipe, stage: str, iteration: int, *, download: bool = False) -> int:
        """One stage of the recipe."""
        from nemo_rmt.flywheel import run_one_stage

        return run_one_stage(recipe, stage, iteration, download=download)

    def run_stage_file(self, path: Path) -> int:
        """A saved stage.yaml."""
        from nemo_rmt.lone_stage import run_stage_file

        return run_stage_file(path)

    def run_scoring(self, recipe: Recipe, scoring: Scoring) -> int:
        """A cache of log-probabilities."""
        from nemo_rmt.scoring import run_scoring

        return run_scoring(recipe, scoring)


def _recipe(args: argparse.Namespace, items: list[str]) -> Recipe:
    """The recipe that a command's words describe: at most one name, then overrides."""
    from nemo_rmt.recipe_io import load_recipe

    names = [item for item in items if "=" not in item]
    if len(names) > 1:
        raise UserError(f"one recipe expected, got {', '.join(names)}; overrides have the form key=value")
    if not names and not args.yaml:
        raise UserError(f"name a recipe (nemo-rmt {args.command} tiny) or give --yaml FILE; see nemo-rmt recipes list")
    overrides = [item for item in items if "=" in item]
    if getattr(args, "profile", False):
        overrides.append("tracking.profile=true")
    return load_recipe(names[0] if names else None, args.yaml, overrides)


def flywheel(args: argparse.Namespace) -> int:
    """Every stage of a recipe."""
    return args.starter.run_flywheel(_recipe(args, args.items), dry_run=args.dry_run)


def stage(args: argparse.Namespace) -> int:
    """One stage of a recipe, or a saved stage.yaml."""
    if not args.items:
        raise UserError("name a stage (nemo-rmt stage anneal tiny --iteration 1) or give a stage.yaml")
    first, *items = args.items
    if first.endswith((".yaml", ".yml")):
        if items or args.yaml:
            raise UserError(f"{first} is complete: it takes no recipe and no overrides")
        if args.profile:
            raise UserError(f"{first} is complete: instead of --profile set tracking.profile: true in its recipe")
        return args.starter.run_stage_file(Path(first))
    return args.starter.run_one_stage(_recipe(args, items), first, args.iteration)


def data(args: argparse.Namespace) -> int:
    """A recipe's tokenizer and token files, or a cache of their log-probabilities."""
    from nemo_rmt.data.tables import DOWNLOAD_VARIABLE

    if args.items[:1] == ["score"]:
        return _score(args, args.items[1:])
    if args.items[:1] != ["build"]:
        raise UserError(f"data takes build or score, got {' '.join(args.items) or 'nothing'}: nemo-rmt data build tiny")
    os.environ[DOWNLOAD_VARIABLE] = "1"  # the stage's process inherits it
    return args.starter.run_one_stage(_recipe(args, args.items[1:]), "data", 0, download=True)


def _score(args: argparse.Namespace, items: list[str]) -> int:
    from nemo_rmt.scoring import Scoring

    own = ("checkpoint", "cache", "sequence_length", "top_k")
    given = dict(item.split("=", 1) for item in items if item.split("=", 1)[0] in own and "=" in item)
    if missing := [key for key in own[:2] if not given.get(key)]:
        raise UserError(f"data score needs {missing[0]}=FOLDER (see nemo-rmt data --help)")
    recipe = _recipe(args, [item for item in items if item.split("=", 1)[0] not in given])
    return args.starter.run_scoring(recipe, Scoring.of(recipe, **given))


def experiment(args: argparse.Namespace) -> int:
    """An experiment's arms and seeds, and their table."""
    from nemo_rmt.experiment import ExperimentOptions, as_words, list_experiments, run_experiment
    from nemo_rmt.recipe_io import read_yaml

    names = [item for item in args.items if "=" not in item]
    if not args.items and not args.yaml:
        return list_experiments()
    if len(names) != 1:
        raise UserError(f"one experiment expected, got {', '.join(names) or 'none'}; overrides have the form key=value")
    overrides = [word for path in args.yaml for word in as_words(read_yaml(path))]
    overrides += [item for item in args.items if "=" in item]
    options = ExperimentOptions(
        overrides=overrides,
        seeds=args.seeds,
        arms=args.arms,
        control=args.control,
        jobs=args.jobs,
        out=args.out,
        dry_run=args.dry_run,
    )
    return run_experiment(names[0], options)


def plan(args: argparse.Namespace) -> int:
    """What a recipe needs, and what is missing."""
    from nemo_rmt.plan import run_plan

    return run_plan(_recipe(args, args.items))


def load(args: argparse.Namespace) -> int:
    """A checkpoint from a Hugging Face folder."""
    from nemo_rmt.conversion import run_import

    return run_import(_folders(args, "HF_FOLDER", "CHECKPOINT", {"precision", "tensor", "pipeline"}))


def export(args: argparse.Namespace) -> int:
    """A Hugging Face folder from a checkpoint."""
    from nemo_rmt.conversion import run_export

    return run_export(_folders(args, "CHECKPOINT", "HF_FOLDER", {"precision", "tensor", "pipeline", "tokenizer"}))


def _folders(args: argparse.Namespace, source: str, target: str, options: set[str]) -> dict[str, str]:
    """The words of a conversion, by key. source, target: what its folders hold. options: keys that may be left out."""
    given = dict(item.split("=", 1) for item in args.items if "=" in item)
    if args.yaml or len(given) < len(args.items) or set(given) - options != {"source", "target"}:
        raise UserError(
            f"{args.command} takes source={source}, target={target} and, if need be, "
            f"{', '.join(f'{key}=' for key in sorted(options))} (see nemo-rmt {args.command} --help)"
        )
    return given


def evaluate(args: argparse.Namespace) -> int:
    """The evaluate stage of an iteration."""
    recipe = _recipe(args, args.items)
    return args.starter.run_one_stage(
        recipe, "evaluate", recipe.iterations - 1 if args.iteration is None else args.iteration
    )


def _run_dir(args: argparse.Namespace) -> Path | None:
    """The run folder that a command was given instead of a recipe, if it was."""
    alone = len(args.items) == 1 and not args.yaml
    return Path(args.items[0]) if alone and Path(args.items[0]).is_dir() else None


def status(args: argparse.Namespace) -> int:
    """How far a run is."""
    from nemo_rmt.status import print_plain, print_table, recipe_of_run, stage_statuses

    folder = _run_dir(args)
    recipe = _recipe(args, args.items) if folder is None else recipe_of_run(folder)
    statuses = stage_statuses(recipe)
    if args.plain:
        print_plain(statuses)
    else:
        print_table(recipe, statuses)
    return 0


def report(args: argparse.Namespace) -> int:
    """A run's report."""
    from nemo_rmt.run_folder import RunFolder

    folder = _run_dir(args) or Path(_recipe(args, args.items).run_dir)
    run = RunFolder(folder)
    if run.load_state() is None:
        raise UserError(f"{folder} is not a run folder: it has no state.json")
    from nemo_rmt.report import write_report  # plotting libraries take a second to load

    write_report(run.path)
    print(run.report_path)
    return 0


def list_recipes(args: argparse.Namespace) -> int:
    """The recipes, or one of them."""
    from nemo_rmt import recipes
    from nemo_rmt.overview import print_recipes
    from nemo_rmt.recipe_io import resolved_yaml

    what, *items = args.items or ["list"]
    if what == "list" and not items:
        print_recipes()
    elif what == "show":
        recipe = _recipe(args, items)
        if recipe.name in recipes.names():
            print("\n".join(f"# {line}".rstrip() for line in recipes.about(recipe.name).splitlines()) + "\n")
        print(resolved_yaml(recipe, comments=True), end="")
    else:
        raise UserError(f"recipes takes list or show, got {' '.join(args.items)}")
    return 0
