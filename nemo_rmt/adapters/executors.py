"""nemo_run executors for stages: found by name, changed by ``executor.key=value``, fitted to a recipe."""

from __future__ import annotations

import dataclasses
import difflib
import logging
import os
from pathlib import Path
from typing import Any

import fiddle as fdl
import nemo_run as run
from nemo_run.cli.api import EXECUTOR_CLASSES, RunContext
from nemo_run.cli.cli_parser import CLIException, parse_cli_args, parse_factory

from nemo_rmt.config import Recipe
from nemo_rmt.errors import UserError


def resolve_executor(name: str, settings: list[str]) -> run.Executor:
    """The executor called ``name``, changed by ``key=value`` settings.

    The name is a factory that nemo_run knows (of a workspace.py, or ``module.function``), or slurm. Raises
    UserError for an unknown name or key, a value nemo_run cannot read and a required setting that is missing.
    """
    found = _factory(name)
    config = found.to_config() if isinstance(found, run.Executor) else found
    keys = [each.name for each in dataclasses.fields(config.__fn_or_cls__) if each.init]
    for setting in settings:
        _set(config, setting, keys)
    for each in dataclasses.fields(config.__fn_or_cls__):
        required = each.default is dataclasses.MISSING and each.default_factory is dataclasses.MISSING
        if required and each.name not in config.__arguments__:
            raise UserError(f"the {name} executor needs executor.{each.name}=...")
    return fdl.build(config)


def _factory(name: str) -> Any:
    """What the factory called ``name`` makes: a Config of an executor, or an executor."""
    for kind in EXECUTOR_CLASSES:
        try:
            return parse_factory(RunContext, "executor", kind, name)
        except ValueError:  # none of this kind
            continue
    if name != "slurm":
        raise UserError(f"unknown executor {name!r}: give local, slurm, or an executor factory of your workspace.py")
    return run.Config(run.SlurmExecutor)


def _set(config: run.Config, setting: str, keys: list[str]) -> None:
    """Apply one ``key=value`` with nemo_run's parser, whose own errors are several lines long and logged twice."""
    key = setting.partition("=")[0].rstrip("+-*/|&").partition(".")[0].partition("[")[0]
    if key not in keys:
        near = difflib.get_close_matches(key, keys, n=1)
        raise UserError(f"unknown key 'executor.{key}'" + (f": did you mean 'executor.{near[0]}'?" if near else ""))
    parser_log = logging.getLogger("nemo_run.cli.cli_parser")
    level = parser_log.level
    parser_log.setLevel(logging.CRITICAL)
    try:
        parse_cli_args(config, [setting])
    except CLIException:
        kind = {each.name: each.type for each in dataclasses.fields(config.__fn_or_cls__)}[key]
        raise UserError(
            f"nemo_run cannot read executor.{setting}: {key} is {getattr(kind, '__name__', kind)}; lists and mappings "
            "are given whole, for example executor.env_vars={'A': 'b'}"
        ) from None
    finally:
        parser_log.setLevel(level)


def fit_slurm(executor: run.SlurmExecutor, recipe: Recipe) -> run.SlurmExecutor:
    """A copy that gives a stage what the recipe's cluster section says, and one task, which starts the processes.

    Nothing is packaged: the jobs run the installed nemo_rmt, in the folder they were submitted from. A container gets
    that folder and the run's mounted. Raises UserError for settings that contradict the recipe.
    """
    cluster, tunnel = recipe.cluster, executor.tunnel
    if not isinstance(tunnel, run.LocalTunnel):
        raise UserError(
            f"executor.tunnel={type(tunnel).__name__}: submit on a machine of the cluster, which sees run_dir"
        )
    if executor.launcher is not None:
        raise UserError(f"executor.launcher={executor.launcher}: a stage starts its own processes, leave it out")
    if executor.ntasks_per_node != 1:
        raise UserError(f"executor.ntasks_per_node={executor.ntasks_per_node}: a stage starts its own processes, use 1")
    if executor.nodes not in (1, cluster.nodes):
        raise UserError(f"executor.nodes={executor.nodes} contradicts cluster.nodes={cluster.nodes}")
    if executor.gpus_per_node not in (None, 0, cluster.gpus_per_node):
        raise UserError(
            f"executor.gpus_per_node={executor.gpus_per_node} contradicts cluster.gpus_per_node="
            f"{cluster.gpus_per_node}; 0 runs the stages on CPU"
        )
    fitted = executor.clone()
    fitted.nodes = cluster.nodes
    if fitted.gpus_per_node is None and fitted.gpus_per_task is None and fitted.gres is None:
        fitted.gpus_per_node = cluster.gpus_per_node
    fitted.packager = run.Packager()
    # without it, what depends on a failed job stays in the queue for ever
    fitted.additional_parameters = {"kill_on_invalid_dep": "yes", **(fitted.additional_parameters or {})}
    if fitted.container_image is not None:
        for folder in (os.getcwd(), str(Path(recipe.run_dir).absolute())):
            if not any(mount.split(":")[1:2] == [folder] for mount in fitted.container_mounts):
                fitted.container_mounts.append(f"{folder}:{folder}")
    return fitted
