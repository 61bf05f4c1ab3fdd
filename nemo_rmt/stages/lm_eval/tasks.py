"""A recipe's held-out problems as lm-eval tasks, and the tasks that lm-eval is asked for.

Imports neither torch nor lm-eval: what a recipe asks for is checked before anything starts.
"""

from __future__ import annotations

import importlib.util
import itertools
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from nemo_rmt.config import Recipe, Task
from nemo_rmt.data.options import nearest
from nemo_rmt.data.tasks import Split, make_task
from nemo_rmt.errors import UserError
from nemo_rmt.run_folder import write_text

BASE = Path(__file__).with_name("held_out.yaml")
"""What the tasks have in common."""


@dataclass(frozen=True)
class HeldOutTask:
    """One split of an entry of data.tasks, sampled as often as our own evaluation does, or answered greedily once."""

    name: str
    settings: Task
    split: Split
    greedy: bool


def measured_splits(task: Task) -> dict[str, Split]:
    """The splits of an entry of data.tasks that are evaluated, by their name in metrics."""
    longer: dict[str, Split] = {} if task.longer is None else {f"{task.name}_longer": "longer"}
    return {task.name: "held_out", **longer}


def held_out_tasks(recipe: Recipe) -> dict[str, HeldOutTask]:
    """The recipe's own lm-eval tasks by name. Raises UserError when two have one name."""
    found: dict[str, HeldOutTask] = {}
    for settings in recipe.data.tasks:
        for split_name, split in measured_splits(settings).items():
            for name, greedy in ((split_name, False), (f"{split_name}_greedy", True)):
                if name in found:
                    raise UserError(
                        f"data.tasks[{settings.name}] and data.tasks[{found[name].settings.name}] both make an lm-eval "
                        f"task {name}: rename one of them"
                    )
                found[name] = HeldOutTask(name, settings, split, greedy)
    return found


def chosen_tasks(recipe: Recipe) -> list[str]:
    """The names of the tasks that lm-eval is asked for."""
    return recipe.evaluate.lm_eval.tasks or list(held_out_tasks(recipe))


def require_installed(recipe: Recipe) -> None:
    """Raise UserError when the recipe asks for lm-eval and this Python has none."""
    if recipe.evaluate.lm_eval.enabled and importlib.util.find_spec("lm_eval") is None:
        raise UserError(
            "evaluate.lm_eval.enabled=true, but lm-eval is not installed: pip install 'nemo-rmt[lm-eval]', or set "
            "evaluate.lm_eval.enabled=false"
        )


def check_tasks(recipe: Recipe) -> None:
    """Raise UserError when the recipe asks lm-eval for a task that neither data.tasks nor the folder include has."""
    settings = recipe.evaluate.lm_eval
    if not settings.enabled:
        return
    own = held_out_tasks(recipe)
    others = set() if settings.include is None else _included_names(Path(settings.include).expanduser())
    if both := sorted(others & set(own)):
        raise UserError(
            f"evaluate.lm_eval.include={settings.include} defines {', '.join(both)}, which are names of the recipe's "
            "own tasks: rename one of the two"
        )
    for name in settings.tasks:
        if name not in own and name not in others:
            raise UserError(f"evaluate.lm_eval.tasks: there is no task {name}; {nearest(name, {*own, *others})}")
    if not chosen_tasks(recipe):
        raise UserError(
            "evaluate.lm_eval.enabled=true, but data.tasks is empty: name tasks of a folder in "
            "evaluate.lm_eval.tasks and .include, or set evaluate.lm_eval.enabled=false"
        )


def _included_names(folder: Path) -> set[str]:
    """The tasks, groups and tags that the YAML files of a folder and those below it define."""
    if not folder.is_dir():
        raise UserError(f"evaluate.lm_eval.include={folder} is not a folder: give one with lm-eval task YAMLs")
    names: set[str] = set()
    for file in sorted(folder.glob("**/*.yaml")):
        values = _read(file)
        for key in ("task", "group", "tag"):
            given = values.get(key)
            # A group's task is the list of its members.
            names.update([given] if isinstance(given, str) else given if key == "tag" and given else [])
    return names


class _TaskLoader(yaml.SafeLoader):
    """Plain YAML and lm-eval's ``!function``, which is not looked up."""


_TaskLoader.add_constructor("!function", lambda loader, node: str(node.value))


def _read(file: Path) -> dict[str, Any]:
    """A task's keys, those of the files it includes among them."""
    try:
        values = yaml.load(file.read_text(encoding="utf-8"), Loader=_TaskLoader)  # noqa: S506 - a SafeLoader
    except (OSError, yaml.YAMLError) as error:
        raise UserError(f"evaluate.lm_eval.include: {file}: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        return {}
    included = values.pop("include", [])
    merged: dict[str, Any] = {}
    for each in [included] if isinstance(included, str) else included:
        merged |= _read(file.parent / each)
    return merged | values


def problem_records(task: Task, split: Split, seed: int, count: int) -> Iterator[dict[str, Any]]:
    """The first problems of a split, as lm-eval's documents: what is asked, and where scoring finds the verifier.

    A problem is the same wherever it is asked for, so its place says it all; the answer is for those who read it.
    """
    settings = task.model_dump_json()
    for index, problem in enumerate(itertools.islice(make_task(task).problems(split, seed), count)):
        place = {"index": index, "split": split, "seed": seed, "task": settings}
        yield {"question": problem.question, "answer": problem.answer, **place}


def write_tasks(recipe: Recipe, seed: int, folder: Path) -> list[str]:
    """Write the recipe's chosen own tasks to ``folder``: NAME.yaml and the problems; returns the questions asked.

    seed: of the held-out problems, as our own evaluation has it.
    """
    folder.mkdir(parents=True)
    questions: list[str] = []
    own, chosen = held_out_tasks(recipe), chosen_tasks(recipe)
    for task in (own[name] for name in chosen if name in own):
        data = folder / f"{task.settings.name}_{task.split}.jsonl"
        if not data.exists():  # the greedy task asks what the sampled one does
            records = list(problem_records(task.settings, task.split, seed, recipe.evaluate.problems))
            write_text(data, "".join(json.dumps(record) + "\n" for record in records))
            questions += [record["question"] for record in records]
        write_text(folder / f"{task.name}.yaml", yaml.safe_dump(_definition(task, recipe, data), sort_keys=False))
    return questions


def _definition(task: HeldOutTask, recipe: Recipe, data: Path) -> dict[str, Any]:
    """The keys of a task's YAML. Every key of sampling is given: a model's generation_config.json must not decide."""
    times = 1 if task.greedy else recipe.evaluate.samples
    how = {"do_sample": False} if task.greedy else {"do_sample": True, "temperature": 1.0, "top_p": 1.0, "top_k": 0}
    metrics = dict.fromkeys(("pass@1", f"pass@{times}"))
    return {
        "include": str(BASE),
        "task": task.name,
        "dataset_kwargs": {"data_files": {"test": str(data.absolute())}},
        # until: the end-of-document token alone, which lm-eval adds
        "generation_kwargs": {"until": [], "max_gen_toks": recipe.rollout.max_new_tokens, **how},
        "repeats": times,
        "filter_list": [{"name": "none", "filter": [{"function": "take_first_k", "k": times}]}],
        "metric_list": [{"metric": name, "aggregation": "mean", "higher_is_better": True} for name in metrics],
    }
