"""A data stage's folder, made once, and what measures a model on it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from small_recipe import small_recipe

from nemo_rmt.megatron.model import build_model
from nemo_rmt.megatron.runtime import distributed
from nemo_rmt.megatron.train_step import ScoredModel
from nemo_rmt.stages import data
from nemo_rmt.stages.job import StageJob
from nemo_rmt.stages.session import Session

CORPORA = [
    {"name": "chains", "kind": "chains", "num_documents": 300, "held_out": 0.2},
    {"name": "more", "kind": "chains", "num_documents": 200, "held_out": 0.2, "options": {"lazy": 0.0}},
]


@pytest.fixture(scope="session")
def recipe():
    """small_recipe with two little corpora; its run folder is that of ``data_folder``."""
    return small_recipe("unused", data={"corpora": CORPORA})


@pytest.fixture(scope="session")
def data_folder(recipe, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("run") / "iteration_000" / "data"
    folder.mkdir(parents=True)
    data.run(StageJob(stage="data", iteration=0, recipe=recipe), folder)
    return folder


@pytest.fixture(scope="module")
def session(recipe, data_folder):
    """Of an evaluation, for modules that have none of their own."""
    recipe = recipe.model_copy(deep=True)
    recipe.evaluate.micro_batch_size, recipe.evaluate.sequence_length, recipe.evaluate.max_tokens = 4, 40, 440
    job = StageJob(stage="evaluate", iteration=0, inputs={"data": str(data_folder)}, recipe=recipe)
    with distributed(recipe.parallel, seed=1) as layout:
        yield Session(job, data_folder.parent / "evaluate", layout)


@pytest.fixture(scope="module")
def model(session) -> ScoredModel:
    """An untrained model with some confident tokens and some hits, for a module's ``session``."""
    torch.manual_seed(3)
    chunks = build_model(session.recipe.model, session.recipe.parallel, session.tokenizer.vocab_size)
    with torch.no_grad():
        for parameter in chunks[0].parameters():
            parameter.mul_(3)
    return ScoredModel(chunks, session.recipe.parallel)
