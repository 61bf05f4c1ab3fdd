"""What a person sees: fits or not, what is missing, what to change."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest
from fake_checkpoint import write_checkpoint
from nemo_rmt.recipes import build

from nemo_rmt.config import Recipe
from nemo_rmt.data.tokenizer import Tokenizer, train_tokenizer
from nemo_rmt.plan import run_plan
from nemo_rmt.plan.checks import layout_problems
from nemo_rmt.plan.memory import available, memory
from nemo_rmt.plan.search import changed_recipe, nearest_changes, unfit, written
from nemo_rmt.plan.workload import workloads
from nemo_rmt.recipe_io import load_recipe

VOCAB = 151_936


def plan(capsys, *words: str) -> tuple[int, str]:
    """Exit status and output, each run of white space as one space."""
    status = run_plan(load_recipe(words[0], [], list(words[1:])))
    return status, " ".join(capsys.readouterr().out.split())


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    """A folder in which no recipe has been run."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    return tmp_path


@pytest.fixture
def without_te(monkeypatch):
    """A machine without Transformer Engine."""
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "transformer_engine" else found(name))


@pytest.fixture
def with_te(monkeypatch):
    """A machine that has it."""
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: True if name == "transformer_engine" else found(name))


FP8 = ["model.layers=transformer_engine", "model.fp8=hybrid"]


def test_a_large_recipe_fits_its_cluster_and_says_what_it_waits_for(elsewhere, capsys):
    status, output = plan(capsys, "qwen3_14b")
    assert status == 0
    waits = output.split("Before it can start:")[1]
    assert "nemo-rmt import source=HF_FOLDER target=checkpoints/qwen3_14b" in waits
    assert "nemo-rmt data build qwen3_14b" in waits and "To change" not in waits
    for said in ("14,768,307,200 parameters", "tensor 2", "data 8", "989 TFLOP/s", "Reserve: 2 GiB"):
        assert said in output
    assert list(elsewhere.iterdir()) == []


def test_every_recipe_can_be_planned(elsewhere, capsys):
    for name in ("tiny", "small", "olmo2_1b", "smollm3_3b", "r1_distill_qwen_14b"):
        assert plan(capsys, name)[0] == 0, name


def test_a_recipe_too_big_is_refused_with_the_part_and_changes_that_fit(elsewhere, capsys):
    status, output = plan(capsys, "qwen3_14b", "cluster.nodes=1", "parallel.recompute=none")
    assert status == 2
    assert "rmt needs" in output and "in training" in output and "more than a GPU has: activations" in output
    assert "parallel.tensor=4" in output.split("These would fit:")[1]


@pytest.mark.parametrize(
    "overrides",
    [
        ["cluster.nodes=1", "parallel.recompute=none"],
        ["cluster.gpu_memory_gib=50"],
        ["parallel.distributed_optimizer=false"],
        ["rmt.micro_batch_size=4", "parallel.recompute=none", "cluster.gpu_memory_gib=70"],
        ["rollout.batch_size=512"],
    ],
)
def test_proposed_changes_build_fit_and_are_no_larger_than_needed(overrides):
    recipe = load_recipe("qwen3_14b", [], overrides)
    assert unfit(recipe, VOCAB) == ["rmt"]
    changes = nearest_changes(recipe, VOCAB)
    assert changes and len({len(change) for change in changes}) == 1
    for change in changes:
        again = load_recipe("qwen3_14b", [], [*overrides, *written(change).split()])
        assert again == changed_recipe(recipe, change)
        assert all(memory(again, each, VOCAB).peak <= available(again) for each in workloads(again))


def test_nothing_is_proposed_where_nothing_helps():
    assert nearest_changes(load_recipe("qwen3_14b", [], ["cluster.gpu_memory_gib=6"]), VOCAB) == []


def test_a_reference_model_and_larger_batches_need_more():
    plain = build("qwen3_14b")
    with_kl = load_recipe("qwen3_14b", [], ["rmt.grpo.kl_coefficient=0.1"])
    rows = load_recipe("qwen3_14b", [], ["rollout.batch_size=128"])
    needed = {}
    for name, recipe in {"plain": plain, "kl": with_kl, "rows": rows}.items():
        (workload,) = workloads(recipe)
        needed[name] = memory(recipe, workload, VOCAB)
    assert needed["kl"].peak - needed["plain"].peak == needed["kl"].frozen == needed["plain"].weights
    assert needed["rows"].sampling > 1.9 * needed["plain"].sampling


def test_paths_of_the_user_that_are_missing_are_refused(elsewhere, capsys):
    status, output = plan(capsys, "qwen3_14b", "pretrain.checkpoint=/does/not/exist")
    assert status == 2 and "pretrain.checkpoint=/does/not/exist is not there" in output.split("To change:")[1]
    status, output = plan(
        capsys, "tiny", "data.corpora=[{name: web, kind: jsonl, path: /no/web.jsonl}]", "rmt.corpora=[]"
    )
    assert status == 2 and "data.corpora[web].path=/no/web.jsonl is not there" in output


