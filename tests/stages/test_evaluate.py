"""Evaluation's figures against direct computations."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from nemo_rmt.data.batch import TokenBatch
from nemo_rmt.errors import UserError
from nemo_rmt.megatron.datasets import held_out_rows
from nemo_rmt.megatron.runtime import distributed
from nemo_rmt.rollout.engine import Rollout
from nemo_rmt.stages import held_out_tasks
from nemo_rmt.stages.evaluate import evaluate_text, measured_checkpoints, whole_batches
from nemo_rmt.stages.held_out_tasks import Attempts, attempts, evaluate_tasks, solution_loss
from nemo_rmt.stages.job import StageJob
from nemo_rmt.stages.session import Session

DOMAINS = ("chains", "more")


@pytest.fixture(scope="module")
def session(recipe, data_folder):
    recipe = recipe.model_copy(deep=True)
    recipe.evaluate.micro_batch_size, recipe.evaluate.sequence_length, recipe.evaluate.max_tokens = 4, 40, 440
    job = StageJob(stage="evaluate", iteration=0, inputs={"data": str(data_folder)}, recipe=recipe)
    with distributed(recipe.parallel, seed=1) as layout:
        yield Session(job, data_folder.parent / "evaluate", layout)


def direct(session, model, domain: str) -> list[tuple[float, float, bool]]:
    """(nll, entropy, hit) of every held-out token that counts, one row and one position at a time."""
    rows = held_out_rows(session.data_folder / domain / "held_out", 40, 440)
    assert len(rows) % 4  # so that the last micro-batch needs padding rows
    found = []
    for row in rows:
        batch = TokenBatch.from_documents(row[None], session.tokenizer.eod, document_attention=True)
        scores = model.score(batch, 1, with_entropy=True)
        for place in range(40):
            if int(batch.tokens[0, place]) != session.tokenizer.eod:
                values = (each[0, place] for each in scores[:3])
                logprob, entropy, hit = map(float, values)
                found.append((-logprob, entropy, hit == 1.0))
    return found


def test_text_figures_are_those_of_every_counted_token_and_padding_rows_do_not_count(session, model):
    tokens = {domain: direct(session, model, domain) for domain in DOMAINS}
    everything = [token for domain in DOMAINS for token in tokens[domain]]
    entropies = sorted(entropy for _, entropy, _ in everything)
    # Between two tokens, so that no rounding moves one over an edge.
    session.recipe.evaluate.tier_edges = low, high = [
        sum(entropies[place : place + 2]) / 2 for place in (len(everything) // 4, len(everything) // 2)
    ]
    metrics, _ = evaluate_text(session, model)
    for name, listed in {**tokens, "all": everything}.items():
        expected = sum(nll for nll, *_ in listed) / len(listed)
        assert metrics[f"lm/{name}/nll"] == pytest.approx(expected, rel=1e-5)
    tiers = {
        "easy": [hit for _, entropy, hit in everything if entropy < low],
        "medium": [hit for _, entropy, hit in everything if low <= entropy < high],
        "hard": [hit for _, entropy, hit in everything if entropy >= high],
    }
    assert all(tiers.values()) and any(hit for _, _, hit in everything)
    for name, hits in tiers.items():
        assert metrics[f"tokens/{name}/share"] == pytest.approx(len(hits) / len(everything))
        assert metrics[f"tokens/{name}/accuracy"] == pytest.approx(sum(hits) / len(hits))


def test_rows_follow_each_other_without_a_gap(session):
    rows = held_out_rows(session.data_folder / "chains" / "held_out", 10, 101)
    assert rows.shape == (10, 11)
    assert torch.equal(rows[1:, 0], rows[:-1, -1])


def test_too_little_held_out_text_is_refused(session):
    with pytest.raises(UserError, match="has 51 tokens, too few for one row of evaluate.sequence_length=60"):
        held_out_rows(session.data_folder / "chains" / "held_out", 60, 50)


def test_whole_batches_divide_into_micro_batches_and_only_real_rows_count(session):
    rows = held_out_rows(session.data_folder / "chains" / "held_out", 40, 500)[:5]
    batch = whole_batches(session, rows, 4)
    assert batch.tokens.shape[0] == 8
    assert torch.equal(batch.tokens[:5], rows[:, :-1]) and not batch.loss_mask[5:].any()


class HalfRight:
    """Solves every other problem, always when greedy and in one of two samples otherwise."""

    def __init__(self, session):
        self.session = session

    def generate(self, prompts, sample_ids, sampling) -> list[Rollout]:
        rollouts = []
        for number, prompt in enumerate(prompts):
            times = 1 if sampling.temperature == 0 else 2
            index, sample = divmod(sample_ids[number], times)
            right = index % 2 == 0 and sample == 0
            text = self.session.problems[index].solution if right else "#no"
            response = [*self.session.tokenizer.encode(text), self.session.tokenizer.eod]
            rollouts.append(Rollout(prompt, response, [0.0] * len(response), finished=True))
        return rollouts


def test_task_figures_are_shares_of_problems_solved(session, model, monkeypatch):
    task = session.tasks[0]
    session.problems = [task.problem("held_out", 1, index) for index in range(8)]
    monkeypatch.setattr(held_out_tasks, "InProcessEngine", lambda modules, size: HalfRight(session))
    found = attempts(session, model, task, session.problems)
    figures, tokens = found.figures(2), found.tokens
    assert figures["pass@1"] == 0.25 and figures["pass@2"] == 0.5 and figures["greedy"] == 0.5
    assert figures["pass@1_low"] < 0.25 < figures["pass@1_high"]
    assert figures["greedy_low"] < 0.5 < figures["greedy_high"]
    assert tokens == figures["response_length"] * 16


def test_several_tasks_have_figures_of_their_problems_together_too(session, model, monkeypatch):
    tasks = session.recipe.data.tasks
    assert tasks[0].longer is not None
    monkeypatch.setattr(session.recipe.data, "tasks", [*tasks, tasks[0].model_copy(update={"name": "second"})])
    monkeypatch.setattr(session, "tasks", [*session.tasks, *session.tasks])
    right, wrong = (1.0, 3), (0.0, 5)
    found = [
        Attempts([[right, right]] * 2, [[right]] * 2, solution_nats=6.0, solution_tokens=4),  # chains
        Attempts([[wrong, wrong]], [[wrong]]),  # its longer problems
        Attempts([[right, wrong], [wrong, wrong]], [[right], [wrong]], solution_nats=1.0, solution_tokens=10),  # second
        Attempts([[right, wrong]], [[right]]),
    ]
    monkeypatch.setattr(held_out_tasks, "attempts", lambda *_: found.pop(0))
    metrics, tokens = evaluate_tasks(session, model)
    names = ("chains", "chains_longer", "second", "second_longer", "all", "all_longer")
    assert [metrics[f"tasks/{name}/pass@1"] for name in names] == [1.0, 0.0, 0.25, 0.5, 0.625, 0.25]
    assert [metrics[f"tasks/{name}/greedy"] for name in names] == [1.0, 0.0, 0.5, 1.0, 0.75, 0.5]
    assert metrics["tasks/all/pass@2"] == 0.75 and metrics["tasks/all/pass@1_low"] < 0.625
    assert metrics["tasks/chains/solution_nll"] == 1.5 and metrics["tasks/all/solution_nll"] == 0.5
    assert "tasks/all_longer/solution_nll" not in metrics
    assert tokens == 4 * 3 + 2 * 5 + (3 + 3 * 5) + (3 + 5)


def test_solution_loss_is_that_of_the_answers_tokens_one_by_one(session, model):
    task, tokenizer = session.tasks[0], session.tokenizer
    problems = [task.problem("held_out", 1, index) for index in range(6)]  # so that the last micro-batch needs padding
    problems.append(replace(problems[0], solution=""))  # a family that verifies only
    nats, count = 0.0, 0
    for problem in problems[:6]:
        prompt = tokenizer.chat_prompt([{"role": "user", "content": problem.question}])
        tokens = [*prompt, *tokenizer.encode(problem.solution), tokenizer.eod]
        batch = TokenBatch.from_examples([(tokens, [1] * len(tokens))], tokenizer.pad, None)
        nats -= float(model.score(batch, 1).logprobs[0, len(prompt) - 1 : len(tokens) - 1].sum())
        count += len(tokens) - len(prompt)
    found = solution_loss(session, model, problems)
    assert found == (pytest.approx(nats, rel=1e-5), count)
    assert solution_loss(session, model, problems[6:]) == (0.0, 0)


@pytest.mark.parametrize("along", [True, False])
def test_the_checkpoints_that_an_anneal_kept_on_its_way_are_measured_where_asked_for(along, recipe, tmp_path):
    recipe = recipe.model_copy(deep=True)
    recipe.evaluate.along = along
    checkpoints = {}
    for stage, steps in {"anneal": (10, 200, 30), "rl": (5, 9)}.items():
        for step in steps:
            checkpoints[stage, step] = folder = tmp_path / stage / "checkpoints" / f"step_{step:08d}"
            folder.mkdir(parents=True)
    given = {"anneal": checkpoints["anneal", 200], "rl": checkpoints["rl", 9]}
    session = SimpleNamespace(recipe=recipe, require_input=given.__getitem__)
    earlier = [(f"anneal@{step}", checkpoints["anneal", step]) for step in (10, 30)] if along else []
    assert measured_checkpoints(session, ["anneal", "rl"]) == [*earlier, *given.items()]
