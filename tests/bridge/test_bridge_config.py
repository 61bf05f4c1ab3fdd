"""The schedule that remit_config sets up, and what is refused before anything is trained."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import pytest
from megatron.bridge.training.optim import _get_scheduler
from megatron.bridge.training.utils.train_utils import needs_global_state_injection
from megatron.core.transformer.enums import CudaGraphScope
from tiny_bridge import tiny_config

from nemo_rmt.adapters.bridge import ReMiTForwardStep, remit_config
from nemo_rmt.errors import UserError

STABLE, ANNEAL, WARMUP, BATCH = 10, 5, 3, 4


@pytest.fixture
def cfg(models):
    cfg = tiny_config(str(models / "rl"))
    cfg.scheduler.lr_warmup_iters = WARMUP
    return cfg


def scheduler_of(cfg):
    """Megatron's scheduler as Bridge sets it up."""
    cfg.validate()
    return _get_scheduler(cfg.optimizer, cfg.scheduler, SimpleNamespace(param_groups=[{}]))


def test_the_rate_warms_up_stays_and_falls_to_zero(cfg):
    cfg = remit_config(cfg, stable_steps=STABLE, anneal_steps=ANNEAL)
    scheduler = scheduler_of(cfg)
    assert cfg.train.train_iters == STABLE + ANNEAL
    for step in range(STABLE + ANNEAL + 1):
        expected = 1e-2 * min(step / WARMUP, 1, (STABLE + ANNEAL - step) / ANNEAL)
        assert scheduler.optimizer.param_groups[0]["lr"] == pytest.approx(expected, abs=1e-12)
        scheduler.step(BATCH)


def test_a_checkpoint_of_another_schedule_goes_on_in_this_one(cfg):
    before = scheduler_of(cfg)
    before.step(8 * BATCH)
    after = scheduler_of(remit_config(cfg, stable_steps=STABLE, anneal_steps=ANNEAL))
    after.load_state_dict(before.state_dict())
    assert after.optimizer.param_groups[0]["lr"] == 1e-2
    after.step(4 * BATCH)
    assert after.optimizer.param_groups[0]["lr"] == pytest.approx(1e-2 * 3 / ANNEAL)


def test_everything_else_is_kept_and_the_given_configuration_too(cfg):
    before = {name: dict(vars(part)) for name, part in vars(cfg).items() if dataclasses.is_dataclass(part)}
    changed = remit_config(cfg, stable_steps=STABLE, anneal_steps=ANNEAL)
    for name, values in before.items():
        assert vars(getattr(cfg, name)) == values
    different = {
        f"{name}.{key}"
        for name, values in before.items()
        for key, value in values.items()
        if vars(getattr(changed, name))[key] != value
    }
    scheduler = ("lr_decay_style", "lr_wsd_decay_style", "lr_decay_iters", "lr_wsd_decay_iters")
    assert different == {
        "train.train_iters",
        "optimizer.min_lr",
        "scheduler.override_opt_param_scheduler",
        *(f"scheduler.{key}" for key in scheduler),
    }


@pytest.mark.parametrize(
    ("part", "values", "message"),
    [
        ("train", {"train_samples": 100}, "train.train_samples=100"),
        ("train", {"rampup_batch_size": [2, 2, 8]}, "train.rampup_batch_size"),
        ("scheduler", {"lr_warmup_iters": 11}, "11 steps, more than stable_steps=10"),
        ("scheduler", {"lr_warmup_iters": 0, "lr_warmup_fraction": 0.8}, "12 steps, more than stable_steps=10"),
        ("model", {"pipeline_model_parallel_size": 2}, "model.pipeline_model_parallel_size=2"),
        (
            "model",
            {"cuda_graph_impl": "local", "cuda_graph_scope": [CudaGraphScope.full_iteration]},
            "model.cuda_graph_scope=full_iteration",
        ),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
def test_what_the_schedule_or_the_reference_cannot_have_is_refused(cfg, part, values, message):
    vars(getattr(cfg, part)).update(values)
    with pytest.raises(UserError, match=message):
        remit_config(cfg, stable_steps=STABLE, anneal_steps=ANNEAL)


def test_the_step_refuses_pipeline_stages_too(cfg, models):
    cfg.model.pipeline_model_parallel_size = 2
    state = SimpleNamespace(cfg=cfg, train_state=SimpleNamespace(step=0))
    with pytest.raises(UserError, match="model.pipeline_model_parallel_size=2"):
        ReMiTForwardStep(models / "rl", stable_steps=1)(state, iter([]), None)


@pytest.mark.parametrize("steps", [{"stable_steps": 0, "anneal_steps": 1}, {"stable_steps": 1, "anneal_steps": 0}])
def test_both_phases_have_steps(cfg, steps):
    with pytest.raises(UserError, match="must be at least 1, got 0"):
        remit_config(cfg, **steps)


def test_a_reference_that_is_no_checkpoint_is_refused_when_the_step_is_made(tmp_path):
    with pytest.raises(UserError, match="nowhere is no checkpoint"):
        ReMiTForwardStep(tmp_path / "nowhere", stable_steps=1)
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("7")
    with pytest.raises(UserError, match="iter_0000007 is no checkpoint"):
        ReMiTForwardStep(tmp_path, stable_steps=1)


@pytest.mark.parametrize(("name", "value"), [("epsilon", 0), ("epsilon", 1.1), ("scale", 0)])
def test_settings_out_of_range_are_refused_when_the_step_is_made(models, name, value):
    with pytest.raises(UserError, match=f"{name} must be above 0"):
        ReMiTForwardStep(models / "rl", stable_steps=1, **{name: value})


def test_bridge_finds_that_the_step_wants_its_state(models):
    assert needs_global_state_injection(ReMiTForwardStep(models / "rl", stable_steps=1))
