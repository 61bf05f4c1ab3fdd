"""Scoring a run's data: the numbers, at any layout, after a kill; and annealing from them."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import numpy
import pytest
import torch
from small_recipe import small_recipe
from torchrun import run_ranks

from nemo_rmt.config import Recipe
from nemo_rmt.data import cache_blocks
from nemo_rmt.data.batch import TokenBatch
from nemo_rmt.data.cache_blocks import kinds_of
from nemo_rmt.data.logprob_cache import LogprobCache, begin, decode, read_plan
from nemo_rmt.data.tokenizer import Tokenizer
from nemo_rmt.errors import UserError
from nemo_rmt.megatron.datasets import Documents, write_dataset
from nemo_rmt.megatron.runtime import distributed
from nemo_rmt.megatron.train_step import ScoredModel
from nemo_rmt.scoring import Scoring, cache_plan, scoring_job
from nemo_rmt.stages import anneal, score
from nemo_rmt.stages.job import StageJob
from nemo_rmt.stages.session import Session
from nemo_rmt.tracking import read_metrics

WORKER = Path(__file__).with_name("score_worker.py")
BLOCK_TOKENS = 1500
LAYOUTS = {
    "tp2_sp": (2, {"tensor": 2, "sequence": True}),
    "pp2": (2, {"pipeline": 2}),
    "dp2": (2, {}),
}
TOP_K = 3
UNIT = 1 / 1024
DOCUMENT, ROW = 16, 64


def write_pretrain(folder: Path, recipe: Recipe, data: Path, seed: int) -> Path:
    """The job of a checkpoint of a few steps from that seed."""
    job = StageJob(stage="pretrain", iteration=0, inputs={"data": str(data)}, recipe=recipe.model_copy())
    job.recipe.seed = seed
    job.save(folder / f"seed_{seed}" / "pretrain" / "stage.yaml")
    return folder / f"seed_{seed}" / "pretrain" / "stage.yaml"


def write_score(
    folder: Path, recipe: Recipe, data: Path, checkpoint: Path, longest: int = ROW, top_k: int = TOP_K
) -> Path:
    """A cache that has begun, and its job."""
    scoring = Scoring(checkpoint, folder, longest, top_k)
    begin(folder, cache_plan(recipe, scoring, data))
    scoring_job(recipe, scoring, data).save(folder / "stage.yaml")
    return folder / "stage.yaml"


def blocks(cache: Path, kind: int = 0) -> dict[str, numpy.ndarray]:
    """Every block's numbers of a kind, by its file: log-probabilities with NaN as 1, or tokens (1)."""
    kind = kinds_of(read_plan(cache))[kind]
    read = lambda path: numpy.fromfile(path, dtype=kind.dtype).reshape(-1, kind.width).squeeze()  # noqa: E731
    values = (
        (lambda numbers: numbers)
        if "tokens" in kind.suffix
        else lambda numbers: numpy.nan_to_num(decode(numbers), nan=1.0)
    )
    paths = [path for path in sorted(cache.glob("*/block_*")) if path.name.split(".", 1)[1] == kind.suffix]
    return {f"{path.parent.name}/{path.name}": values(read(path)) for path in paths}


def files(cache: Path) -> list[str]:
    """Every file of every block."""
    return sorted(f"{path.parent.name}/{path.name}" for path in cache.glob("*/block_*.u16"))


@pytest.fixture(scope="module")
def run(recipe, data_folder, tmp_path_factory) -> Path:
    """A folder with two checkpoints and a cache of the second one, by one rank."""
    folder = tmp_path_factory.mktemp("scored")
    run_ranks(WORKER, 1, "1", "0", *(str(write_pretrain(folder, recipe, data_folder, seed)) for seed in (1, 2)))
    run_ranks(
        WORKER, 1, str(BLOCK_TOKENS), "0", str(write_score(folder / "one_rank", recipe, data_folder, model(folder)))
    )
    return folder


