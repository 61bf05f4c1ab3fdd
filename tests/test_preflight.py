"""Wrong input is found before anything is started, and the message says what to do."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
from collections import namedtuple
from pathlib import Path

import pytest
from fake_checkpoint import write_checkpoint

from nemo_rmt import preflight, run_folder
from nemo_rmt.config import Recipe
from nemo_rmt.data.tokenizer import Tokenizer, train_tokenizer
from nemo_rmt.errors import UserError
from nemo_rmt.plan.parameters import parameter_count
from nemo_rmt.recipe_io import load_recipe
from nemo_rmt.run_folder import RunFolder


def tiny(tmp_path: Path, *overrides: str) -> Recipe:
    """tiny without the standard library's text, in a folder of its own."""
    return load_recipe(
        "tiny",
        [],
        [f"run_dir={tmp_path}/run", "data.corpora=[{name: chains, kind: chains}]", "rmt.corpora=[]", *overrides],
    )


def check(recipe: Recipe) -> None:
    preflight.check(recipe, RunFolder(Path(recipe.run_dir)))


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Path:
    """The folder of a small trained tokenizer."""
    folder = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(["one and two", "two and three"], Recipe().tokenizer.model_copy(update={"vocab_size": 300}), folder)
    return folder


@pytest.fixture
def matching(tmp_path, tokenizer):
    """A function that writes a checkpoint fitting tiny and the tokenizer, but for the given changes."""

    def write(**changes: object) -> Path:
        loaded = Tokenizer.load(tokenizer)
        fitting = {"vocab_size": loaded.vocab_size, "tokenizer": loaded.fingerprint}
        model = changes.pop("model", tiny(tmp_path).model.model_dump())
        return write_checkpoint(tmp_path / "given", model, **{**fitting, **changes})

    return write


def test_the_tiny_recipe_passes_and_nothing_is_written(tmp_path):
    check(tiny(tmp_path))
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["data.corpora=[]"], "data.corpora is empty"),
        (["rmt.difficulty.scores=/does/not/exist"], "rmt.difficulty.scores=/does/not/exist has no difficulty.json"),
        (["rmt.difficulty.scorer=/c"], "rmt.difficulty.scorer=/c.*tokenizer.path is null"),
        (["data.corpora=[{name: a, kind: folder, path: /does/not/exist}]"], "/does/not/exist"),
        (["data.corpora.0.options.colour=1"], "colour"),
        (["data.tasks=[]"], "data.tasks is empty"),
        (["data.tasks.0.family=poetry"], "poetry"),
        (["data.sft_path=/does/not/exist.jsonl"], "data.sft_path=/does/not/exist.jsonl"),
        (["tokenizer.path=/does/not/exist"], "tokenizer.path=/does/not/exist"),
        (["rl.sequence_length=128", "rollout.max_new_tokens=128"], "rollout.max_new_tokens=128"),
        (["evaluate.sequence_length=1024"], "evaluate.sequence_length=1024"),
        (["model.layers=transformer_engine"], "model.layers=transformer_engine.*set model.layers=local"),
        (["run_dir=/proc/run"], "run_dir=/proc/run is not writable"),
        (["pretrain.checkpoint=/c"], "pretrain.checkpoint=/c.*tokenizer.path is null"),
        (["anneal.remit.reference=/c"], "anneal.remit.reference=/c.*tokenizer.path is null"),
    ],
)
def test_wrong_input_is_refused_by_name(tmp_path, monkeypatch, overrides, message):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    with pytest.raises(UserError, match=message):
        check(tiny(tmp_path, *overrides))


@pytest.mark.parametrize("text", ["", "\n"])
def test_an_empty_corpus_is_refused_with_its_path(tmp_path, text):
    (tmp_path / "empty.jsonl").write_text(text)
    with pytest.raises(UserError, match="empty.jsonl"):
        check(tiny(tmp_path, f"data.corpora=[{{name: a, kind: jsonl, path: {tmp_path}/empty.jsonl}}]"))


def test_more_processes_than_gpus_are_refused_but_cpu_processes_are_not(tmp_path, monkeypatch):
    recipe = tiny(tmp_path, "cluster.gpus_per_node=4", "parallel.tensor=2", "parallel.pipeline=2")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    with pytest.raises(UserError, match=r"cluster.gpus_per_node=4, but this machine has 2 visible GPU"):
        check(recipe)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    check(recipe)


@pytest.mark.parametrize("key", ["pretrain.checkpoint", "anneal.remit.reference"])
def test_a_fitting_checkpoint_passes(tmp_path, tokenizer, matching, key):
    check(tiny(tmp_path, f"{key}={matching()}", f"tokenizer.path={tokenizer}"))


@pytest.mark.parametrize("key", ["pretrain.checkpoint", "anneal.remit.reference"])
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokenizer": "0" * 64}, "another tokenizer .fingerprint 000000000000"),
        ({"vocab_size": 511}, "vocabulary of 511"),
        ({"model": Recipe().model.model_dump() | {"num_layers": 6, "qkv_bias": True}},
         "model.num_layers is 6 in the checkpoint, 4 in the recipe; model.*qkv_bias is True"),
        ({"files": {"weights.distcp": {"bytes": 2000, "sha256": "0"}}},
         "truncated: weights.distcp has 1000 bytes instead of 2000"),
        ({"format": 9}, "format 9"),
    ],
)  # fmt: skip
def test_a_checkpoint_that_does_not_fit_is_refused(tmp_path, tokenizer, matching, key, changes, message):
    with pytest.raises(UserError, match=message):
        check(tiny(tmp_path, f"{key}={matching(**changes)}", f"tokenizer.path={tokenizer}"))


