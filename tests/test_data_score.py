"""``nemo-rmt data score`` as a person uses it: a model scores a run's data, and the run anneals by it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy
import pytest
from fake_checkpoint import write_checkpoint
from small_recipe import small_recipe

from nemo_rmt import cli, scoring
from nemo_rmt.config import Model
from nemo_rmt.data.logprob_cache import LogprobCache, Stretches
from nemo_rmt.data.tokenizer import Tokenizer
from nemo_rmt.families import config_json
from nemo_rmt.recipe_io import resolved_yaml
from nemo_rmt.tracking import read_metrics


def nemo_rmt(*arguments: str) -> str:
    """Run a command to its end; its output."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "nemo_rmt", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A run whose data is built and whose model is pre-trained, that is to anneal by a cache."""
    folder = tmp_path_factory.mktemp("score")
    recipe = small_recipe(
        str(folder / "run"),
        model={"qkv_bias": False},
        anneal={
            **small_recipe("").anneal.model_dump(),
            "remit": {"epsilon": 1.0, "reference": {"cache": str(folder / "cache")}},
        },
    )
    (folder / "recipe.yaml").write_text(resolved_yaml(recipe, comments=False))
    nemo_rmt("data", "build", *words(folder))
    shutil.copytree(folder / "run", folder / "built")
    # Pre-training comes before the cache here: its checkpoint stands in for an RL model from elsewhere.
    job = {"stage": "pretrain", "iteration": 0, "inputs": {"data": "iteration_000/data"}, "recipe": recipe.model_dump()}
    (folder / "built/iteration_000/pretrain").mkdir()
    (folder / "built/iteration_000/pretrain/stage.yaml").write_text(json.dumps(job))
    nemo_rmt("stage", str(folder / "built/iteration_000/pretrain/stage.yaml"))
    return folder


def words(folder: Path) -> list[str]:
    return ["--yaml", str(folder / "recipe.yaml")]


def checkpoint(folder: Path) -> Path:
    return folder / "built/iteration_000/pretrain/checkpoints/step_00000005"


def numbers(cache: Path) -> numpy.ndarray:
    return numpy.fromfile(cache / "chains" / "block_00000.u16", dtype="<u2").astype(int)


def whole(cache: Path) -> Stretches:
    """The first corpus's tokens as one stretch of a row."""
    first, size = (numpy.array([each]) for each in (0, len(numbers(cache))))
    return Stretches(Path("run/chains/train"), first, first, size)


def test_a_run_is_scored_and_annealed_by_the_numbers(run):
    scored = ["data", "score", *words(run), f"checkpoint={checkpoint(run)}", f"cache={run / 'cache'}"]
    output = nemo_rmt(*scored)
    assert "[score] chains: 1 of 1 blocks, " in output and " tokens/s, 0:00 left" in output
    assert f"set anneal.remit.reference.cache={run / 'cache'}" in output
    written = (run / "cache" / "chains" / "block_00000.u16").stat().st_mtime_ns
    assert "is complete" in nemo_rmt(*scored)
    assert (run / "cache" / "chains" / "block_00000.u16").stat().st_mtime_ns == written
    (run / "cache" / "chains" / "block_00000.u16").write_bytes(b"torn")
    assert "1 of 1 blocks" in nemo_rmt(*scored)  # what was lost since is scored again

    for stage in ("pretrain", "anneal"):
        nemo_rmt("stage", stage, *words(run))
    steps = read_metrics(run / "run/iteration_000/anneal/metrics.jsonl")
    assert len(steps) == 5 and steps[-1]["remit/weight_std"] > 1e-3


def test_a_published_model_gives_the_numbers_of_the_checkpoint_it_was_made_of(run):
    published = run / "published"
    nemo_rmt("export", f"source={checkpoint(run)}", f"target={published}")
    for name, model in (("own", checkpoint(run)), ("theirs", published)):
        score = ["data", "score", *words(run), f"checkpoint={model}", f"cache={run / name}", "sequence_length=32"]
        assert f" tokens take 0.5 MiB in {run / name}" in nemo_rmt(*score, "top_k=2")
    assert numpy.abs(numbers(run / "own") - numbers(run / "theirs")).max() <= 1
    likeliest = [LogprobCache(run / name).top([whole(run / name)]) for name in ("own", "theirs")]
    assert likeliest[0][0].shape == likeliest[0][1].shape == (1, len(numbers(run / "own")), 2)
    assert (likeliest[0][0] == likeliest[1][0]).mean() > 0.999
    manifests = [json.loads((run / name / "manifest.json").read_text()) for name in ("own", "theirs")]
    assert manifests[0]["model"]["digest"] != manifests[1]["model"]["digest"]
    assert manifests[0]["model"]["architecture"] == manifests[1]["model"]["architecture"]


