"""The command line: ``nemo-rmt COMMAND [RECIPE] [--yaml FILE]... [key=value]...``.

Exit codes: 0 done, 1 a stage failed, 2 wrong input (nothing was trained), 75 stopped on request (SIGUSR1 or SIGTERM) at
a checkpoint, start it again to continue, 128 + n stopped at once by signal n.
"""

from __future__ import annotations

import argparse
import errno
import logging
import sys
from pathlib import Path
from typing import NoReturn

from nemo_rmt import __version__, commands
from nemo_rmt.commands import Starter
from nemo_rmt.errors import UserError
from nemo_rmt.exit_codes import FAILED, WRONG_INPUT


class _Parser(argparse.ArgumentParser):
    """A parser whose errors are printed like every other wrong input."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (see {self.prog} --help)")


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
    parsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    flywheel = _command(parsers, "flywheel", commands.flywheel, "run, or continue, every stage of a recipe")
    flywheel.add_argument("--dry-run", action="store_true", help="print the resolved chain, check it, start nothing")
    _may_profile(flywheel)

    stage = _command(
        parsers, "stage", commands.stage, "run one stage of a recipe whose inputs are done, or a saved stage.yaml alone"
    )
    stage.usage = (
        "nemo-rmt stage NAME [RECIPE] [--iteration K] [--profile] [--yaml FILE]... [key=value]...\n"
        "       nemo-rmt stage STAGE.yaml"
    )
    stage.add_argument("--iteration", type=int, default=0, metavar="K", help="turn of the flywheel, from 0 (default)")
    _may_profile(stage)

    data = _command(
        parsers,
        "data",
        commands.data,
        "build a recipe's tokenizer and token files, downloading what it names, or score them with a model for ReMiT",
    )
    data.usage = (
        "nemo-rmt data build [RECIPE] [--yaml FILE]... [key=value]...\n"
        "       nemo-rmt data score [RECIPE] checkpoint=MODEL cache=FOLDER [sequence_length=N] [top_k=K] "
        "[--yaml FILE]... [key=value]...\n"
        "       checkpoint: a checkpoint or a Hugging Face folder; cache: new, or one that was begun with the same;\n"
        "       sequence_length: most tokens of a document that the model sees at once (anneal.sequence_length);\n"
        "       top_k: keep the likeliest tokens of every place too, for anneal.objective=distill (0)"
    )

    evaluate = _command(parsers, "evaluate", commands.evaluate, "measure an iteration's models (its evaluate stage)")
    evaluate.add_argument(
        "--iteration", type=int, default=None, metavar="K", help="turn of the flywheel (default: the last)"
    )
    _may_profile(evaluate)

    experiment = _command(
        parsers, "experiment", commands.experiment, "run, or continue, a grid of recipes and seeds, and compare them"
    )
    experiment.usage = (
        "nemo-rmt experiment NAME [--seeds 1,2] [--arms a,b] [--control c] [--jobs N] [--out FOLDER] "
        "[--dry-run] [--yaml FILE]... [key=value]...\n"
        "       NAME: an experiment, or a file of one; without it the experiments are listed.\n"
        "       FILE, key=value: for every arm, after what its own settings say.\n"
        "       Start it on several machines with one --out, and they share the work."
    )
    experiment.add_argument("--seeds", type=_numbers, default=None, metavar="N,N", help="instead of the experiment's")
    experiment.add_argument("--arms", type=_words, default=None, metavar="ARM,ARM", help="these and the control alone")
    experiment.add_argument("--control", default=None, metavar="ARM", help="compare with it instead")
    experiment.add_argument("--jobs", type=int, default=1, metavar="N", help="stages at once on this machine (1)")
    experiment.add_argument(
        "--out", type=Path, default=Path("runs/experiments"), metavar="FOLDER", help="of all results"
    )
    experiment.add_argument("--dry-run", action="store_true", help="print the stages, check them, start nothing")

    _command(
        parsers, "plan", commands.plan, "check a recipe against a cluster: layout, memory, time, data; starts nothing"
    )

    load = _command(parsers, "import", commands.load, "make a checkpoint of a Hugging Face model")
    load.usage = (
        "nemo-rmt import source=HF_FOLDER target=CHECKPOINT [precision=bf16|fp32] [tensor=1] [pipeline=1]\n"
        "       precision: of the weights (bf16);\n"
        "       tensor, pipeline: sizes of the layout of local processes, on CPUs, that share the work"
    )

    export = _command(parsers, "export", commands.export, "make a Hugging Face folder of a checkpoint")
    export.usage = (
        "nemo-rmt export source=CHECKPOINT target=HF_FOLDER [precision=bf16|fp32] [tensor=1] [pipeline=1] "
        "[tokenizer=FOLDER]\n"
        "       precision: of the weights (the checkpoint's); tensor, pipeline: as in import;\n"
        "       tokenizer: its folder, where neither the checkpoint nor its run has it"
    )

    status = _command(parsers, "status", commands.status, "say how far every stage of a run is: RUN_DIR, or its recipe")
    status.usage = "nemo-rmt status RUN_DIR\n       nemo-rmt status [RECIPE] [--yaml FILE]... [key=value]..."
    status.add_argument("--plain", action="store_true", help="a line per stage for scripts: iteration, stage, status")

    report = _command(
        parsers, "report", commands.report, "write the report of a run: RUN_DIR, or the recipe it was started from"
    )
    report.usage = "nemo-rmt report RUN_DIR\n       nemo-rmt report [RECIPE] [--yaml FILE]... [key=value]..."

    show = _command(parsers, "recipes", commands.list_recipes, "list the recipes, or show one with every key's meaning")
    show.usage = "nemo-rmt recipes list\n       nemo-rmt recipes show [RECIPE] [--yaml FILE]... [key=value]..."

    args, rest = parser.parse_known_args(argv)
    unknown = [each for each in rest if each.startswith("-")]
    if unknown:
        raise UserError(f"unknown option {' '.join(unknown)} (see nemo-rmt {args.command} --help)")
    args.items += rest  # argparse leaves positionals after an option aside
    return args


def _command(parsers: argparse._SubParsersAction, name: str, run: object, text: str) -> argparse.ArgumentParser:
    parser = parsers.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
    parser.add_argument("items", nargs="*", metavar="[RECIPE] key=value", help="recipe name and overrides")
    parser.add_argument(
        "--yaml", action="append", type=Path, default=[], metavar="FILE", help="partial recipe; repeatable"
    )
    parser.set_defaults(run=run)
    return parser


def _numbers(text: str) -> list[int]:
    try:
        return [int(each) for each in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected numbers with commas between them, got {text!r}") from None


def _words(text: str) -> list[str]:
    return text.split(",")


def _may_profile(parser: argparse.ArgumentParser) -> None:
    """Give a command that starts stages the option to profile them."""
    parser.add_argument(
        "--profile", action="store_true", help="write where each stage's time goes (tracking.profile=true)"
    )