def test_all_that_disagrees_is_listed(elsewhere, capsys):
    folder = elsewhere / "tokenizer"
    train_tokenizer(["one and two"], Recipe().tokenizer.model_copy(update={"vocab_size": 300}), folder)
    tokenizer = Tokenizer.load(folder)
    recipe = build("tiny")
    wrong = recipe.model.model_dump() | {"num_layers": 6}
    first = write_checkpoint(elsewhere / "a", wrong, vocab_size=tokenizer.vocab_size, tokenizer=tokenizer.fingerprint)
    second = write_checkpoint(elsewhere / "b", recipe.model.model_dump(), vocab_size=999, tokenizer="0" * 64)
    status, output = plan(
        capsys, "tiny", f"tokenizer.path={folder}", f"pretrain.checkpoint={first}", f"anneal.remit.reference={second}"
    )
    assert status == 2
    assert "model.num_layers is 6 in the checkpoint, 4 in the recipe" in output
    assert "vocabulary of 999" in output


def test_a_model_smaller_than_its_tokenizer_is_refused(elsewhere, capsys):
    folder = elsewhere / "tokenizer"
    train_tokenizer(["one and two"], Recipe().tokenizer.model_copy(update={"vocab_size": 300}), folder)
    status, output = plan(capsys, "tiny", f"tokenizer.path={folder}", "model.vocab_size=100")
    assert status == 2 and "model.vocab_size=100 is smaller than the tokenizer's" in output


def test_fp8_without_transformer_engine_is_refused(elsewhere, capsys, without_te):
    status, output = plan(capsys, "qwen3_14b", *FP8)
    assert status == 2 and "Transformer Engine is not installed" in output and "model.fp8=null" in output


@pytest.mark.parametrize(
    ("capability", "recipe", "message"),
    [
        (8.0, "tensorwise", "capability 8.9 or more.*8.0.*model.fp8=null"),
        (8.9, "blockwise", "capability 9.0 or more.*8.9.*model.fp8_recipe=tensorwise"),
        (8.9, "tensorwise", None),
        (10.0, "blockwise", None),
    ],
)
def test_fp8_needs_gpus_that_have_it(elsewhere, capsys, with_te, capability, recipe, message):
    words = [
        *FP8,
        "rollout.batch_size=16",
        f"cluster.gpu_compute_capability={capability}",
        f"model.fp8_recipe={recipe}",
    ]
    status, output = plan(capsys, "qwen3_14b", *words)
    assert status == (2 if message else 0)
    assert message is None or re.search(message, output)


def test_fp8_copies_of_the_weights_are_counted(with_te):
    plain = load_recipe("qwen3_14b", [], FP8[:1])
    fp8 = load_recipe("qwen3_14b", [], FP8)
    sizes = [memory(recipe, *workloads(recipe), VOCAB).weights for recipe in (plain, fp8)]
    # Two bytes for each of the layers' 13.2 billion weights, on two ranks.
    assert sizes[1] - sizes[0] == pytest.approx(13.2e9, rel=0.01)


def test_divisions_that_the_recipe_does_not_check_are_checked():
    uneven = {"hidden_size": 96, "num_attention_heads": 6, "num_query_groups": 3, "ffn_hidden_size": 192}
    recipe = Recipe(
        model=uneven | {"max_position": 4096},
        parallel={"tensor": 3},
        cluster={"gpus_per_node": 3},
        **{stage: {"micro_batch_size": 8, "global_batch_size": 8} for stage in ("pretrain", "anneal", "sft", "rl")},
        rmt={"enabled": False},
    )
    assert "parallel.tensor=3 does not divide the embedding's 512 rows" in layout_problems(recipe, 512)[0]
    assert layout_problems(build("qwen3_14b"), VOCAB) == []


def test_planning_imports_no_torch_and_prints_without_a_terminal(tmp_path):
    code = (
        "import sys; from nemo_rmt.plan import run_plan; from nemo_rmt.recipes import build; "
        "run_plan(build('qwen3_14b')); print([name for name in ('torch', 'megatron') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, cwd=tmp_path)
    lines = done.stdout.splitlines()
    assert lines[-1] == "[]", done.stdout[-2000:] + done.stderr
    assert max(map(len, lines)) <= 160
    assert not Path(tmp_path / "runs").exists()


def test_a_cache_that_is_still_to_be_made_is_something_to_do_before(elsewhere, capsys):
    status, output = plan(capsys, "tiny", "anneal.remit.reference.cache=soon")
    assert status == 0
    assert (
        "Before it can start: anneal.remit.reference.cache=soon is not there: make it with nemo-rmt data score tiny"
        in output
    )
    assert "anneal (remit, cached)" in output and "anneal (uniform)" not in output
    Path("soon").mkdir()
    status, output = plan(capsys, "tiny", "anneal.remit.reference.cache=soon")
    assert status == 2 and "is no cache of log-probabilities" in output
