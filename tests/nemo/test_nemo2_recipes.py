"""NeMo's recipes with a ReMiT stage: what changes, what stays, what is refused."""

from __future__ import annotations

import copy

import fiddle as fdl
import nemo_run as run
import pytest
import torch
from nemo.collections import llm
from nemo.core.optim.lr_scheduler import CosineAnnealing
from nemo.lightning.megatron_parallel import MaskedTokenLossReduction
from nemo2_model import tiny_recipe
from nemo_run.cli.api import RunContext

from nemo_rmt.adapters import nemo2, nemo2_annealing
from nemo_rmt.adapters.nemo2 import remit_stage
from nemo_rmt.adapters.nemo2_annealing import ReMiTAnnealing, ReMiTLossReduction
from nemo_rmt.adapters.nemo2_schedule import StableThenDecayScheduler
from nemo_rmt.errors import UserError

STAGE = {"reference": "/models/rl", "stable_steps": 900, "anneal_steps": 100}
RECIPES = {"qwen3_14b": (llm.qwen3_14b, 500), "llama3_8b": (llm.llama3_8b, 2000)}
"""The recipe's module and its warm-up, in steps."""


@pytest.fixture(params=RECIPES)
def recipe(request) -> run.Partial:
    return RECIPES[request.param][0].pretrain_recipe(num_nodes=2, name="base")


@pytest.mark.parametrize("name", RECIPES)
def test_the_stage_changes_the_schedule_and_adds_remit_and_nothing_else(name):
    module, warmup_steps = RECIPES[name]
    base = module.pretrain_recipe(num_nodes=2)
    untouched = copy.deepcopy(base)
    staged = remit_stage(base, **STAGE, epsilon=0.3, scale=2.0)
    assert base == untouched
    assert staged.remit == run.Config(ReMiTAnnealing, reference="/models/rl", stable_steps=900, epsilon=0.3, scale=2.0)
    assert staged.optim.lr_scheduler == run.Config(StableThenDecayScheduler, warmup_steps=warmup_steps)
    assert staged.trainer.max_steps == 1000
    fdl.update_callable(staged, llm.pretrain, drop_invalid_args=True)
    staged.trainer.max_steps, staged.optim.lr_scheduler = base.trainer.max_steps, base.optim.lr_scheduler
    assert staged == base


def test_overrides_before_and_after_the_call_are_what_is_built(recipe):
    recipe.model.config.num_layers = 7
    recipe.trainer.devices = 4
    staged = remit_stage(recipe, **STAGE)
    staged.trainer.accelerator, staged.trainer.plugins, staged.data = "cpu", None, None
    staged.trainer.strategy.context_parallel_size = 1
    staged.trainer.callbacks = None
    staged.model.config.hidden_size = 512
    # Llama's needs Transformer Engine
    staged.model.config.apply_rope_fusion = False
    staged.optim.config.lr = 5e-5
    staged.remit.epsilon = 0.4
    task = fdl.build(staged).keywords
    assert (task["model"].config.num_layers, task["model"].config.hidden_size) == (7, 512)
    assert (task["trainer"].num_devices, task["trainer"].num_nodes, task["trainer"].max_steps) == (4, 2, 1000)
    assert task["optim"].config.lr == 5e-5
    assert (task["remit"].reference, task["remit"].stable_steps, task["remit"].epsilon) == ("/models/rl", 900, 0.4)


def from_command_line(factory: str, *overrides: str) -> run.Partial:
    """What ``nemo llm pretrain --factory FACTORY OVERRIDE...`` starts."""
    return RunContext(name="pretrain", factory=factory).parse_fn(llm.pretrain, list(overrides))


