"""Checkpoints: everything comes back, only whole ones count, and nothing is left running."""

from __future__ import annotations

import shutil
from pathlib import Path

import psutil
import pytest
import torch
from tiny_model import VOCAB, next_token, random_batch, tiny_recipe, trained, world

from nemo_rmt.compatibility import require_compatible
from nemo_rmt.config import Optim
from nemo_rmt.errors import UserError
from nemo_rmt.manifest import inspect_checkpoint, latest_checkpoint
from nemo_rmt.megatron.checkpoint import Checkpoints, load_training, load_weights
from nemo_rmt.megatron.model import build_model

OPTIM = Optim(lr=1e-2, schedule="cosine", warmup_steps=2, weight_decay=0.1)
TOKENIZER = "f" * 64


@pytest.fixture(scope="module", autouse=True)
def alone():
    with world():
        yield


def checkpoints(stage: Path, recipe, keep: int = 2, asynchronous: bool = False) -> Checkpoints:
    identity = {"stage": "pretrain", "iteration": 0, "model": recipe.model.model_dump(mode="json")}
    identity |= {"vocab_size": VOCAB, "tokenizer": TOKENIZER}
    return Checkpoints(stage / "checkpoints", keep=keep, asynchronous=asynchronous, identity=identity)


def step(model, number: int) -> float:
    return model.train_step(random_batch(4, seed=number).micro_batches(2), next_token)["loss"]


def stepped(recipe):
    """A model after one step: Megatron saves no optimizer that never made one."""
    model = trained(recipe, OPTIM)
    step(model, 0)
    return model


def tensors(model) -> dict[str, torch.Tensor]:
    """Copies of weights and Adam's states."""
    found = {f"weight/{name}": value for name, value in model.modules[0].named_parameters()}
    for part in model.optimizer.chained_optimizers:
        for index, state in enumerate(part.optimizer.state.values()):
            found |= {f"adam/{index}/{name}": value for name, value in state.items()}
    return {name: value.detach().clone() for name, value in found.items()}


def assert_equal(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], value) for name, value in expected.items())


OPTIMIZERS = [
    {"parallel": {"distributed_optimizer": True}},
    {"parallel": {"distributed_optimizer": False}},
    {"parallel": {"distributed_optimizer": True}, "model": {"precision": "bf16"}},
    {"parallel": {"distributed_optimizer": False}, "model": {"precision": "bf16", "tie_embeddings": False}},
]


@pytest.mark.parametrize("changes", OPTIMIZERS, ids=["sharded", "plain", "sharded_bf16", "plain_bf16_untied"])
def test_weights_and_adam_states_come_back_bitwise_and_training_goes_on_as_if_uninterrupted(tmp_path, changes):
    recipe = tiny_recipe(**{name: dict(keys) for name, keys in changes.items()})
    model = trained(recipe, OPTIM)
    losses = [step(model, number) for number in range(3)]
    saver = checkpoints(tmp_path, recipe)
    saver.save(3, model, {"tokens": 7})
    expected = tensors(model)
    losses += [step(model, number) for number in range(3, 6)]

    resumed = trained(recipe, OPTIM, seed=2)
    assert load_training(latest_checkpoint(tmp_path), resumed, with_schedule=True) == {"step": 3, "tokens": 7}
    assert_equal(tensors(resumed), expected)
    assert [step(resumed, number) for number in range(3, 6)] == losses[3:]
    assert_equal(tensors(resumed), tensors(model))


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    """A stage folder with the checkpoint of step 4, made once for the tests that only look at files."""
    stage, recipe = tmp_path_factory.mktemp("saved"), tiny_recipe()
    checkpoints(stage, recipe).save(4, stepped(recipe), {})
    return stage


@pytest.fixture
def stage(saved, tmp_path) -> Path:
    shutil.copytree(saved, tmp_path / "stage")
    return tmp_path / "stage"


def names(stage: Path) -> list[str]:
    return sorted(path.name for path in (stage / "checkpoints").iterdir())


def test_the_newest_are_kept(tmp_path):
    recipe = tiny_recipe()
    model, saver = stepped(recipe), checkpoints(tmp_path, recipe, keep=2)
    for number in (2, 4, 6):
        saver.save(number, model, {})
    assert names(tmp_path) == ["step_00000004", "step_00000006"]
    checkpoints(tmp_path, recipe, keep=3).save(8, model, {})
    assert names(tmp_path) == ["step_00000004", "step_00000006", "step_00000008"]
    checkpoints(tmp_path, recipe, keep=1).save(10, model, {})
    assert names(tmp_path) == ["step_00000010"]


def test_a_damaged_later_checkpoint_does_not_crowd_out_a_new_one(stage):
    recipe = tiny_recipe()
    shutil.copytree(stage / "checkpoints/step_00000004", stage / "checkpoints/step_00000008")
    (stage / "checkpoints/step_00000008/common.pt").write_bytes(b"")
    assert latest_checkpoint(stage).name == "step_00000004"
    checkpoints(stage, recipe, keep=1).save(6, stepped(recipe), {})
    assert names(stage) == ["step_00000006"]


