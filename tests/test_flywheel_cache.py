"""The chain with a cache of log-probabilities in place of ReMiT's reference."""

from __future__ import annotations

from pathlib import Path

import pytest
from fake_flywheel import FIRST, SECOND, changed, fake, ran, small_chain

from nemo_rmt import flywheel, preflight
from nemo_rmt.config import CachedReference, Recipe
from nemo_rmt.data.logprob_cache import begin, complete
from nemo_rmt.errors import UserError
from nemo_rmt.flywheel import run_flywheel, run_one_stage
from nemo_rmt.run_folder import RunFolder
from nemo_rmt.stages.job import StageJob


@pytest.fixture
def cached(tmp_path, monkeypatch) -> tuple[Recipe, list[Path]]:
    """A chain with a cache for its reference, and the data folders that this is compared with."""
    monkeypatch.setattr(flywheel, "_write_report", lambda run: 0)
    recipe = small_chain(tmp_path / "run")
    plan = {"format": 1, "corpora": {}, "tokenizer": "t", "precision": "fp32", "sequence_length": 128}
    begin(tmp_path / "cache", {**plan, "model": {"digest": "m", "path": "/model"}})
    complete(tmp_path / "cache", {})
    compared: list[Path] = []
    monkeypatch.setattr(preflight, "require_fitting", lambda cache, recipe, reference, data: compared.append(data))
    remit = recipe.anneal.remit.model_copy(update={"reference": CachedReference(cache=str(tmp_path / "cache"))})
    return changed(recipe, anneal=recipe.anneal.model_copy(update={"remit": remit})), compared


def test_every_anneal_reads_the_cache_which_is_compared_with_the_data_once_that_is_built(cached):
    recipe, compared = cached
    assert run_flywheel(recipe, command=fake) == 0
    assert ran(recipe) == FIRST + SECOND
    run = RunFolder(Path(recipe.run_dir))
    assert compared == [run.stage_dir(0, "data")]
    for iteration in (0, 1):
        job = StageJob.load(run.stage_dir(iteration, "anneal") / "stage.yaml")
        assert job.recipe.anneal.objective == "remit"
        assert job.inputs["cache"] == recipe.anneal.remit.reference.cache and "reference" not in job.inputs


def test_data_that_the_cache_is_not_of_ends_the_run_before_anything_is_trained(cached, monkeypatch):
    recipe, _ = cached

    def refuse(*arguments: object) -> None:
        raise UserError("another dataset")

    monkeypatch.setattr(preflight, "require_fitting", refuse)
    with pytest.raises(UserError, match="another dataset"):
        run_flywheel(recipe, command=fake)
    assert ran(recipe) == ["0/data"]
    with pytest.raises(UserError, match="another dataset"):
        run_flywheel(recipe, command=fake)
    assert ran(recipe) == []


def test_another_cache_in_its_place_anneals_again(cached, tmp_path):
    recipe, _ = cached
    assert run_flywheel(recipe, command=fake) == 0
    ran(recipe)
    manifest = tmp_path / "cache" / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"m"', '"n"'))
    assert run_flywheel(recipe, command=fake) == 0
    assert ran(recipe) == [*FIRST[2:], *SECOND]


def test_a_cache_that_is_not_finished_is_refused_before_anything_starts(cached, tmp_path):
    recipe, _ = cached
    (tmp_path / "cache" / "manifest.json").unlink()
    with pytest.raises(UserError, match="anneal.remit.reference.cache=.* is not finished.*nemo-rmt data score again"):
        run_flywheel(recipe, command=fake)
    assert run_one_stage(recipe, "data", 0, download=True, command=fake) == 0  # it is scored of the data
