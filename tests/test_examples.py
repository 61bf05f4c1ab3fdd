"""The examples run as they stand; those for other environments are tested there."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from small_recipe import small_recipe

from nemo_rmt import cli
from nemo_rmt.config import Tokenizer as TokenizerSettings
from nemo_rmt.data.tokenizer import train_tokenizer
from nemo_rmt.stages.job import StageJob
from nemo_rmt.tracking import read_metrics

ROOT = Path(cli.__file__).parents[1]
EXAMPLES = ROOT / "examples"
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "TORCH_COMPILE_DISABLE": "1", "PYTHONWARNINGS": "ignore"}


def run(*command: object) -> str:
    done = subprocess.run(
        [sys.executable, *map(str, command)], env=ENVIRONMENT, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


def test_overrides_from_a_file_and_from_words_are_in_the_printed_chain(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    words = ["flywheel", "tiny", "iterations=3", "anneal.remit.epsilon=0.3"]
    assert cli.main([*words, "--yaml", str(EXAMPLES / "override.yaml"), "--dry-run"]) == 0
    out = capsys.readouterr().out
    for line in ("iterations: 2 -> 3", "anneal.remit.epsilon: 0.2 -> 0.3", "rl.optim.lr: 0.0003 -> 0.0005"):
        assert line in out
    assert "iteration 2 anneal (remit)" in out and not list(tmp_path.iterdir())


def test_the_own_corpus_is_read(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    words = ["flywheel", "tiny", "--yaml", str(EXAMPLES / "own_corpus.yaml"), f"run_dir={tmp_path}/run"]
    assert cli.main([*words, "--dry-run"]) == 0
    assert "iteration 0 rmt" not in capsys.readouterr().out
    assert cli.main(["data", "build", *words[1:]]) == 0
    metrics = json.loads((tmp_path / "run/iteration_000/data/result.json").read_text())["metrics"]
    assert all(metrics[f"data/{name}/held_out_documents"] > 0 for name in ("code", "prose", "chains"))


@pytest.mark.slow
def test_a_new_objective_trains_from_a_finished_runs_stage_file(tmp_path):
    recipe, folder = small_recipe(str(tmp_path)), tmp_path / "iteration_000"
    inputs: dict[str, str] = {}
    for stage in ("data", "pretrain"):
        StageJob(stage=stage, iteration=0, inputs=inputs, recipe=recipe).save(folder / stage / "stage.yaml")
        run("-m", "nemo_rmt.stages", folder / stage / "stage.yaml")
        inputs = {"data": "iteration_000/data"}
    checkpoint = "iteration_000/pretrain/checkpoints/step_00000005"
    inputs |= {"checkpoint": checkpoint}
    StageJob(stage="anneal", iteration=0, inputs=inputs, recipe=recipe).save(folder / "anneal" / "stage.yaml")
    run(EXAMPLES / "selective.py", folder / "anneal" / "stage.yaml", folder / "selective")
    steps = read_metrics(folder / "selective" / "metrics.jsonl")
    assert [step["step"] for step in steps] == [1, 2, 3, 4, 5]
    assert all(step["selective/selected"] == pytest.approx(0.7, abs=0.02) for step in steps)
    assert json.loads((folder / "selective" / "result.json").read_text())["status"] == "done"


@pytest.mark.slow
def test_rmt_on_a_hugging_face_checkpoint(tmp_path):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    texts = [f"print({a} + {b})\n{a + b}\n" for a in range(30) for b in range(30)]
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    published = tmp_path / "published"
    tokenizer = train_tokenizer(iter(texts), TokenizerSettings(vocab_size=300), published)
    config = transformers.Qwen3Config(
        vocab_size=320, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, head_dim=16,
        num_key_value_heads=2, max_position_embeddings=256, bos_token_id=0, eos_token_id=tokenizer.eod, pad_token_id=0,
    )  # fmt: skip
    transformers.Qwen3ForCausalLM(config).save_pretrained(published)
    small = [
        "rmt.steps=2", "rmt.global_batch_size=8", "rmt.sequence_length=128", "rmt.document_length=32",
        "rmt.budget.initial=8", "rmt.grpo.samples_per_group=2", "rmt.difficulty.edges=null",
        "rmt.difficulty.quantiles=[0.5, 0.8]", "evaluate.sequence_length=64", "evaluate.positions=4",
        "evaluate.samples=2", "model.precision=fp32",
    ]  # fmt: skip
    out = run(EXAMPLES / "rmt_hugging_face.py", published, tmp_path / "texts.jsonl", tmp_path / "run", *small)
    assert "rmt_hugging_face fits" in out
    assert len(read_metrics(tmp_path / "run/iteration_000/rmt/metrics.jsonl")) == 2
    metrics = json.loads((tmp_path / "run/iteration_000/evaluate/result.json").read_text())["metrics"]
    assert {"pretrain/lm/all/nll", "lm/all/nll"} <= set(metrics)
