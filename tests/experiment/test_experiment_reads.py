"""What each stage reads of a recipe, against the table that decides what arms share: every stage runs, watched."""

from __future__ import annotations

from contextlib import contextmanager

import pytest
import torch
from megatron.core import tensor_parallel
from small_recipe import small_recipe

from nemo_rmt.chain import StageRef
from nemo_rmt.config import Data, Flywheel, Recipe
from nemo_rmt.experiment.reads import READS, runnable, what_is_read
from nemo_rmt.experiment.shared import shared_chain
from nemo_rmt.experiment.store import StageStore
from nemo_rmt.megatron.runtime import distributed
from nemo_rmt.recipe_io import changed_keys
from nemo_rmt.stages import anneal, data, evaluate, pretrain, rl, rmt, sft
from nemo_rmt.stages.job import StageJob
from nemo_rmt.stages.session import Session

STAGES = {module.__name__.rpartition(".")[2]: module for module in (pretrain, anneal, rmt, sft, rl, evaluate)}
SMALL = {"steps": 1, "global_batch_size": 4, "checkpoint_interval": 1}


@contextmanager
def watching(seen: set[str]):
    """Note every key of a recipe that is read, as "section", or "section.key" of those that stages read in parts."""
    patch = pytest.MonkeyPatch()

    def watch(kind: type, prefix: str) -> None:
        plain = kind.__getattribute__

        def read(self, name: str):
            if name in kind.model_fields:
                seen.add(prefix + name)
            return plain(self, name)

        patch.setattr(kind, "__getattribute__", read)

    watch(Recipe, "")
    watch(Data, "data.")
    watch(Flywheel, "flywheel.")
    try:
        yield
    finally:
        patch.undo()


@pytest.fixture(scope="module")
def seen(tmp_path_factory) -> dict[str, set[str]]:
    """The keys that each stage of a flywheel read."""
    recipe = small_recipe(
        "unused", pretrain=SMALL, anneal=SMALL, rmt=SMALL, sft=SMALL, rl={**SMALL, "global_batch_size": 8}
    )
    recipe.model.num_layers, recipe.data.corpora[0].num_documents = 2, 300
    recipe.evaluate.problems, recipe.evaluate.positions, recipe.evaluate.along = 2, 4, True
    store, found = StageStore(tmp_path_factory.mktemp("out"), threads=1), {}
    with distributed(recipe.parallel, recipe.seed) as layout:
        for stage in shared_chain(recipe).values():
            folder = store.folder(stage)
            folder.mkdir(parents=True, exist_ok=True)
            if store.is_done(stage):
                continue
            job = StageJob.load(store.write_job(stage))
            tensor_parallel.model_parallel_cuda_manual_seed(recipe.seed)
            torch.manual_seed(recipe.seed)
            with watching(found.setdefault(stage.stage, set())):
                if stage.stage == "data":
                    data.run(job, folder)
                else:
                    STAGES[stage.stage].run(Session(job, folder, layout))
    return found


@pytest.mark.parametrize("stage", READS)
def test_a_stage_reads_nothing_that_the_table_does_not_say(seen, stage):
    allowed = set(READS[stage])
    whole = {key for key in seen[stage] if "." not in key}
    parts = {key for key in seen[stage] if "." in key and key.split(".")[0] not in allowed}
    assert parts <= allowed
    assert {key for key in whole if not any(each.split(".")[0] == key for each in allowed)} == set()
    assert stage in whole


def test_all_others_have_their_defaults_in_what_is_run():
    recipe = small_recipe(
        "unused", anneal={"remit": {"epsilon": 0.5}, "optim": {"lr": 1e-2}}, rollout={"temperature": 2.0}
    )
    uniform = what_is_read(recipe, "anneal", ["data", "checkpoint"])
    assert uniform.anneal.objective == "uniform" and uniform.anneal.remit.epsilon == 0.2
    guided = runnable(what_is_read(recipe, "anneal", ["data", "checkpoint", "reference"]), "anneal")
    assert guided.anneal == recipe.anneal and guided.rollout.temperature == 1.0
    changed = {key.split(".")[0] for key, _, _ in changed_keys(Recipe(), guided)}
    beside = {"iterations", "pretrain", "sft", "rmt", "rl"}  # disabled, or as small as can be
    assert changed <= {key.split(".")[0] for key in READS["anneal"]} | beside


@pytest.mark.parametrize("stage", READS)
def test_what_is_run_can_be_run_in_any_layout(stage):
    recipe = small_recipe("unused", parallel={"tensor": 2, "sequence": True}, cluster={"gpus_per_node": 4})
    made = runnable(what_is_read(recipe, stage, ["reference"]), stage)
    if stage != "data":
        assert (made.parallel, made.model, made.seed) == (recipe.parallel, recipe.model, recipe.seed)


def test_arms_that_differ_in_what_a_stage_does_not_read_share_it():
    chains = [
        shared_chain(small_recipe("unused", anneal={"remit": {"epsilon": epsilon}}, evaluate={"problems": problems}))
        for epsilon, problems in ((0.2, 8), (0.5, 8), (0.2, 4))
    ]
    same = [[ref for ref in chains[0] if chains[0][ref].name == other[ref].name] for other in chains[1:]]
    assert [ref for ref in chains[0] if ref not in same[0]] == [ref for ref in chains[0] if ref.iteration == 1]
    assert [ref for ref in chains[0] if ref not in same[1]] == [StageRef(0, "evaluate"), StageRef(1, "evaluate")]


def test_a_stage_that_is_in_another_turn_is_the_same_unless_its_samples_depend_on_it():
    chain = shared_chain(small_recipe("unused", anneal={"objective": "uniform"}))
    same = {ref.stage for ref in chain if ref.iteration and chain[ref].name == chain[StageRef(0, ref.stage)].name}
    assert same == {"anneal"}
    previous = small_recipe("unused", anneal={"objective": "uniform"}, flywheel={"start_from": "previous"})
    chain = shared_chain(previous)
    assert chain[StageRef(0, "anneal")].iteration == 0 and chain[StageRef(1, "anneal")].iteration == 1


def test_an_anneal_that_keeps_checkpoints_to_be_measured_is_not_shared_with_one_that_does_not():
    along = {"evaluate": {"along": True}}
    chains = [
        shared_chain(small_recipe("unused", flywheel={"keep_checkpoints": kept}, **changes))
        for kept, changes in ((1, {}), (3, {}), (1, along), (3, along))
    ]
    names = [chain[StageRef(0, "anneal")].name for chain in chains]
    assert names[0] == names[1] and len(set(names)) == 3
