"""``nemo rmt COMMAND --factory RECIPE key=value... --yaml FILE -y``: the commands of nemo-rmt through nemo_run.

nemo_run imports this module for each of its commands (entry point group ``nemo_run.cli``) and passes over one that
raises: the import has to stay cheap, and an error in it makes ``nemo rmt`` vanish.

Words are read by nemo-rmt's own parser, so that both commands take the same keys and give the same errors and exit
codes. nemo_run's parser would take every word that begins with ``run`` (``run_dir=...``) for its own, and exit with 1.
"""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import nemo_run as run
import typer
from nemo_run.cli.api import Entrypoint

from nemo_rmt import cli, commands, recipes
from nemo_rmt.adapters.launchers import Launcher, Local, Work, choose_launcher
from nemo_rmt.config import Recipe, Section
from nemo_rmt.errors import UserError
from nemo_rmt.flywheel import find_stage
from nemo_rmt.recipe_io import resolved_yaml
from nemo_rmt.run_folder import write_text
from nemo_rmt.scoring import Scoring

logger = logging.getLogger(__name__)

STARTING = {
    "flywheel": "Run, or continue, every stage of a recipe.",
    "stage": "Run one stage of a recipe whose inputs are done: stage NAME [--iteration K], or a saved stage.yaml.",
    "data": "Build a recipe's tokenizer and token files, or score them with a model: data build, data score.",
    "evaluate": "Measure an iteration's models: evaluate [--iteration K].",
}
"""Commands that start stages: they ask first, and take an executor."""
OTHERS = {
    "experiment": "Run a grid of recipes and seeds on this machine, and compare them: experiment NAME.",
    "plan": "Check a recipe against a cluster: layout, memory, time, data.",
    "import": "Make a checkpoint of a Hugging Face model.",
    "export": "Make a Hugging Face folder of a checkpoint.",
    "status": "Say how far every stage of a run is: status RUN_DIR, or its recipe.",
    "report": "Write the report of a run: report RUN_DIR.",
    "recipes": "List the recipes, or show one: recipes list, recipes show.",
}
"""Commands that start no stage."""

FACTORY = typer.Option(None, "--factory", "-f", metavar="RECIPE", help="The recipe's name.")
YAML = typer.Option([], "--yaml", metavar="FILE", help="Partial recipe; repeatable.")
EXECUTOR = typer.Option(
    None, metavar="NAME", help="local (default), slurm, or one of yours; settings follow as executor.account=..."
)
PREFIXES = ("executor.", "executor=", "run.executor.", "run.executor=")
"""Words that are the executor's; nemo_run's own commands know the longer forms."""


class Commands(Entrypoint):
    """Adds every command of nemo-rmt to ``nemo rmt``."""

    def cli(self, parent: typer.Typer) -> None:
        """Called by nemo_run with the typer of ``rmt``."""
        for function, texts in ((_start, STARTING), (_pass_on, OTHERS)):
            for name, text in texts.items():
                parent.command(
                    name,
                    help=text,
                    epilog=f"Other words, key=value among them, are those of nemo-rmt {name}.",
                    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
                )(function(name))


def flywheel(recipe: Recipe) -> None:
    """Run, or continue, every stage of the recipe on this machine. Raises RuntimeError when one fails.

    For Python: ``run.run(run.cli.resolve_factory(flywheel, "tiny")())``.
    """
    if status := commands.Starter().run_flywheel(recipe, dry_run=False):
        raise RuntimeError(f"the flywheel of {recipe.run_dir} ended with status {status}: see its output above")


def recipe_config(value: Any) -> Any:
    """A recipe, or any value inside of one, as nested ``run.Config``, which builds to an equal one."""
    if isinstance(value, Section):
        return run.Config(
            type(value), **{name: recipe_config(getattr(value, name)) for name in type(value).model_fields}
        )
    return [recipe_config(each) for each in value] if isinstance(value, list) else value


def _register() -> None:
    """Commands and recipes become known to nemo_run; a recipe is built when it is asked for."""
    run.cli.entrypoint(flywheel, namespace="rmt", entrypoint_cls=Commands)
    for name in recipes.names():
        run.cli.factory(partial(_recipe, name), target=Recipe, name=name)
        run.cli.factory(partial(_task, name), target=flywheel, name=name)
    if importlib.util.find_spec("nemo") is not None:
        _register_nemo_recipes()


def _register_nemo_recipes() -> None:
    """NeMo's own recipes with a ReMiT stage, for ``nemo llm pretrain``, which imports NeMo for every command anyway."""
    try:
        from nemo_rmt.adapters import nemo2  # noqa: F401
    except ImportError as error:
        logger.warning("without NeMo 2.7's recipes there are none with a ReMiT stage: %s", error)