@pytest.fixture
def refusal(run, tmp_path, capsys):
    """A function that scores with these words, and returns the one line that refuses it."""

    def refuse(*given: str) -> str:
        assert cli.main(["data", "score", *words(run), f"cache={tmp_path / 'cache'}", *given]) == 2
        captured = capsys.readouterr()
        assert captured.err.startswith("nemo-rmt: error: ") and captured.err.count("\n") == 1
        assert not (tmp_path / "cache" / "stage.yaml").exists()
        return captured.err

    return refuse


def test_a_model_that_cannot_score_the_data_is_refused(run, tmp_path, refusal):
    model = small_recipe("", model={"qkv_bias": False}).model
    tokenizer = Tokenizer.load(run / "run/iteration_000/data/tokenizer")
    fitting = {"vocab_size": tokenizer.vocab_size, "tokenizer": tokenizer.fingerprint}
    for name, changes, words_ in [
        ("other_tokenizer", {"tokenizer": "0" * 64}, "was trained with another tokenizer"),
        ("small", {"vocab_size": 200}, "model.vocab_size=200 is smaller than the tokenizer's"),
        ("truncated", {"files": {"weights.distcp": {"bytes": 2000, "sha256": "0"}}}, "is truncated"),
        ("format", {"format": 9}, "has format 9"),
    ]:
        folder = write_checkpoint(tmp_path / name, model.model_dump(), **{**fitting, **changes})
        assert words_ in refusal(f"checkpoint={folder}")
    good = write_checkpoint(tmp_path / "good", model.model_dump(), **fitting)
    assert "sequence_length=500 exceeds the 128 positions" in refusal(f"checkpoint={good}", "sequence_length=500")
    for top_k in ("0", "-1", "few"):
        assert f"top_k={top_k} is not a whole number of 1 or more" in refusal(f"checkpoint={good}", f"top_k={top_k}")
    assert f"top_k=9999 exceeds the {tokenizer.vocab_size} tokens" in refusal(f"checkpoint={good}", "top_k=9999")
    layout = ["parallel.tensor=4", "cluster.gpus_per_node=4"]
    assert "parallel.tensor=4 does not divide model.num_query_groups=2" in refusal(f"checkpoint={good}", *layout)
    assert "does not exist" in refusal("checkpoint=/does/not/exist")
    assert "holds a run of another recipe" in refusal(f"checkpoint={good}", "anneal.steps=9")


def test_a_cache_that_has_no_room_is_refused_before_anything_is_scored(run, tmp_path, refusal, monkeypatch):
    monkeypatch.setattr(scoring.shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    full = refusal(f"checkpoint={checkpoint(run)}", "top_k=2")
    assert f"cache={tmp_path / 'cache'} has 0.0 MiB free, 0.5 MiB are to come: free some space, lower top_k" in full
    assert not (tmp_path / "cache" / "plan.json").exists()  # another top_k may begin there


def published(folder: Path, model: Model, vocab_size: int, tokenizer: Path | None) -> Path:
    """The outside of a Hugging Face folder."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config_json(model, vocab_size, eos=0)))
    (folder / "model.safetensors").write_bytes(b"weights")
    if tokenizer is not None:
        shutil.copy(tokenizer / "tokenizer.json", folder)
    return folder


def test_a_published_model_of_other_tokens_is_refused(run, tmp_path, refusal):
    model = small_recipe("", model={"qkv_bias": False}).model
    own = Tokenizer.load(run / "run/iteration_000/data/tokenizer")
    assert f"predicts over 100 tokens, the run's tokenizer has {own.vocab_size}" in refusal(
        f"checkpoint={published(tmp_path / 'few', model, 100, None)}"
    )
    other = tmp_path / "tokenizer"
    own.save(other)
    content = json.loads((other / "tokenizer.json").read_text())
    content["added_tokens"] = content["added_tokens"][:-1]
    (other / "tokenizer.json").write_text(json.dumps(content))
    assert "has another tokenizer (fingerprint" in refusal(
        f"checkpoint={published(tmp_path / 'other', model, 300, other)}"
    )


def test_a_folder_that_was_begun_as_another_cache_or_is_none_is_refused(run, tmp_path, refusal):
    (tmp_path / "begun").mkdir()
    plan = {"format": 1, "corpora": {}, "tokenizer": "t", "precision": "fp32", "sequence_length": 64}
    (tmp_path / "begun" / "plan.json").write_text(json.dumps({**plan, "model": {"digest": "m", "path": "/model"}}))
    begun = refusal(f"checkpoint={checkpoint(run)}", f"cache={tmp_path / 'begun'}")
    assert "begun as another one: corpora" in begun and "tokenizer t there" in begun and "model /model (m)" in begun
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "letter.txt").write_text("dear")
    assert "is no cache of log-probabilities (it holds letter.txt)" in refusal(f"checkpoint={checkpoint(run)}")
    assert "cache=/proc/cache is not writable" in refusal(f"checkpoint={checkpoint(run)}", "cache=/proc/cache")