def test_the_factories_take_the_recipes_arguments_the_stages_and_overrides():
    staged = from_command_line(
        "qwen3_14b_remit(num_nodes=3, reference=/models/rl, stable_steps=70, anneal_steps=30, epsilon=0.1)",
        "trainer.val_check_interval=5",
        "optim.config.lr=1e-5",
        "remit.scale=3",
    )
    assert fdl.get_callable(staged) is nemo2.pretrain
    assert (staged.trainer.num_nodes, staged.trainer.val_check_interval, staged.trainer.max_steps) == (3, 5, 100)
    assert staged.optim.config.lr == 1e-5
    stage = staged.remit
    assert (stage.reference, stage.stable_steps, stage.epsilon, stage.scale) == ("/models/rl", 70, 0.1, 3.0)


@pytest.mark.parametrize("name", RECIPES)
def test_a_factory_anneals_the_last_tenth_by_default_and_keeps_the_length(name):
    total = RECIPES[name][0].pretrain_recipe().trainer.max_steps
    staged = from_command_line(f"{name}_remit", "remit.reference=/models/rl")
    assert (staged.remit.stable_steps, staged.trainer.max_steps) == (total - total // 10, total)
    assert staged.remit.reference == "/models/rl"


def test_a_misspelt_setting_of_the_stage_is_refused():
    with pytest.raises(Exception, match="epsilonn"):
        from_command_line("qwen3_14b_remit", "remit.epsilonn=1")


@pytest.fixture
def checkpoint(tmp_path):
    """As much of one as is looked at before training."""
    (tmp_path / "rl/weights").mkdir(parents=True)
    (tmp_path / "rl/weights/metadata.json").touch()
    return tmp_path / "rl"


@pytest.mark.parametrize(
    "overrides, message",
    [
        ({"remit.reference": None}, "remit.reference is not set"),
        ({"remit.reference": "/nowhere"}, "remit.reference=/nowhere does not exist"),
        ({"remit.reference": "/"}, "remit.reference=/ is not a NeMo 2 checkpoint"),
        ({"remit.stable_steps": 1000}, "remit.stable_steps=1000 must be at least 0 and below trainer.max_steps=1000"),
        ({"trainer.max_steps": 20}, "remit.stable_steps=900 must be at least 0 and below trainer.max_steps=20"),
        ({"remit.epsilon": 1.5}, "remit.epsilon=1.5 must be above 0 and at most 1"),
        ({"remit.scale": 0.0}, "remit.scale=0.0 must be above 0"),
        ({"optim.lr_scheduler.warmup_steps": 901}, "warmup_steps=901 must end before annealing starts"),
    ],
)
def test_what_cannot_anneal_is_refused_before_anything_starts(checkpoint, monkeypatch, overrides, message):
    staged = remit_stage(tiny_recipe(checkpoint / "logs"), **{**STAGE, "reference": str(checkpoint)})
    for key, value in overrides.items():
        *path, last = key.split(".")
        place = staged
        for name in path:
            place = getattr(place, name)
        setattr(place, last, value)
    monkeypatch.setattr(llm, "pretrain", lambda **_: pytest.fail("training started"))
    with pytest.raises(UserError, match=message):
        fdl.build(staged)()


@pytest.mark.parametrize("given", ["", "weights"])
def test_the_reference_may_be_a_checkpoint_or_its_weights(checkpoint, monkeypatch, given):
    started = []
    staged = remit_stage(tiny_recipe(checkpoint / "logs"), **{**STAGE, "reference": str(checkpoint / given)})
    staged.trainer.callbacks = None
    monkeypatch.setattr(llm, "pretrain", lambda **arguments: started.append(arguments))
    fdl.build(staged)()
    (arguments,) = started
    assert any(isinstance(callback, ReMiTAnnealing) for callback in arguments["trainer"].callbacks)
    assert arguments["optim"].lr_scheduler.stable_steps == 900


def test_only_pretraining_recipes_with_an_optimizer_get_the_stage(recipe):
    with pytest.raises(UserError, match="finetune"):
        remit_stage(llm.qwen3_14b.finetune_recipe(), **STAGE)
    recipe.optim = None
    with pytest.raises(UserError, match="optim"):
        remit_stage(recipe, **STAGE)


def schedule(steps: int, peak: float = 2.0, **settings: int) -> list[float]:
    """The learning rates a run of that many steps takes."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=peak)
    scheduler = StableThenDecayScheduler(**settings).scheduler(None, optimizer)["lr_scheduler"]["scheduler"]
    rates = []
    for _ in range(steps):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return rates


def test_learning_rates_of_warm_up_stable_phase_and_decay():
    expected = [0.5, 1.0, 1.5, 2.0, 2.0, 2.0, 2.0, 1.5, 1.0, 0.5, 0.0, 0.0]
    assert schedule(12, warmup_steps=3, stable_steps=6, max_steps=10) == pytest.approx(expected)
    assert schedule(5, stable_steps=0, max_steps=4) == pytest.approx([2.0, 1.5, 1.0, 0.5, 0.0])


def test_warm_up_is_that_of_nemos_cosine_schedule():
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=2.0)
    cosine = CosineAnnealing(optimizer, warmup_steps=5, max_steps=100)
    for rate in schedule(6, warmup_steps=5, stable_steps=50, max_steps=100):
        assert optimizer.param_groups[0]["lr"] == pytest.approx(rate)
        optimizer.step()
        cosine.step()


@pytest.fixture
def one_rank(monkeypatch):
    monkeypatch.setattr(nemo2_annealing.parallel_state, "get_context_parallel_group", lambda: None)


def test_weights_never_enter_the_mask_or_the_token_count(one_rank):
    losses = torch.rand(2, 8, requires_grad=True)
    mask = torch.tensor([[1.0, 1, 1, 1, 1, 1, 0, 0]] * 2)
    batch = {"loss_mask": mask.clone()}
    loss = ReMiTLossReduction(epsilon=1.0, scale=5.0)
    loss.scored = nemo2_annealing.deque([(torch.randn(2, 8), None)])
    loss_sum, num_tokens, report = loss.forward(batch, losses)
    assert torch.equal(batch["loss_mask"], mask)
    assert num_tokens.dtype == torch.int32 and num_tokens == 12
    assert torch.equal(report["loss_sum_and_ub_size"], torch.stack([loss_sum.detach(), torch.tensor(12.0)]))
    loss_sum.backward()
    assert torch.equal(losses.grad == 0, mask == 0)
    assert losses.grad.max() > 1.2 and losses.grad[mask == 1].min() < 0.8


def test_until_the_switch_the_loss_is_nemos_own(one_rank):
    losses, batch = torch.rand(2, 8), {"loss_mask": torch.ones(2, 8)}
    ours, nemos = ReMiTLossReduction(0.2, 1.0).forward(batch, losses), MaskedTokenLossReduction().forward(batch, losses)
    assert torch.equal(ours[0], nemos[0]) and torch.equal(ours[1], nemos[1])


def test_documents_are_told_apart_by_position_ids_that_start_again(monkeypatch):
    monkeypatch.setattr(nemo2_annealing, "get_batch_on_this_cp_rank", lambda batch: batch)
    monkeypatch.setattr(torch.Tensor, "cuda", lambda tensor, **_: tensor)
    whole, packed = torch.arange(6).expand(2, -1), torch.tensor([[0, 1, 2, 0, 1, 2], [0, 1, 0, 0, 1, 2]])
    assert nemo2_annealing._segment_ids([{"position_ids": whole}] * 2, 2) == [None, None]
    # as a data loader yields them: with an index
    first, second = nemo2_annealing._segment_ids([({"position_ids": whole}, 0, 0), ({"position_ids": packed}, 1, 0)], 2)
    assert first.tolist() == [[1] * 6] * 2
    assert second.tolist() == [[1, 1, 1, 2, 2, 2], [1, 1, 2, 3, 3, 3]]
