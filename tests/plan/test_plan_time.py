"""Step times against arithmetic done by other means."""

from __future__ import annotations

from dataclasses import replace

import pytest
from nemo_rmt.recipes import build

from nemo_rmt.config import Recipe
from nemo_rmt.model_flops import forward_flops
from nemo_rmt.plan.parameters import parameter_count
from nemo_rmt.plan.step_time import step_time
from nemo_rmt.plan.workload import Workload, workloads
from nemo_rmt.recipe_io import load_recipe

VOCAB = 151_936


def anneal(*overrides: str) -> tuple[Recipe, Workload]:
    """A uniform anneal of Qwen3-14B and its workload."""
    recipe = load_recipe("qwen3_14b", [], ["rmt.enabled=false", "anneal.enabled=true", "anneal.objective=uniform",
                                           "anneal.global_batch_size=64", "anneal.micro_batch_size=1",
                                           "anneal.sequence_length=4096", *overrides])  # fmt: skip
    (workload,) = workloads(recipe)
    return recipe, workload


def test_training_takes_six_flops_a_parameter_and_token_and_two_more_when_recomputed():
    recipe, workload = anneal("parallel.recompute=none")
    products = parameter_count(recipe) - recipe.model.vocab_size * recipe.model.hidden_size
    c = recipe.cluster
    rate = 16 * c.gpu_tflops * 1e12 * c.gpu_efficiency
    short = replace(workload, context=0)
    seconds = step_time(recipe, short, VOCAB).training
    assert seconds == pytest.approx(6 * products * workload.tokens / rate, rel=0.03)  # the head's logits twice
    again = step_time(*anneal(), VOCAB).training / step_time(recipe, workload, VOCAB).training
    assert 1.3 < again < 4 / 3


def test_attention_is_two_products_of_every_head_with_the_tokens_before():
    recipe, _ = anneal()
    model = recipe.model
    more = forward_flops(model, VOCAB, 2048)[0] - forward_flops(model, VOCAB, 0)[0]
    assert more == 2 * 2 * 2048 * model.num_layers * model.num_attention_heads * model.head_dim


def test_a_pipeline_waits_for_its_first_and_last_micro_batch():
    recipe, workload = anneal("parallel.pipeline=2")
    alone, _ = anneal()
    assert workload.micro_batches == 16
    ratio = step_time(recipe, workload, VOCAB).training / step_time(alone, workload, VOCAB).training
    assert ratio == pytest.approx(1 + 1 / 16)


def test_decoding_reads_the_weights_for_every_token():
    recipe = load_recipe("qwen3_14b", [], ["rollout.batch_size=1"])
    (workload,) = workloads(recipe)
    sampling = workload.sampling
    read = 2 * (parameter_count(recipe) - VOCAB * 5120) / 2  # bytes of half the model, without the input embedding
    lowest = sampling.responses * sampling.steps * read / (3.35e12 * recipe.cluster.gpu_efficiency)
    found = step_time(recipe, workload, VOCAB).sampling
    assert lowest < found < 1.3 * lowest  # caches and documents


def test_a_server_one_step_ahead_hides_the_shorter_of_sampling_and_training():
    server = ["rollout.engine=vllm", "rollout.vllm.placement=server", "rollout.max_weight_lag=1"]
    taken = {}
    for lag in (0, 1):
        recipe = load_recipe("qwen3_14b", [], [*server, f"rollout.lag={lag}"])
        (workload,) = workloads(recipe)
        taken[lag] = step_time(recipe, workload, VOCAB)
    assert taken[0].seconds == taken[0].training + taken[0].scoring + taken[0].sampling
    assert taken[1].seconds == max(taken[0].training + taken[0].scoring, taken[0].sampling) < taken[0].seconds


def test_rmts_budget_decays_over_the_stage():
    (workload,) = workloads(build("qwen3_14b"))
    sampling = workload.sampling
    # The integral of 800 · 0.2^x from 0 to 1 is 800 · 0.8 / ln 5.
    assert sampling.length - 2 == pytest.approx(397.7, abs=1.5)
    assert sampling.steps - 2 == pytest.approx(2 * 397.7, abs=3)
    assert sampling.limit == 1602
    assert (sampling.responses, sampling.rows, sampling.trunks) == (128, 64, 8)


def test_anneals_with_and_without_a_reference_are_two_rows():
    found = {workload.name: workload for workload in workloads(build("tiny"))}
    assert found["anneal (uniform)"].frozen == 0 and found["anneal (remit)"].frozen == 1
    assert [found[name].times for name in ("pretrain", "anneal (uniform)", "anneal (remit)", "rl")] == [1, 1, 1, 2]
    frozen = load_recipe("tiny", [], ["anneal.remit.gap_model=frozen", "rl.grpo.kl_coefficient=0.1"])
    found = {workload.name: workload for workload in workloads(frozen)}
    assert found["anneal (remit)"].scored == 2 and found["rl"].frozen == 1


@pytest.mark.parametrize(("gap_model", "scored"), [("current", 0), ("frozen", 1)])
def test_a_cached_reference_is_no_model_and_takes_no_forward(gap_model, scored):
    overrides = ["anneal.objective=remit", "anneal.remit.reference.cache=/cache", f"anneal.remit.gap_model={gap_model}"]
    _, online = anneal(overrides[0], "anneal.remit.reference=/model", overrides[2])
    recipe, cached = anneal(*overrides)
    assert cached.name == "anneal (remit, cached)"
    assert (cached.frozen, cached.scored) == (scored, scored) and online.scored == scored + 1
    if not scored:
        assert step_time(recipe, cached, VOCAB).seconds == step_time(*anneal(), VOCAB).seconds
