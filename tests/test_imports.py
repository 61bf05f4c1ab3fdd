"""Imports go one way, and the command line stays light."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import nemo_rmt.recipes
import pytest

import nemo_rmt

PACKAGE = Path(nemo_rmt.__file__).parent
ORDER = ["objectives", "data", "megatron", "rollout", "stages"]
"""Each may import from those before it, none from those after it."""
DRIVER = {
    "chain",
    "cli",
    "commands",
    "conversion",
    "experiment",
    "flywheel",
    "flywheel_run",
    "launch",
    "lone_stage",
    "overview",
    "plan",
    "preflight",
    "recipes",
}
DRIVER |= {"scoring", "status"}
"""The process that starts workers; workers import none of it."""


FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)


def imported(path: Path) -> Iterator[str]:
    """Every module a file imports, at its top or inside a function."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute here"
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def files(part: str) -> list[Path]:
    return sorted((PACKAGE / part).rglob("*.py"))


def within(module: str, package: str) -> bool:
    return module == package or module.startswith(package + ".")


@pytest.mark.parametrize("part", ORDER)
def test_a_part_imports_none_of_those_after_it_nor_the_driver(part):
    later = {*ORDER[ORDER.index(part) + 1 :], *DRIVER}
    for path in files(part):
        wrong = {m for m in imported(path) for other in later if within(m, f"nemo_rmt.{other}")}
        assert not wrong, f"{path.relative_to(PACKAGE)} imports {wrong}"


def test_only_megatron_and_adapters_import_megatron_core():
    for path in PACKAGE.rglob("*.py"):
        if path.relative_to(PACKAGE).parts[0] not in ("megatron", "adapters"):
            wrong = {module for module in imported(path) if within(module, "megatron")}
            assert not wrong, f"{path.relative_to(PACKAGE)} imports {wrong}"


def test_workers_never_import_nemo_run():
    for path in PACKAGE.rglob("*.py"):
        if path.relative_to(PACKAGE).parts[0] != "adapters":
            assert not {module for module in imported(path) if within(module, "nemo_run")}, path


def test_only_vllms_own_processes_import_it_at_the_top_and_nobody_lm_eval():
    for path in PACKAGE.rglob("*.py"):
        tree = ast.parse(path.read_text())
        inside = {
            id(node) for function in ast.walk(tree) if isinstance(function, FUNCTIONS) for node in ast.walk(function)
        }
        at_top = {
            alias.name if isinstance(node, ast.Import) else node.module
            for node in ast.walk(tree)
            if isinstance(node, ast.Import | ast.ImportFrom) and id(node) not in inside
            for alias in node.names
        }
        wrong = {module for module in at_top if within(module, "vllm") or within(module, "lm_eval")}
        assert not wrong or path == PACKAGE / "rollout/vllm/worker.py", f"{path} imports {wrong}"
    importing = [path for path in PACKAGE.rglob("*.py") if "nemo_rmt.rollout.vllm.worker" in set(imported(path))]
    assert not importing


@pytest.mark.parametrize("module", ["cli", "experiment", "flywheel", "lone_stage", "recipes"])
def test_the_driver_imports_no_torch_and_no_megatron(module):
    heavy = ("torch", "megatron", "nemo_run", "matplotlib")
    code = f"import sys, nemo_rmt.{module}; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "[]", done.stdout + done.stderr


def test_preflight_of_the_tiny_recipe_imports_no_torch(tmp_path):
    arguments = ["flywheel", "tiny", "--dry-run", f"run_dir={tmp_path}/run"]
    code = f"import sys, nemo_rmt.cli; print(nemo_rmt.cli.main({arguments})); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout.split()[-2:] == ["0", "False"], done.stdout + done.stderr


def test_the_recipes_folder_is_the_installed_package():
    assert Path(nemo_rmt.recipes.__file__).parent.name == "recipes"
    assert "tiny" in nemo_rmt.recipes.names()