def killed(source: Path, target: Path) -> None:
    """Stands in for os.replace: ends where a whole draft would become a checkpoint."""
    if Path(source).is_dir():
        raise KeyboardInterrupt
    Path(source).rename(target)


def test_a_save_that_was_killed_before_its_end_is_ignored_and_removed_by_the_next_start(stage, monkeypatch):
    recipe = tiny_recipe()
    monkeypatch.setattr("nemo_rmt.megatron.writing.os.replace", killed)
    with pytest.raises(KeyboardInterrupt):
        checkpoints(stage, recipe).save(8, stepped(recipe), {})
    assert names(stage) == ["step_00000004", "step_00000008.tmp"]
    assert latest_checkpoint(stage).name == "step_00000004"
    checkpoints(stage, recipe)
    assert names(stage) == ["step_00000004"]


def test_the_manifest_lists_every_file_and_notices_a_missing_or_shorter_one(stage):
    folder = stage / "checkpoints/step_00000004"
    info = inspect_checkpoint(folder)
    assert set(info.files) == {path.name for path in folder.iterdir()} - {"manifest.json"}
    assert (info.step, info.vocab_size, info.tokenizer) == (4, VOCAB, TOKENIZER)
    shard = next(folder.glob("*.distcp"))
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-1])
    with pytest.raises(UserError, match=f"truncated: {shard.name} has {len(whole) - 1} bytes"):
        inspect_checkpoint(folder)
    shard.unlink()
    with pytest.raises(UserError, match=f"truncated: {shard.name} is missing"):
        inspect_checkpoint(folder)
    assert latest_checkpoint(stage) is None


def test_weights_alone_load_into_a_bare_model(stage):
    recipe = tiny_recipe()
    model = stepped(recipe)
    chunks = build_model(recipe.model, recipe.parallel, VOCAB)
    load_weights(stage / "checkpoints/step_00000004", chunks)
    expected = dict(model.modules[0].named_parameters())
    assert all(torch.equal(value, expected[name]) for name, value in chunks[0].named_parameters())


@pytest.mark.parametrize(
    ("model", "vocab_size", "tokenizer", "message"),
    [
        ({"tie_embeddings": False}, VOCAB, TOKENIZER, "model.tie_embeddings is True in the checkpoint, False in"),
        ({"num_layers": 4, "qk_norm": True}, VOCAB, TOKENIZER, "model.num_layers is 2 .*model.qk_norm is False"),
        ({}, VOCAB + 1, TOKENIZER, "vocabulary of 300 tokens, the run's model has 301 .model.vocab_size=None"),
        ({"vocab_size": 320}, VOCAB, TOKENIZER, "vocabulary of 300 tokens, the run's model has 320.*vocab_size=300$"),
        ({"vocab_size": 200}, VOCAB, TOKENIZER, "model.vocab_size=200 is smaller than the tokenizer's 300 tokens"),
        ({}, VOCAB, "e" * 64, "another tokenizer"),
    ],
)
def test_a_checkpoint_of_another_model_is_refused(stage, model, vocab_size, tokenizer, message):
    with pytest.raises(UserError, match=message):
        require_compatible(stage / "checkpoints/step_00000004", tiny_recipe(model=model).model, vocab_size, tokenizer)


def children() -> set[int]:
    """This process's own, without Python's bookkeeper of semaphores, which ends with it."""
    found = psutil.Process().children(recursive=True)
    return {child.pid for child in found if "resource_tracker" not in " ".join(child.cmdline())}


@pytest.mark.parametrize("distributed_optimizer", [True, False])
def test_a_background_save_is_that_of_its_moment_and_leaves_no_process_behind(tmp_path, distributed_optimizer):
    recipe, before = tiny_recipe(parallel={"distributed_optimizer": distributed_optimizer}), children()
    model = stepped(recipe)
    saver = checkpoints(tmp_path, recipe, keep=1, asynchronous=True)
    saver.save(1, model, {})
    step(model, 1)
    expected = tensors(model)
    saver.save(2, model, {"tokens": 7})
    assert names(tmp_path)[0] == "step_00000001"  # the first was completed before the second began
    later = [step(model, number) for number in range(2, 5)]  # while the second is being written
    saver.poll()
    saver.finish()
    assert names(tmp_path) == ["step_00000002"]
    assert children() == before

    resumed = trained(recipe, OPTIM, seed=2)
    assert load_training(latest_checkpoint(tmp_path), resumed, with_schedule=True) == {"step": 2, "tokens": 7}
    assert_equal(tensors(resumed), expected)
    assert [step(resumed, number) for number in range(2, 5)] == later