def model(folder: Path, seed: int = 2) -> Path:
    return folder / f"seed_{seed}" / "pretrain" / "checkpoints" / "step_00000005"


def test_a_cache_has_the_numbers_of_every_corpus_of_weight_and_says_what_they_are_of(run, data_folder):
    manifest = json.loads((run / "one_rank" / "manifest.json").read_text())
    assert set(manifest["corpora"]) == {"chains", "more"}
    for name, corpus in manifest["corpora"].items():
        lengths = Documents(data_folder / name / "train").lengths
        assert corpus["tokens"] == sum(corpus["blocks"]) == lengths.sum()
        assert len(corpus["blocks"]) > 2
    assert manifest["model"]["path"] == str(model(run))
    assert manifest["model"]["architecture"]["num_layers"] == 4
    assert (manifest["sequence_length"], manifest["overlap"], manifest["precision"]) == (ROW, ROW // 2, "fp32")
    result = json.loads((run / "one_rank" / "result.json").read_text())
    assert (
        result["tokens"] == result["metrics"]["score/tokens"] == sum(c["tokens"] for c in manifest["corpora"].values())
    )


@pytest.mark.parametrize("name", LAYOUTS)
def test_the_blocks_of_every_layout_are_one_ranks(run, recipe, data_folder, name):
    processes, parallel = LAYOUTS[name]
    changed = small_recipe("unused", data={"corpora": recipe.data.model_dump()["corpora"]}, parallel=parallel,
                           cluster={"gpus_per_node": processes})  # fmt: skip
    stage = write_score(run / name, changed, data_folder, model(run))
    run_ranks(WORKER, processes, str(BLOCK_TOKENS), "0", str(stage))
    expected, found = blocks(run / "one_rank"), blocks(run / name)
    assert found.keys() == expected.keys()
    for block, logprobs in expected.items():
        assert numpy.abs(found[block] - logprobs).max() <= UNIT
    for (block, logprobs), tokens in zip(
        blocks(run / "one_rank", 2).items(), blocks(run / "one_rank", 1).values(), strict=True
    ):
        assert numpy.abs(blocks(run / name, 2)[block] - logprobs).max() <= UNIT
        # Where two are as likely but for rounding, layouts may take them in another order.
        assert (blocks(run / name, 1)[block.replace("logprobs", "tokens")] == tokens).mean() > 0.999
    written = (run / name / "written.txt").read_text().split()
    assert sorted(written) == files(run / name) and len(written) == 3 * len(expected)


def test_after_a_kill_only_what_is_missing_is_scored_and_the_bytes_are_the_same(run, recipe, data_folder):
    stage = write_score(run / "killed", recipe, data_folder, model(run))
    command = [sys.executable, str(WORKER), str(BLOCK_TOKENS), "5", str(stage)]
    done = subprocess.run(command, capture_output=True, timeout=150)
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()[-3000:]
    assert len(list((run / "killed").glob("*/*.tmp"))) == 1
    with pytest.raises(UserError, match="is not finished"):
        LogprobCache(run / "killed")
    run_ranks(WORKER, 1, str(BLOCK_TOKENS), "0", str(stage))
    written = (run / "killed" / "written.txt").read_text().split()
    # Killed with one block whole and another without its numbers, which is scored again.
    assert set(written) == set(files(run / "one_rank")) and len(written) == len(set(written)) + 2
    for path in (run / "one_rank").glob("*/*.u16"):
        assert (run / "killed" / path.relative_to(run / "one_rank")).read_bytes() == path.read_bytes()
    assert not list((run / "killed").glob("*/*.tmp"))


@pytest.fixture(scope="module")
def layout(recipe):
    with distributed(recipe.parallel, recipe.seed) as layout:
        yield layout


def scored(session: Session, scorer: ScoredModel, tokens: list[int]) -> list[float]:
    """log p of the tokens from the second on, in a row of their own."""
    batch = TokenBatch.from_examples([(tokens, [1.0] * len(tokens))], session.tokenizer.pad, None)
    found = scorer.score(batch, 1)
    return found.logprobs[0, : len(tokens) - 1].tolist()


@pytest.mark.parametrize("longest", [ROW, 12])
def test_every_document_is_scored_from_its_own_start_as_it_would_be_alone(
    run, recipe, data_folder, layout, tmp_path, monkeypatch, longest
):
    monkeypatch.setattr(cache_blocks, "BLOCK_TOKENS", BLOCK_TOKENS)
    stage = write_score(tmp_path / "cache", recipe, data_folder, model(run), longest)
    session = Session(StageJob.load(stage), stage.parent, layout)
    score.run(session)
    documents = Documents(data_folder / "chains" / "train")
    lengths = documents.lengths
    numbers = numpy.concatenate(
        [each for name, each in blocks(tmp_path / "cache").items() if name.startswith("chains")]
    )
    starts = numpy.cumsum(lengths) - lengths
    assert (numbers[starts] == 1).all()  # without a score
    step, scorer = longest // 2, session.frozen_model(model(run))
    for document in (0, 1, len(lengths) // 2, int(lengths.argmax()), len(lengths) - 1):
        tokens = documents.tokens(document, document + 1).tolist()
        for begin_at in range(0, max(1, len(tokens) - longest + step), step):
            own = 1 if begin_at == 0 else longest - step
            window = tokens[begin_at : begin_at + longest]
            expected = scored(session, scorer, window)[own - 1 :]
            at = starts[document] + begin_at + own
            assert numbers[at : at + len(expected)].tolist() == pytest.approx(expected, abs=UNIT / 2 + 1e-5)


def test_the_likeliest_tokens_are_those_in_the_place_of_each(run, recipe, data_folder, layout):
    session = Session(StageJob.load(run / "one_rank" / "stage.yaml"), run / "one_rank", layout)
    scorer, documents = session.frozen_model(model(run)), Documents(data_folder / "chains" / "train")
    tokens, logprobs = (blocks(run / "one_rank", kind) for kind in (1, 2))
    tokens, logprobs = tokens["chains/block_00000.top_tokens.u16"], logprobs["chains/block_00000.top_logprobs.u16"]
    begin_at = 0
    for document, length in enumerate(documents.lengths[:5].tolist()):
        words = documents.tokens(document, document + 1).tolist()
        batch = TokenBatch.from_examples([(words, [1.0] * length)], session.tokenizer.pad, None)
        states = scorer.hidden_states(batch, 1)[0] @ scorer.output_weight.t()
        expected = states[:, : session.vocab_size].log_softmax(-1).topk(TOP_K)
        place = slice(begin_at + 1, begin_at + length)
        assert (tokens[place] == expected.indices.numpy()).mean() > 0.99
        assert numpy.abs(logprobs[place] - expected.values.numpy()).max() <= UNIT / 2 + 1e-5
        assert (logprobs[begin_at] == 1).all()  # without a score
        begin_at += length


@pytest.fixture(scope="module")
def aligned(run, recipe, data_folder) -> Path:
    """A data folder whose documents are all of a quarter of a row, so that each lies whole in its row; and a cache."""
    tokenizer = Tokenizer.load(data_folder / "tokenizer")
    tokenizer.save(run / "aligned" / "tokenizer")
    rng = numpy.random.default_rng(0)
    for name in ("chains", "more"):
        documents = [[*rng.integers(5, 250, DOCUMENT - 1).tolist(), tokenizer.eod] for _ in range(200)]
        write_dataset(run / "aligned" / name / "train", documents, tokenizer.vocab_size)
    stage = write_score(run / "aligned_cache", recipe, run / "aligned", model(run))
    run_ranks(WORKER, 1, "1000", "0", str(stage))
    return run / "aligned"


def anneal_job(folder: Path, recipe: Recipe, data: Path, checkpoint: Path, **changes) -> StageJob:
    """An anneal with ReMiT; ``changes`` are inputs, and ``reference``'s settings with them."""
    recipe = recipe.model_copy(deep=True)
    recipe.anneal.remit.epsilon = 1.0
    if "cache" in changes:
        recipe.anneal.remit.reference = {"cache": str(changes["cache"])}
    inputs = {"data": str(data), "checkpoint": str(checkpoint), **{role: str(path) for role, path in changes.items()}}
    job = StageJob(stage="anneal", iteration=1, inputs=inputs, recipe=recipe)
    job.save(folder / "stage.yaml")
    return job


@pytest.mark.parametrize("processes", [1, 2], ids=["one_rank", "pp2"])
def test_annealing_from_the_cache_is_annealing_with_the_model_up_to_the_encoding(run, recipe, aligned, processes):
    parallel, cluster = {"pipeline": processes}, {"gpus_per_node": processes}
    changed = small_recipe(
        "unused", data={"corpora": recipe.data.model_dump()["corpora"]}, parallel=parallel, cluster=cluster
    )
    folders = {name: run / f"ranks_{processes}" / name / "anneal" for name in ("online", "cached")}
    for (name, folder), source in zip(
        folders.items(), ({"reference": model(run)}, {"cache": run / "aligned_cache"}), strict=True
    ):
        anneal_job(folder, changed, aligned, model(run, 1), **source)
    run_ranks(WORKER, processes, "1000", "0", *(str(folder / "stage.yaml") for folder in folders.values()))
    online, cached = (read_metrics(folder / "metrics.jsonl") for folder in folders.values())
    assert len(online) == len(cached) == 5
    for expected, found in zip(online, cached, strict=True):
        for name in ("train/loss", "train/grad_norm", "remit/weight_std", "remit/gap_mean"):
            assert found[name] == pytest.approx(expected[name], abs=1e-3), name
        assert expected["remit/weight_std"] > 0.02  # so that agreeing means something


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda job, run: setattr(job.recipe.data, "document_attention", False), "set data.document_attention=true"),
        (lambda job, run: job.inputs.update(cache=str(run)), "is no cache of log-probabilities"),
        (lambda job, run: job.inputs.pop("cache"), "inputs.cache is missing"),
        (lambda job, run: job.inputs.update(cache=str(run / "one_rank")), r"documents of data.corpora\[chains\]"),
        (lambda job, run: setattr(job.recipe.anneal.remit.reference, "checkpoint", str(model(run, 1))),
         "another model .made from"),
        (lambda job, run: setattr(job.recipe.anneal.remit.reference, "checkpoint", "/nowhere"),
         "anneal.remit.reference.checkpoint: checkpoint /nowhere does not exist"),
    ],
)  # fmt: skip
def test_an_anneal_refuses_a_cache_that_is_not_its_own(run, recipe, aligned, layout, tmp_path, change, message):
    job = anneal_job(tmp_path, recipe, aligned, model(run, 1), cache=run / "aligned_cache")
    change(job, run)
    with pytest.raises(UserError, match=message):
        anneal.run(Session(job, tmp_path, layout))


def test_no_model_is_loaded_for_a_cached_reference_but_the_frozen_start_where_it_is_asked_for(
    run, recipe, aligned, layout, tmp_path, monkeypatch
):
    loaded = []
    frozen_model = Session.frozen_model
    monkeypatch.setattr(
        Session, "frozen_model", lambda self, path, **keys: loaded.append(path) or frozen_model(self, path, **keys)
    )
    for gap_model in ("current", "frozen"):
        folder = tmp_path / gap_model / "anneal"
        job = anneal_job(folder, recipe, aligned, model(run, 1), cache=run / "aligned_cache")
        job.recipe.anneal.remit.gap_model, job.recipe.anneal.steps = gap_model, 1
        torch.manual_seed(0)
        anneal.run(Session(job, folder, layout))
    assert loaded == [model(run, 1)]