def test_how_weights_are_computed_may_differ(tmp_path, tokenizer, matching):
    model = tiny(tmp_path).model.model_dump() | {"precision": "bf16", "max_position": 128, "head_dim": 32}
    check(tiny(tmp_path, f"pretrain.checkpoint={matching(model=model)}", f"tokenizer.path={tokenizer}"))


def test_a_full_disk_is_refused_with_what_is_free_and_what_is_needed(tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")(2**30, 2**30 - 2**20, 2**20)
    monkeypatch.setattr(run_folder.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(UserError, match=r"has 1.0 MiB free, the run needs about 1\d\d\.\d MiB"):
        check(tiny(tmp_path))


def test_the_space_needed_follows_parameters_and_checkpoints(tmp_path):
    recipe = tiny(tmp_path)
    run = RunFolder(Path(recipe.run_dir))
    once = preflight.space_needed(recipe, run, 512)
    recipe.flywheel.keep_checkpoints = 2
    assert preflight.space_needed(recipe, run, 512) - once == 9 * 16 * parameter_count(recipe, 512)


def test_stage_folders_without_a_state_are_not_taken_over(tmp_path):
    (tmp_path / "run" / "iteration_000").mkdir(parents=True)
    with pytest.raises(UserError, match="no state.json"):
        check(tiny(tmp_path))


def test_corpora_are_needed_only_until_the_data_stage_is_done(tmp_path):
    corpus = tmp_path / "corpus.jsonl"
    corpus.write_text(json.dumps({"text": "words"}))
    recipe = tiny(tmp_path, f"data.corpora=[{{name: a, kind: jsonl, path: {corpus}}}]")
    check(recipe)
    run = RunFolder(Path(recipe.run_dir))
    state = run_folder.State(preflight.recipe_digest(recipe))
    run.save_state(state)
    corpus.unlink()
    with pytest.raises(UserError, match="corpus.jsonl"):
        check(recipe)
    state.record(0, "data").status = "done"
    run.save_state(state)
    check(recipe)
    shutil.rmtree(run.path)


def test_rmt_needs_a_tokenizer_with_the_tokens_of_a_thought(tmp_path, tokenizer):
    content = json.loads((tokenizer / "tokenizer.json").read_text())
    content["added_tokens"] = [token for token in content["added_tokens"] if "think" not in token["content"]]
    folder = tmp_path / "without"
    shutil.copytree(tokenizer, folder)
    (folder / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match="<think> and </think>.*tokenizer.path"):
        check(tiny(tmp_path, f"tokenizer.path={folder}"))
    check(tiny(tmp_path, f"tokenizer.path={folder}", "rmt.enabled=false"))
    check(tiny(tmp_path, f"tokenizer.path={tokenizer}"))


def visible_gpus(folder: Path, monkeypatch, *capabilities: str) -> None:
    """A machine with Transformer Engine and these GPUs, as its nvidia-smi tells."""
    program = folder / "bin" / "nvidia-smi"
    program.parent.mkdir()
    program.write_text("#!/bin/sh\n" + "".join(f"echo {each}\n" for each in capabilities))
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(len(capabilities)))))
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: True if name == "transformer_engine" else found(name))


FP8 = ["model.layers=transformer_engine", "model.precision=bf16", "model.fp8=hybrid"]


@pytest.mark.parametrize(
    ("recipe", "capabilities", "message"),
    [
        ("tensorwise", ["9.0", "8.0"], "8.9 or more, the visible GPU has 8.0: set model.fp8=null"),
        ("blockwise", ["8.9"], "9.0 or more, the visible GPU has 8.9: set model.fp8_recipe=tensorwise"),
        ("tensorwise", ["8.9"], None),
        ("blockwise", ["12.0", "9.0"], None),
    ],
)
def test_fp8_is_refused_at_the_start_on_gpus_without_it(tmp_path, monkeypatch, recipe, capabilities, message):
    visible_gpus(tmp_path, monkeypatch, *capabilities)
    asked = tiny(tmp_path, *FP8, f"model.fp8_recipe={recipe}", "cluster.gpu_compute_capability=1")
    if message is None:
        return check(asked)
    with pytest.raises(UserError, match=message):
        check(asked)


def test_without_a_gpu_the_recipe_says_what_its_gpus_can_do(tmp_path, monkeypatch):
    visible_gpus(tmp_path, monkeypatch, "9.0")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    preflight.check_accelerator(tiny(tmp_path, *FP8))
    with pytest.raises(UserError, match="cluster.gpu_compute_capability is 8.0"):
        preflight.check_accelerator(tiny(tmp_path, *FP8, "cluster.gpu_compute_capability=8.0"))
    with pytest.raises(UserError, match="needs a GPU and none is visible: set model.layers=local and model.fp8=null"):
        check(tiny(tmp_path, *FP8))


def test_offloading_the_reference_is_refused_where_no_gpu_is_visible(tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    with pytest.raises(UserError, match="anneal.rho1.offload=true makes room on a GPU and none is visible: set"):
        check(tiny(tmp_path, "anneal.objective=rho1", "anneal.rho1.offload=true"))
    check(tiny(tmp_path, "anneal.objective=rho1", "anneal.remit.offload=true"))


def test_corpora_of_the_hub_may_be_fetched_only_when_that_is_asked_for(tmp_path):
    recipe = tiny(tmp_path, "data.corpora=[{name: web, kind: hub, path: owner/name}]")
    with pytest.raises(UserError, match="nemo-rmt data build"):
        check(recipe)
    preflight.check(recipe, RunFolder(Path(recipe.run_dir)), download=True)
