"""A data stage's folder, made once."""

from __future__ import annotations

from pathlib import Path

import pytest
from small_recipe import small_recipe

from nemo_rmt.stages import data
from nemo_rmt.stages.job import StageJob

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