def _recipe(name: str) -> run.Config[Recipe]:
    return recipe_config(recipes.build(name))


def _task(name: str) -> run.Partial:
    return run.Partial(flywheel, recipe=_recipe(name))


@dataclass(frozen=True)
class Confirmed(commands.Starter):
    """Shows what would be started, asks, and starts it with a launcher."""

    choose: Callable[[], Launcher]
    """The launcher; raises UserError for executor settings that make none."""
    confirmed: bool
    """-y: do not ask."""
    only_show: bool
    """--dryrun."""
    to_yaml: Path | None
    """Write the resolved recipe there, and start nothing."""

    def run_flywheel(self, recipe: Recipe, *, dry_run: bool) -> int:
        """Every stage of the recipe. (--dry-run is only_show here: typer has taken it.)"""
        return self._start(Work(recipe))

    def run_one_stage(self, recipe: Recipe, stage: str, iteration: int, *, download: bool = False) -> int:
        """One stage of the recipe."""
        return self._start(Work(recipe, find_stage(recipe, stage, iteration), download))

    def run_stage_file(self, path: Path) -> int:
        """A saved stage.yaml."""
        if self.to_yaml is not None or not isinstance(self.choose(), Local):
            raise UserError(f"{path} is complete and runs on this machine: leave --to-yaml and --executor out")
        if self.only_show or not self.confirmed:
            print(f"{path}, on this machine")
        return super().run_stage_file(path) if self._go_ahead() else 0

    def run_scoring(self, recipe: Recipe, scoring: Scoring) -> int:
        """A cache of log-probabilities."""
        if self.to_yaml is not None or not isinstance(self.choose(), Local):
            raise UserError("data score runs where it is started: leave --to-yaml and --executor out")
        if self.only_show or not self.confirmed:
            print(f"{scoring.checkpoint} scores the data of {recipe.run_dir} into {scoring.cache}, on this machine")
        return super().run_scoring(recipe, scoring) if self._go_ahead() else 0

    def _start(self, work: Work) -> int:
        if self.to_yaml is not None:
            write_text(self.to_yaml, resolved_yaml(work.recipe, comments=True))
            print(self.to_yaml)
            return 0
        launcher = self.choose()
        if self.only_show or not self.confirmed:
            launcher.show(work, scripts=self.only_show)
        return launcher.start(work) if self._go_ahead() else 0

    def _go_ahead(self) -> bool:
        return not self.only_show and (self.confirmed or typer.confirm("Continue?"))


def _start(command: str) -> Callable[..., None]:
    """The function behind a command that starts stages; typer reads its options from its signature."""

    def start(
        context: typer.Context,
        factory: str | None = FACTORY,
        yaml: list[Path] = YAML,
        yes: bool = typer.Option(False, "--yes", "-y", "--no-confirm", help="Start without asking."),
        dryrun: bool = typer.Option(False, "--dryrun", "--dry-run", help="Check and show everything, start nothing."),
        executor: str | None = EXECUTOR,
        name: str | None = typer.Option(None, "--name", "-n", help="Slurm: name of the nemo_run experiment."),
        detach: bool = typer.Option(False, "--detach", help="Slurm: submit, and do not wait."),
        tail_logs: bool = typer.Option(False, "--tail-logs", help="Slurm: print the jobs' logs while waiting."),
        to_yaml: Path | None = typer.Option(
            None, "--to-yaml", metavar="FILE", help="Write the resolved recipe, which --yaml reads; start nothing."
        ),
    ) -> None:
        words, settings = _split(context.args)
        choose = partial(choose_launcher, executor, settings, name=name, detach=detach, tail_logs=tail_logs)
        starter = Confirmed(choose, confirmed=yes, only_show=dryrun, to_yaml=to_yaml)
        raise typer.Exit(cli.main(_arguments(command, words, factory, yaml), starter))

    return start


def _pass_on(command: str) -> Callable[..., None]:
    """The function behind a command that starts no stage."""

    def pass_on(context: typer.Context, factory: str | None = FACTORY, yaml: list[Path] = YAML) -> None:
        raise typer.Exit(cli.main(_arguments(command, context.args, factory, yaml)))

    return pass_on


def _split(words: list[str]) -> tuple[list[str], list[str]]:
    """The words for nemo-rmt, and the executor's: ``executor=NAME`` and ``executor.key=value``."""
    executor = [word.removeprefix("run.") for word in words if word.startswith(PREFIXES)]
    return [word for word in words if not word.startswith(PREFIXES)], executor


def _arguments(command: str, words: list[str], factory: str | None, yaml: list[Path]) -> list[str]:
    """The words of nemo-rmt's own command line."""
    named = [] if factory is None else [factory]
    return [command, *words, *named, *(word for path in yaml for word in ("--yaml", str(path)))]


_register()
