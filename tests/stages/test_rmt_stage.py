"""RMT's step: what is asked, what is packed, what the loss is made of; and the whole stage on a small model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from megatron.core.datasets.indexed_dataset import IndexedDataset

from nemo_rmt.config import Recipe
from nemo_rmt.data.batch import TokenBatch
from nemo_rmt.data.thoughts import Thought
from nemo_rmt.data.tree import BRANCH_MASK
from nemo_rmt.errors import UserError
from nemo_rmt.megatron.runtime import distributed
from nemo_rmt.megatron.train_step import TrainedModel
from nemo_rmt.objectives import group_advantages
from nemo_rmt.rollout.engine import Rollout
from nemo_rmt.stages import pretrain, rmt
from nemo_rmt.stages.curriculum import Curriculum, Origin
from nemo_rmt.stages.job import StageJob
from nemo_rmt.stages.pretrain import next_token
from nemo_rmt.stages.reasoning import Answers, Question
from nemo_rmt.stages.rmt import Round, dual_objective, pack, positions, summarise, trees_of
from nemo_rmt.stages.session import Session
from nemo_rmt.stages.training import Training
from nemo_rmt.tracking import read_metrics

DOCUMENTS = [[10, 11, 12, 13, 14, 15], [20, 21, 22, 23]]
ORIGINS = [Origin("chains", 17, 0), Origin("more", 3, 40)]
QUESTIONS = [Question(0, 2, 0, 0), Question(0, 4, 2, 1), Question(1, 3, 2, 2)]
BASE = "base/pretrain/checkpoints/step_00000005"


@pytest.fixture(scope="module")
def world(recipe):
    with distributed(recipe.parallel, recipe.seed) as layout:
        yield layout


@pytest.fixture(scope="module")
def run(recipe, data_folder, world, tmp_path_factory):
    """A function that runs stage rmt on a pre-trained model and returns its folder."""
    folder = tmp_path_factory.mktemp("rmt")

    def session(stage: str, target: Path, recipe: Recipe) -> Session:
        target.mkdir(parents=True, exist_ok=True)
        inputs = {"data": str(data_folder), "checkpoint": str(folder / BASE)}
        return Session(StageJob(stage=stage, iteration=0, inputs=inputs, recipe=recipe), target, world)

    longer = recipe.model_copy(deep=True)
    pretrain.run(session("pretrain", folder / "base" / "pretrain", longer))

    def run(name: str, **changes) -> Path:
        given = recipe.model_dump()
        given["tracking"] |= changes.pop("tracking", {})
        changed = Recipe.model_validate({**given, "rmt": {**given["rmt"], **changes}})
        rmt.run(session("rmt", folder / name / "rmt", changed))
        return folder / name / "rmt"

    run.session = session
    run.folder = folder
    return run


@pytest.fixture(scope="module")
def session(run, recipe):
    changed = recipe.model_copy(deep=True)
    changed.rmt.grpo.samples_per_group, changed.rmt.micro_batch_size = 2, 2
    return run.session("rmt", run.folder / "unit" / "rmt", changed)


def answered(rewards: list[list[float]]) -> Round:
    """Two responses to each of QUESTIONS, told apart by their tokens and log-probabilities."""
    rollouts, thoughts = [], []
    for number in range(2 * len(QUESTIONS)):
        response = [100 + 10 * number + place for place in range(2 + number)]
        rollouts.append(Rollout([90, 91], response, [-(number + place / 10) for place in range(2 + number)], True))
        thoughts.append(Thought(length=number, closed=True, prediction=response[-1:]))
    values = torch.tensor(rewards)
    answers = Answers(
        rollouts=rollouts,
        thoughts=thoughts,
        matches=(values > 0.5).float(),
        lengths=torch.tensor([thought.length for thought in thoughts]).view(-1, 2),
        formatted=torch.ones(3, 2),
    )
    return Round(DOCUMENTS, QUESTIONS, answers, values, values / 2, group_advantages(values), ORIGINS)


ALL_VARY = [[1.0, 0.0], [0.0, 1.0], [0.25, 1.0]]


def test_a_document_carries_next_token_prediction_but_for_the_tokens_asked_for(session):
    trees = trees_of([answered(ALL_VARY)], session.settings)
    assert [list(tree.trunk) for tree in trees] == DOCUMENTS
    assert [tree.mask for tree in trees] == [[1, 1, 0, 1, 0, 1], [1, 1, 1, 0]]


def test_every_response_is_a_branch_before_its_token_trained_on_behind_its_prompt(session):
    each = answered(ALL_VARY)
    trees = trees_of([each], session.settings)
    branches = [branch for tree in trees for branch in tree.branches]
    assert [branch.position for branch in branches] == [2, 2, 4, 4, 3, 3]
    for branch, rollout, advantage in zip(branches, each.answers.rollouts, each.advantages.flatten(), strict=True):
        assert branch.tokens == [*rollout.prompt, *rollout.response]
        assert branch.mask == [0, 0] + [1] * len(rollout.response)
        assert branch.extras["advantages"] == pytest.approx(float(advantage)) and advantage != 0
        assert branch.extras["rollout_logprobs"] == [0, 0, *rollout.logprobs]


def test_groups_without_variance_have_no_branches_unless_they_are_kept(session):
    each = answered([[1.0, 1.0], [0.0, 1.0], [0.5, 0.5]])
    dropped = trees_of([each], session.settings)
    assert [[branch.position for branch in tree.branches] for tree in dropped] == [[4, 4], []]
    kept = session.settings.model_copy(
        update={"grpo": session.settings.grpo.model_copy(update={"drop_zero_variance": False})}
    )
    assert [len(tree.branches) for tree in trees_of([each], kept)] == [4, 2]


def test_without_next_token_prediction_documents_end_at_their_last_branch(session):
    alone = session.settings.model_copy(update={"ntp_coefficient": 0.0})
    trees = trees_of([answered([[1.0, 0.0], [1.0, 1.0], [0.0, 0.0]])], alone)
    assert [(list(tree.trunk), tree.mask) for tree in trees] == [(DOCUMENTS[0][:2], [0.0, 0.0])]


@pytest.mark.parametrize("normalize", ["token", "sequence"])
def test_the_counts_of_a_step_are_those_of_its_masks(session, normalize, monkeypatch):
    monkeypatch.setattr(session.recipe.rmt.grpo, "normalize", normalize)
    batch, _, totals = pack(session, trees_of([answered(ALL_VARY)], session.settings))
    lengths = [2, 3, 4, 5, 6, 7]
    assert totals["rl"] == (sum(lengths) if normalize == "token" else 6)
    # a document's first token is not predicted, and three tokens are asked for
    assert totals["ntp"] == batch.num_tokens() == (6 - 1) + (4 - 1) - 3
    assert totals["tokens"] == 6 + 4 + sum(2 + length for length in lengths)
    assert batch.extras[BRANCH_MASK].sum() == sum(lengths)
    assert not ((batch.extras[BRANCH_MASK] > 0) & (batch.loss_mask > 0)).any()


def test_a_rank_without_documents_still_has_a_micro_batch(session):
    batch, size, totals = pack(session, [])
    assert batch.tokens.shape[0] == size == 1 and totals["rl"] == totals["ntp"] == 0
    assert not batch.branch_ids.any()
    assert set(batch.extras) == {"advantages", "rollout_logprobs", BRANCH_MASK}


def test_a_document_with_more_branches_than_a_row_holds_is_computed_again_without_its_loss(session, monkeypatch):
    monkeypatch.setattr(session.recipe.rmt, "sequence_length", 16)
    trees = trees_of([answered(ALL_VARY)], session.settings)
    assert max(map(len, trees)) > 16
    batch, _, totals = pack(session, trees)
    assert batch.tokens.shape[1] <= 16
    assert totals["ntp"] == (6 - 1) + (4 - 1) - 3 and totals["rl"] == 2 + 3 + 4 + 5 + 6 + 7


def gradients(run, recipe, batch: TokenBatch, objective) -> tuple[dict[str, torch.Tensor], dict]:
    """Gradients of one step from the same weights, and its metrics."""
    changed = recipe.model_copy(deep=True)
    changed.rmt.optim.clip_grad = 0.0
    training = Training(run.session("rmt", run.folder / "gradients" / "rmt", changed), run.folder / BASE)
    micro_batches = batch.micro_batches(batch.tokens.shape[0])
    metrics = training.model.train_step(micro_batches, objective, with_entropy=True)
    chunk = training.model.modules[0]
    return {name: parameter.main_grad.clone() for name, parameter in chunk.named_parameters()}, metrics


def test_the_next_token_term_is_that_of_plain_next_token_prediction_on_the_same_mask(run, recipe, session):
    """With all advantages 0 the policy's gradient vanishes, and λ times plain next-token prediction's is left."""
    batch, _, totals = pack(session, trees_of([answered(ALL_VARY)], session.settings))
    batch.extras["advantages"].zero_()
    dual, metrics = gradients(run, recipe, batch, dual_objective(session.settings, recipe.rollout, totals))
    plain, expected = gradients(run, recipe, batch, next_token)
    assert metrics["ntp/loss"] == pytest.approx(expected["loss"], rel=1e-6) and metrics["ntp/loss"] > 1
    for name, gradient in plain.items():
        assert gradient.norm() > 0, name
        torch.testing.assert_close(dual[name], 0.1 * gradient, rtol=1e-4, atol=1e-7, msg=name)


def test_the_policy_term_does_not_depend_on_how_many_document_tokens_there_are(run, recipe, session):
    alone = session.settings.model_copy(update={"ntp_coefficient": 0.0})
    trees = trees_of([answered(ALL_VARY)], session.settings)
    batch, _, totals = pack(session, trees)
    long, _ = gradients(run, recipe, batch, dual_objective(alone, recipe.rollout, totals))
    batch.loss_mask[:, 1:] = 0
    fewer = {**totals, "ntp": int(batch.loss_mask.sum())}
    short, _ = gradients(run, recipe, batch, dual_objective(alone, recipe.rollout, fewer))
    for name, gradient in long.items():
        torch.testing.assert_close(short[name], gradient, rtol=1e-4, atol=1e-7, msg=name)


def test_the_metrics_of_a_step(session):
    each = answered([[1.0, 0.0], [1.0, 1.0], [0.5, 0.5]])
    metrics = summarise(session, [each], step=0, targets=(0.6, 0.3, 0.1))
    assert metrics["rmt/groups"] == 3 and metrics["rmt/documents"] == 2
    assert metrics["rmt/share_easy"] == pytest.approx(1 / 3) and metrics["rmt/share_hard"] == pytest.approx(2 / 3)
    assert (metrics["rmt/target_easy"], metrics["rmt/target_medium"], metrics["rmt/target_hard"]) == (0.6, 0.3, 0.1)
    assert "rmt/share_medium" not in metrics and "rmt/match_medium" not in metrics
    assert metrics["rmt/match_easy"] == 0.5 and metrics["rmt/match_hard"] == 0.5
    assert metrics["rmt/rewarded_easy"] == 1.0 and metrics["rmt/rewarded_hard"] == 0.5
    assert metrics["rmt/match_rate"] == 0.5
    assert metrics["rmt/zero_variance_groups"] == pytest.approx(2 / 3)
    assert metrics["rmt/think_length"] == (0 + 1 + 2 + 3 + 4 + 5) / 6
    assert metrics["rmt/reward_mean"] == pytest.approx(4 / 6)
    assert metrics["rmt/rollout_tokens"] == (6 + 4) + 6 * 2 + (2 + 3 + 4 + 5 + 6 + 7)


def test_the_stage_follows_its_budget_and_schedule_and_logs_the_samplers_error(run, recipe):
    folder = run("whole")
    steps = read_metrics(folder / "metrics.jsonl")
    assert [step["step"] for step in steps] == [1, 2, 3, 4, 5]
    assert [step["rmt/budget"] for step in steps] == [8, 6, 6, 5, 4]
    assert [round(step["rmt/target_hard"], 4) for step in steps] == [0.1, 0.1, 0.225, 0.475, 0.6]
    for step in steps:
        assert step["rmt/groups"] == recipe.rmt.global_batch_size
        assert sum(step.get(f"rmt/share_{tier}", 0.0) for tier in ("easy", "medium", "hard")) == pytest.approx(1)
        assert step["rollout/logprob_error_mean"] <= step["rollout/logprob_error_max"] < 1e-4
        assert step["rmt/think_length"] <= 2 * step["rmt/budget"] + 2
        assert step["rl/ratio_mean"] == 1 and step["ntp/loss"] > 1
    result = json.loads((folder / "result.json").read_text())
    assert result["status"] == "done" and result["checkpoint"].endswith("step_00000005")


def test_a_stage_killed_between_rollout_and_update_ends_with_the_same_numbers(run, monkeypatch):
    timings = {
        "time",
        "train/tokens_per_s",
        "train/step_s",
        "train/model_tflops_per_s",
        "rollout/wait_s",
        "rollout/tokens_per_s",
    }
    changes = {"checkpoint_interval": 2, "resample_rounds": 1}
    undisturbed = read_metrics(run("undisturbed", **changes) / "metrics.jsonl")
    update, calls = TrainedModel.train_step, []

    def struck(*arguments, **keywords):
        calls.append(arguments)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return update(*arguments, **keywords)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(TrainedModel, "train_step", struck)
        run("struck", **changes)
    resumed = read_metrics(run("struck", **changes) / "metrics.jsonl")
    assert len(resumed) == len(undisturbed) == 5
    for found, expected in zip(resumed, undisturbed, strict=True):
        assert {k: v for k, v in found.items() if k not in timings} == {
            k: v for k, v in expected.items() if k not in timings
        }


def test_a_second_start_reads_the_scores_of_the_first(run, data_folder, monkeypatch):
    run("scored")
    folders = sorted((data_folder / "difficulty").iterdir())
    monkeypatch.setattr("nemo_rmt.stages.difficulty.score_corpora", None)  # would fail
    run("again")
    assert sorted((data_folder / "difficulty").iterdir()) == folders


def test_scores_that_are_given_are_used_and_give_the_same_steps(run, recipe, data_folder, monkeypatch):
    own = read_metrics(run("own_scores") / "metrics.jsonl")
    (folder,) = (data_folder / "difficulty").iterdir()
    monkeypatch.setattr("nemo_rmt.stages.difficulty.score_corpora", None)  # would fail
    given = recipe.rmt.difficulty.model_dump() | {"scores": str(folder)}
    for found, expected in zip(read_metrics(run("given", difficulty=given) / "metrics.jsonl"), own, strict=True):
        assert found["train/loss"] == expected["train/loss"]


@pytest.mark.parametrize(
    "changes",
    [
        {"reward": {"match": "prefix", "prediction_tokens": 3}},
        {"prompt": {"instruction": "[{budget}]", "open_think": False}},
    ],
    ids=["prefix", "own_think"],
)
def test_other_ways_to_ask_and_to_match_train_too(run, changes):
    name = next(iter(changes))
    for step in read_metrics(run(f"other_{name}", **changes) / "metrics.jsonl"):
        assert step["rollout/logprob_error_max"] < 1e-4 and step["rmt/response_length"] > 0


def test_scores_of_another_dataset_are_refused(run, data_folder, tmp_path):
    run("scored_again")
    (folder, *_) = sorted((data_folder / "difficulty").iterdir())
    identity = json.loads((folder / "difficulty.json").read_text())
    text = (folder / "difficulty.json").read_text()
    copy = tmp_path / "scores"
    copy.mkdir()
    for path in folder.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    fingerprint = next(iter(identity["identity"]["corpora"].values()))
    (copy / "difficulty.json").write_text(text.replace(fingerprint, "0" * 64))
    with pytest.raises(UserError, match="rmt.difficulty.scores=.*another dataset"):
        run("foreign", difficulty={"edges": (1.0, 3.0), "scores": str(copy)})


def test_later_updates_on_the_same_rollouts_are_off_policy_and_the_kl_is_measured(run):
    steps = read_metrics(
        run("updates", grpo={"samples_per_group": 4, "updates_per_rollout": 2, "kl_coefficient": 0.1}) / "metrics.jsonl"
    )
    assert any(abs(step["rl/ratio_mean"] - 1) > 1e-6 for step in steps)
    assert steps[-1]["rl/kl"] > 0


def test_groups_without_variance_are_replaced_in_further_rounds(run, recipe):
    # Only the match is rewarded, and an untrained thought rarely gets it: nearly no group varies.
    changes = {"reward": {"length_weight": 0.0}, "budget": {"initial": 4, "decay": 0.5}}
    steps = read_metrics(run("resampled", **changes, resample_rounds=2) / "metrics.jsonl")
    assert max(step["rmt/groups"] for step in steps) > 2 * recipe.rmt.global_batch_size
    once = read_metrics(run("once", **changes) / "metrics.jsonl")
    assert {step["rmt/groups"] for step in once} == {recipe.rmt.global_batch_size}


def test_next_token_prediction_alone_reads_documents_and_samples_nothing(run):
    steps = read_metrics(run("ntp", objective="ntp") / "metrics.jsonl")
    assert all(step["ntp/loss"] == step["train/loss"] for step in steps)
    assert not any(name.startswith("rmt/") for step in steps for name in step)


def test_rpt_asks_for_hard_tokens_alone(run):
    changes = {
        "ntp_coefficient": 0.0,
        "budget": {"schedule": "none", "initial": 8},
        "prompt": {"instruction": ""},
        "reward": {"length_weight": 0.0},
        "curriculum": {"early": (0, 0, 1), "late": (0, 0, 1)},
    }
    for step in read_metrics(run("rpt", **changes) / "metrics.jsonl"):
        assert step["rmt/share_hard"] == 1 and "rmt/budget" not in step
        assert step["train/loss"] == pytest.approx(step["rl/loss"])


def test_the_samples_of_a_step_are_the_corpus_positions_of_its_questions():
    assert positions(QUESTIONS, ORIGINS) == [(0, "chains:17:2"), (1, "chains:17:4"), (2, "more:3:43")]


@pytest.mark.parametrize("objective", ["rmt", "ntp"])
def test_every_sample_is_the_token_that_was_asked_for(run, data_folder, monkeypatch, objective):
    asked, datasets = [], {name: IndexedDataset(str(data_folder / name / "train")) for name in ("chains", "more")}
    questions_of = Curriculum.questions

    def questions(*arguments):
        documents, questions, origins = questions_of(*arguments)
        asked.append([(documents[each.document][each.position], each.number) for each in questions])
        return documents, questions, origins

    monkeypatch.setattr(Curriculum, "questions", questions)
    folder = run(f"samples_{objective}", objective=objective, document_length=16, tracking={"samples": True})
    lines = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5]
    for line, pairs in zip(lines, asked, strict=True):
        places = [sample.split(":") for sample in line["samples"]]
        found = [int(datasets[corpus][int(document)][int(position)]) for corpus, document, position in places]
        assert found == [token for token, _ in sorted(pairs, key=lambda pair: pair[1])]


def test_a_tier_without_tokens_is_refused_before_any_step(run):
    with pytest.raises(UserError, match="hard"):
        run("empty_tier", difficulty={"edges": (50.0, 60.0)})
    assert not (run.folder / "empty_tier" / "rmt" / "metrics.jsonl").exists()


def test_a_row_without_room_for_a_document_and_a_response_is_refused_before_any_step(run):
    prompt = {"instruction": "Use {budget} tokens, " * 5}
    with pytest.raises(
        UserError, match="rmt.sequence_length=128 is less than a document of .* and a response of up to"
    ):
        run("no_room", prompt=prompt)
    assert not (run.folder / "no_room" / "rmt" / "metrics.jsonl").exists()


def test_a_document_longer_than_the_context_is_refused_unless_split(run):
    with pytest.raises(UserError, match="rmt.long_documents=split"):
        run("long", document_length=16, long_documents="refuse")
