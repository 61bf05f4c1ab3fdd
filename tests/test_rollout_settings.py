"""The sampler's settings: what cannot work is refused by its key, its value and the remedy, before anything starts."""

from __future__ import annotations

import importlib.util

import pytest
from small_recipe import small_recipe

from nemo_rmt import cli, preflight
from nemo_rmt.errors import UserError
from nemo_rmt.plan.memory import rank_memory
from nemo_rmt.plan.workload import workloads
from nemo_rmt.recipe_io import load_recipe

VLLM = ["rollout.engine=vllm"]
SERVER = [*VLLM, "rollout.vllm.placement=server"]


@pytest.mark.parametrize(
    ("overrides", "parts"),
    [
        (["rollout.engine=sglang"], ["rollout.engine", "megatron", "vllm", "sglang"]),
        (["rollout.lag=1", "rollout.max_weight_lag=1"], ["rollout", "lag=1", "engine=vllm", "placement=server"]),
        ([*VLLM, "rollout.lag=1", "rollout.max_weight_lag=1"], ["placement=server"]),
        ([*SERVER, "rollout.lag=1"], ["lag 1", "max_weight_lag 0", "raise it"]),
        (
            [*SERVER, "rollout.lag=1", "rollout.max_weight_lag=1", "rollout.importance_cap=null"],
            ["importance_cap", "set it"],
        ),
        (["rollout.lag=2"], ["rollout.lag", "2"]),
        (["rollout.importance_cap=0"], ["rollout.importance_cap", "greater than 0"]),
        (["rollout.mismatch_limit=1.01"], ["mismatch_limit 1.01", "mismatch_warning 1.05"]),
        (["rollout.mismatch_limit=0.5"], ["rollout.mismatch_limit", "0.5"]),
        ([*VLLM, "rollout.top_p=0.9", "rollout.temperature=0.7"], ["top_p 0.9", "temperature 0.7", "engine=megatron"]),
        ([*VLLM, "rollout.temperature=0.001"], ["temperature 0.001", "0.01"]),
        (["rollout.vllm.url=http://127.0.0.1:8000"], ["rollout.vllm", "placement=server"]),
        ([*SERVER, "rollout.vllm.url=127.0.0.1:8000"], ["rollout.vllm", "url '127.0.0.1:8000'", "http://"]),
        (["rollout.vllm.data=2"], ["rollout.vllm", "data 2", "placement=server"]),
        ([*SERVER, "rollout.vllm.host=0.0.0.0"], ["rollout.vllm", "host 0.0.0.0", "every network"]),
        ([*SERVER, "rollout.vllm.host='::'"], ["rollout.vllm", "host ::", "every network"]),
        ([*VLLM, "rollout.vllm.tensor=3"], ["rollout.vllm.tensor=3", "model.num_attention_heads=4"]),
        ([*VLLM, "rollout.vllm.tensor=2"], ["rollout.vllm.tensor=2", "cluster.gpus_per_node = 1"]),
        ([*VLLM, "rollout.vllm.request_timeout_s=1200"], ["request_timeout_s=1200", "cluster.hang_timeout_s=1200"]),
        ([*VLLM, "rollout.vllm.start_timeout_s=2000"], ["start_timeout_s=2000", "cluster.hang_timeout_s=1200"]),
        ([*VLLM, "rollout.vllm.gpu_memory_utilization=1.5"], ["rollout.vllm.gpu_memory_utilization", "1.5"]),
        ([*VLLM, "rollout.vllm.placment=server"], ["rollout.vllm.placment", "rollout.vllm.placement"]),
    ],
)
def test_a_wrong_setting_is_refused_by_its_key_and_value(overrides, parts):
    with pytest.raises(UserError) as error:
        load_recipe("tiny", [], overrides)
    assert all(part in str(error.value) for part in parts), error.value


@pytest.mark.parametrize("overrides", [VLLM, SERVER, [*SERVER, "rollout.lag=1", "rollout.max_weight_lag=1"]])
def test_what_works_is_taken(overrides):
    assert load_recipe("tiny", [], overrides).rollout.engine == "vllm"


def test_without_vllm_the_command_says_how_to_install_it_and_ends_with_status_2(tmp_path, monkeypatch, capsys):
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "vllm" else found(name))
    assert cli.main(["flywheel", "tiny", *VLLM, f"run_dir={tmp_path}/run"]) == 2
    message = capsys.readouterr().err
    assert "rollout.engine=vllm" in message and "pip install 'nemo-rmt[vllm]'" in message
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("changes", "asking"),
    [
        ({"rollout": {"engine": "vllm"}}, "rollout.engine=vllm"),
        ({"evaluate": {"lm_eval": {"enabled": True}}}, "evaluate.lm_eval.enabled=true"),
    ],
)
def test_a_model_of_no_published_architecture_is_refused_where_others_are_to_read_it(changes, asking):
    recipe = small_recipe("unused", **changes)  # its norms on queries and its biases go together nowhere
    with pytest.raises(UserError, match=rf"{asking}: .*model.qk_norm=True, model.qkv_bias=True"):
        preflight.check_published(recipe)
    preflight.check_published(small_recipe("unused", model={"qkv_bias": False}, **changes))


@pytest.mark.parametrize(("replicas", "fits"), [(1, True), (2, False)])
def test_a_server_needs_gpus_beside_those_of_the_training(replicas, fits, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(preflight, "gpu_count", lambda: 4)
    vllm = {"placement": "server", "tensor": 2, "data": replicas}
    recipe = small_recipe("unused", cluster={"gpus_per_node": 2}, rollout={"engine": "vllm", "vllm": vllm})
    if fits:
        preflight.check_sampler(recipe)
        return
    with pytest.raises(UserError, match=r"2 × 2 GPUs beside cluster.gpus_per_node=2, and this machine has 4"):
        preflight.check_sampler(recipe)


def test_the_plan_counts_a_colocated_vllm_with_its_share_of_the_gpu_and_a_server_not_at_all():
    sampled = {}
    for placement in ("colocated", "server"):
        rollout = {"engine": "vllm", "vllm": {"placement": placement, "gpu_memory_utilization": 0.25}}
        recipe = small_recipe("unused", rollout=rollout, cluster={"gpu_memory_gib": 80.0})
        (rl,) = (workload for workload in workloads(recipe) if workload.stage == "rl")
        sampled[placement] = rank_memory(recipe, rl, 300, 0).sampling
    assert sampled == {"colocated": 20 * 2**30, "server": 0}
