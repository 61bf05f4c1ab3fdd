"""The command line: ``nemo-rmt COMMAND [RECIPE] [--yaml FILE]... [key=value]...``.

Exit codes: 0 done, 1 a stage failed, 2 wrong input (nothing was trained), 75 stopped on request (SIGUSR1 or SIGTERM) at
a checkpoint, start it again to continue, 128 + n stopped at once by signal n.
"""

from __future__ import annotations

import argparse
import errno
import logging
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from nemo_rmt import __version__
from nemo_rmt.config import Recipe
from nemo_rmt.errors import UserError
from nemo_rmt.exit_codes import FAILED, WRONG_INPUT

if TYPE_CHECKING:
    from nemo_rmt.scoring import Scoring


class _Parser(argparse.ArgumentParser):
    """A parser whose errors are printed like every other wrong input."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (see {self.prog} --help)")


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


def main(argv: list[str] | None = None, starter: Starter | None = None) -> int:
    """Run one command and return its exit code. ``starter``: what starts its stages, if it has any."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        args = _parse(sys.argv[1:] if argv is None else argv)
        args.starter = starter or Starter()
        return args.run(args)
    except UserError as error:
        print(f"nemo-rmt: error: {error}", file=sys.stderr)
        return WRONG_INPUT
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EROFS):
            raise
        print(f"nemo-rmt: error: {error}: the run folder cannot be written; make room and start again", file=sys.stderr)
        return FAILED


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = _Parser(prog="nemo-rmt", description="Reinforcement-guided mid-training on Megatron-Core.")
    parser.add_argument("--version", action="version", version=f"nemo-rmt {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    flywheel = _command(commands, "flywheel", _flywheel, "run, or continue, every stage of a recipe")
    flywheel.add_argument("--dry-run", action="store_true", help="print the resolved chain, check it, start nothing")
    _may_profile(flywheel)

    stage = _command(
        commands, "stage", _stage, "run one stage of a recipe whose inputs are done, or a saved stage.yaml alone"
    )
    stage.usage = (
        "nemo-rmt stage NAME [RECIPE] [--iteration K] [--profile] [--yaml FILE]... [key=value]...\n"
        "       nemo-rmt stage STAGE.yaml"
    )
    stage.add_argument("--iteration", type=int, default=0, metavar="K", help="turn of the flywheel, from 0 (default)")
    _may_profile(stage)

    data = _command(
        commands,
        "data",
        _data,
        "build a recipe's tokenizer and token files, downloading what it names, or score them with a model for ReMiT",
    )
    data.usage = (
        "nemo-rmt data build [RECIPE] [--yaml FILE]... [key=value]...\n"
        "       nemo-rmt data score [RECIPE] checkpoint=MODEL cache=FOLDER [sequence_length=N] [--yaml FILE]... "
        "[key=value]...\n"
        "       checkpoint: a checkpoint or a Hugging Face folder; cache: new, or one that was begun with the same;\n"
        "       sequence_length: most tokens of a document that the model sees at once (anneal.sequence_length)"
    )

    evaluate = _command(commands, "evaluate", _evaluate, "measure an iteration's models (its evaluate stage)")
    evaluate.add_argument(
        "--iteration", type=int, default=None, metavar="K", help="turn of the flywheel (default: the last)"
    )
    _may_profile(evaluate)

    _command(commands, "plan", _plan, "check a recipe against a cluster: layout, memory, time, data; starts nothing")

    load = _command(commands, "import", _import, "make a checkpoint of a Hugging Face model")
    load.usage = (
        "nemo-rmt import source=HF_FOLDER target=CHECKPOINT [precision=bf16|fp32] [tensor=1] [pipeline=1]\n"
        "       precision: of the weights (bf16);\n"
        "       tensor, pipeline: sizes of the layout of local processes, on CPUs, that share the work"
    )

    export = _command(commands, "export", _export, "make a Hugging Face folder of a checkpoint")
    export.usage = (
        "nemo-rmt export source=CHECKPOINT target=HF_FOLDER [precision=bf16|fp32] [tensor=1] [pipeline=1] "
        "[tokenizer=FOLDER]\n"
        "       precision: of the weights (the checkpoint's); tensor, pipeline: as in import;\n"
        "       tokenizer: its folder, where neither the checkpoint nor its run has it"
    )

    status = _command(commands, "status", _status, "say how far every stage of a run is: RUN_DIR, or its recipe")
    status.usage = "nemo-rmt status RUN_DIR\n       nemo-rmt status [RECIPE] [--yaml FILE]... [key=value]..."
    status.add_argument("--plain", action="store_true", help="a line per stage for scripts: iteration, stage, status")

    report = _command(
        commands, "report", _report, "write the report of a run: RUN_DIR, or the recipe it was started from"
    )
    report.usage = "nemo-rmt report RUN_DIR\n       nemo-rmt report [RECIPE] [--yaml FILE]... [key=value]..."

    show = _command(commands, "recipes", _recipes, "list the recipes, or show one with every key's meaning")
    show.usage = "nemo-rmt recipes list\n       nemo-rmt recipes show [RECIPE] [--yaml FILE]... [key=value]..."

    args, rest = parser.parse_known_args(argv)
    unknown = [each for each in rest if each.startswith("-")]
    if unknown:
        raise UserError(f"unknown option {' '.join(unknown)} (see nemo-rmt {args.command} --help)")
    args.items += rest  # argparse leaves positionals after an option aside
    return args


def _command(commands: argparse._SubParsersAction, name: str, run: object, text: str) -> argparse.ArgumentParser:
    parser = commands.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
    parser.add_argument("items", nargs="*", metavar="[RECIPE] key=value", help="recipe name and overrides")
    parser.add_argument(
        "--yaml", action="append", type=Path, default=[], metavar="FILE", help="partial recipe; repeatable"
    )
    parser.set_defaults(run=run)
    return parser


def _may_profile(parser: argparse.ArgumentParser) -> None:
    """Give a command that starts stages the option to profile them."""
    parser.add_argument(
        "--profile", action="store_true", help="write where each stage's time goes (tracking.profile=true)"
    )


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


def _flywheel(args: argparse.Namespace) -> int:
    return args.starter.run_flywheel(_recipe(args, args.items), dry_run=args.dry_run)


def _stage(args: argparse.Namespace) -> int:
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


def _data(args: argparse.Namespace) -> int:
    from nemo_rmt.data.tables import DOWNLOAD_VARIABLE

    if args.items[:1] == ["score"]:
        return _score(args, args.items[1:])
    if args.items[:1] != ["build"]:
        raise UserError(f"data takes build or score, got {' '.join(args.items) or 'nothing'}: nemo-rmt data build tiny")
    os.environ[DOWNLOAD_VARIABLE] = "1"  # the stage's process inherits it
    return args.starter.run_one_stage(_recipe(args, args.items[1:]), "data", 0, download=True)


def _score(args: argparse.Namespace, items: list[str]) -> int:
    from nemo_rmt.scoring import Scoring

    own = ("checkpoint", "cache", "sequence_length")
    given = dict(item.split("=", 1) for item in items if item.split("=", 1)[0] in own and "=" in item)
    if missing := [key for key in own[:2] if not given.get(key)]:
        raise UserError(f"data score needs {missing[0]}=FOLDER (see nemo-rmt data --help)")
    recipe = _recipe(args, [item for item in items if item.split("=", 1)[0] not in given])
    return args.starter.run_scoring(recipe, Scoring.of(recipe, **given))


def _plan(args: argparse.Namespace) -> int:
    from nemo_rmt.plan import run_plan

    return run_plan(_recipe(args, args.items))


def _import(args: argparse.Namespace) -> int:
    from nemo_rmt.conversion import run_import

    return run_import(_folders(args, "HF_FOLDER", "CHECKPOINT", {"precision", "tensor", "pipeline"}))


def _export(args: argparse.Namespace) -> int:
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


def _evaluate(args: argparse.Namespace) -> int:
    recipe = _recipe(args, args.items)
    return args.starter.run_one_stage(
        recipe, "evaluate", recipe.iterations - 1 if args.iteration is None else args.iteration
    )


def _run_dir(args: argparse.Namespace) -> Path | None:
    """The run folder that a command was given instead of a recipe, if it was."""
    alone = len(args.items) == 1 and not args.yaml
    return Path(args.items[0]) if alone and Path(args.items[0]).is_dir() else None


def _status(args: argparse.Namespace) -> int:
    from nemo_rmt.status import print_plain, print_table, recipe_of_run, stage_statuses

    folder = _run_dir(args)
    recipe = _recipe(args, args.items) if folder is None else recipe_of_run(folder)
    statuses = stage_statuses(recipe)
    if args.plain:
        print_plain(statuses)
    else:
        print_table(recipe, statuses)
    return 0


def _report(args: argparse.Namespace) -> int:
    from nemo_rmt.run_folder import RunFolder

    folder = _run_dir(args) or Path(_recipe(args, args.items).run_dir)
    run = RunFolder(folder)
    if run.load_state() is None:
        raise UserError(f"{folder} is not a run folder: it has no state.json")
    from nemo_rmt.report import write_report  # plotting libraries take a second to load

    write_report(run.path)
    print(run.report_path)
    return 0


def _recipes(args: argparse.Namespace) -> int:
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
