"""What a NeMo user types, in processes of their own: factories that exist without an import, and the example."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
pytest.importorskip("nemo.collections.llm", reason="NeMo 2.7 is not installed")


def run(*command: str) -> str:
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


def test_nemo_llm_pretrain_knows_the_recipes_with_a_stage(tmp_path):
    words = ["nemo", "llm", "pretrain", "--factory", "qwen3_14b_remit", "remit.reference=/models/rl"]
    words += ["remit.epsilon=0.3", "optim.config.lr=2e-4", "--to-yaml", str(tmp_path / "task.yaml")]
    run("-c", f"import sys; sys.argv = {words}; from nemo_run.__main__ import app; app()")
    written = (tmp_path / "task.yaml").read_text()
    assert "epsilon: 0.3" in written and "reference: /models/rl" in written and "ReMiTAnnealing" in written
    assert "lr: 0.0002" in written


def test_the_example_prints_the_recipe_where_there_is_no_gpu():
    out = run(str(ROOT / "examples" / "nemo_remit.py"), "/models/rl", "/data/text")
    assert "ReMiTAnnealing" in out and "lr=0.0002" in out and "not started" in out
