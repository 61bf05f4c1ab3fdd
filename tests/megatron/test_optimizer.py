"""Learning rates and optimizer settings, as the optimizer itself holds them."""

from __future__ import annotations

import math

import pytest
import torch
from tiny_model import next_token, random_batch, tiny_recipe, trained, world

from nemo_rmt.config import Optim
from nemo_rmt.manifest import latest_checkpoint
from nemo_rmt.megatron.checkpoint import Checkpoints, load_training

PEAK, LOWEST = 2e-3, 1e-4
IDENTITY = {"stage": "pretrain", "iteration": 0, "model": {}, "vocab_size": 300, "tokenizer": "f" * 64}
DECAYS = {
    "constant": lambda done: 1.0,
    "linear": lambda done: 1 - done,
    "cosine": lambda done: (1 + math.cos(math.pi * done)) / 2,
    "one_minus_sqrt": lambda done: 1 - math.sqrt(done),
}


@pytest.fixture(scope="module", autouse=True)
def alone():
    with world():
        yield


def rate(model) -> float:
    (value,) = {group["lr"] for group in model.optimizer.param_groups}
    return value


@pytest.mark.parametrize("schedule", DECAYS)
@pytest.mark.parametrize(("steps", "warmup"), [(8, 0), (9, 3), (4, 10), (1, 5)])
def test_every_step_has_the_learning_rate_of_its_formula(schedule, steps, warmup):
    optim = Optim(lr=PEAK, min_lr=LOWEST, schedule=schedule, warmup_steps=warmup)
    model = trained(tiny_recipe(), optim, steps)
    ramp = min(warmup, steps - 1)  # a warm-up longer than the stage ends with it
    for step in range(steps):
        if step < ramp:
            expected = PEAK * (step + 1) / (ramp + 1)
        else:
            expected = LOWEST + (PEAK - LOWEST) * DECAYS[schedule]((step - ramp) / (steps - ramp))
        assert rate(model) == pytest.approx(expected, rel=1e-12)
        assert expected > 0
        model.scheduler.step(1)
    assert rate(model) == pytest.approx(PEAK if schedule == "constant" else LOWEST, rel=1e-12)


def test_the_reported_learning_rate_is_the_one_the_step_used():
    model = trained(tiny_recipe(), Optim(lr=PEAK, schedule="linear"), steps=4)
    used = [model.train_step(random_batch(2).micro_batches(2), next_token)["lr"] for _ in range(4)]
    assert used == pytest.approx([PEAK, PEAK * 3 / 4, PEAK / 2, PEAK / 4])
    assert rate(model) == 0.0


def test_a_stage_that_takes_over_an_optimizer_keeps_its_own_settings(tmp_path):
    recipe, batches = tiny_recipe(), random_batch(2).micro_batches(2)
    first = trained(recipe, Optim(lr=1e-2, weight_decay=0.5, beta1=0.7, beta2=0.8, epsilon=1e-6, warmup_steps=2))
    for _ in range(5):
        first.train_step(batches, next_token)
    checkpoints = Checkpoints(tmp_path / "checkpoints", keep=1, asynchronous=False, identity=IDENTITY)
    checkpoints.save(5, first, {})
    ours = Optim(lr=3e-3, weight_decay=0.1, schedule="linear", min_lr=1e-3)
    second = trained(recipe, ours, steps=4, seed=2)
    load_training(latest_checkpoint(tmp_path), second, with_schedule=False)
    for group in second.optimizer.param_groups:
        assert group["weight_decay"] in (0.0, 0.1)
        assert (group["betas"], group["eps"]) == ((0.9, 0.95), 1e-8)
    assert 0.1 in {group["weight_decay"] for group in second.optimizer.param_groups}
    used = [second.train_step(batches, next_token)["lr"] for _ in range(4)]
    assert used == pytest.approx([3e-3, 2.5e-3, 2e-3, 1.5e-3])


def test_gradient_norms_are_known_without_clipping_and_clipping_bounds_the_update():
    batches = random_batch(4).micro_batches(4)
    free, clipped = (trained(tiny_recipe(), Optim(lr=1e-2, clip_grad=clip)) for clip in (0.0, 1e-3))
    norms = [model.train_step(batches, next_token)["grad_norm"] for model in (free, clipped)]
    assert norms[0] == pytest.approx(norms[1]) and norms[0] > 0.1


def test_the_fused_update_is_that_of_plain_adam():
    found, expected = (trained(tiny_recipe(), Optim(lr=1e-2, weight_decay=0.1)) for _ in range(2))
    for group in expected.optimizer.param_groups:
        group["fused"] = False
    for seed in range(5):
        for model in (found, expected):
            model.train_step(random_batch(2, seed=seed).micro_batches(2), next_token)
    for one, other in zip(found.modules[0].parameters(), expected.modules[0].parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def test_weight_decay_shrinks_matrices_and_leaves_norms():
    before, plain, decayed = (
        trained(tiny_recipe(), Optim(lr=1e-2, weight_decay=decay)).modules[0] for decay in (0.0, 0.0, 0.5)
    )
    for module, decay in ((plain, 0.0), (decayed, 0.5)):
        model = trained(tiny_recipe(), Optim(lr=1e-2, weight_decay=decay))
        model.train_step(random_batch(2).micro_batches(2), next_token)
        module.load_state_dict(model.modules[0].state_dict())
    for (name, start), one, other in zip(
        before.named_parameters(), plain.parameters(), decayed.parameters(), strict=True
    ):
        shrunk = 1e-2 * 0.5 * start if start.dim() > 1 else torch.zeros_like(start)
        torch.testing.assert_close(one - other, shrunk, rtol=1e-3, atol=1e-6, msg=name)
