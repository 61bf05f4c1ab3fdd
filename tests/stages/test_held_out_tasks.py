"""The figures of held-out problems against direct computations."""

from __future__ import annotations

from dataclasses import replace

import pytest

from nemo_rmt.data.batch import TokenBatch
from nemo_rmt.rollout.engine import Rollout
from nemo_rmt.stages import held_out_tasks
from nemo_rmt.stages.held_out_tasks import Attempts, attempts, evaluate_tasks, solution_loss


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
