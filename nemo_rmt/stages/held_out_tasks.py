"""Held-out problems of the tasks: whether responses solve them, and how likely their right solutions are."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field

from nemo_rmt import profiling
from nemo_rmt.config import TOGETHER
from nemo_rmt.data.batch import TokenBatch
from nemo_rmt.data.tasks import Problem, TaskFamily, guarded_score
from nemo_rmt.megatron.runtime import broadcast_from_last_stage, gather_over_data_parallel, sum_over_data_parallel
from nemo_rmt.megatron.train_step import ScoredModel
from nemo_rmt.objectives import mean_interval, pass_at_k, wilson_interval
from nemo_rmt.rollout.engine import Sampling
from nemo_rmt.rollout.in_process import InProcessEngine
from nemo_rmt.stages.lm_eval.tasks import measured_splits
from nemo_rmt.stages.rl import response_text
from nemo_rmt.stages.session import Session


@dataclass
class Attempts:
    """(score, length in tokens) of every response to each problem, and how likely the problems' own solutions are."""

    drawn: list[list[tuple[float, int]]] = field(default_factory=list)
    """At temperature 1, evaluate.samples of them."""
    greedy: list[list[tuple[float, int]]] = field(default_factory=list)
    """The one at temperature 0."""
    solution_nats: float = 0.0
    """-log p of the right solutions, which the task's family writes, after their problems."""
    solution_tokens: int = 0
    """Tokens of these solutions; 0 where the family has none."""

    def __add__(self, other: Attempts) -> Attempts:
        return Attempts(
            self.drawn + other.drawn,
            self.greedy + other.greedy,
            self.solution_nats + other.solution_nats,
            self.solution_tokens + other.solution_tokens,
        )

    @property
    def tokens(self) -> int:
        """Sampled at temperature 1."""
        return sum(length for outcomes in self.drawn for _, length in outcomes)

    def figures(self, samples: int) -> dict[str, float]:
        """pass@1, pass@k and greedy accuracy with 95 % intervals, the mean length of a response, and nats per token of
        the right solutions where there are any."""
        correct = [[score >= 1.0 for score, _ in outcomes] for outcomes in self.drawn]
        best = wilson_interval(sum(outcomes[0][0] >= 1.0 for outcomes in self.greedy), len(self.greedy))
        shares = {
            "pass@1": mean_interval([sum(row) / samples for row in correct]),
            f"pass@{samples}": mean_interval([pass_at_k(samples, sum(row), samples) for row in correct]),
            "greedy": best,
        }
        found = {}
        for name, share in shares.items():
            found |= {name: share.mean, f"{name}_low": share.low, f"{name}_high": share.high}
        found["response_length"] = self.tokens / sum(map(len, self.drawn))
        if self.solution_tokens:
            found["solution_nll"] = self.solution_nats / self.solution_tokens
        return found


def evaluate_tasks(session: Session, model: ScoredModel) -> tuple[dict[str, float], int]:
    """The figures of every task and split and, where there are several tasks, of ``all`` of their problems together and
    of those of the longer splits, ``all_longer``; and the tokens sampled."""
    samples, found = session.recipe.evaluate.samples, {}
    for task, settings in zip(session.tasks, session.recipe.data.tasks, strict=True):
        for name, split in measured_splits(settings).items():
            with profiling.part("data"):
                problems = list(
                    itertools.islice(task.problems(split, session.seed("evaluate")), session.recipe.evaluate.problems)
                )
            with profiling.part("rollout"):
                found[name] = attempts(session, model, task, problems), split
    tokens = sum(each.tokens for each, _ in found.values())
    if len(session.tasks) > 1:
        for together, chosen in ((TOGETHER, "held_out"), (f"{TOGETHER}_longer", "longer")):
            if parts := [each for each, split in found.values() if split == chosen]:
                found[together] = sum(parts, Attempts()), chosen
    figures = {name: each.figures(samples) for name, (each, _) in found.items()}
    return {f"tasks/{name}/{key}": value for name, each in figures.items() for key, value in each.items()}, tokens


def attempts(session: Session, model: ScoredModel, task: TaskFamily, problems: list[Problem]) -> Attempts:
    """The responses to problems of one task, of all data-parallel ranks."""
    samples = session.recipe.evaluate.samples
    tokenizer, mine = session.tokenizer, list(range(session.layout.data_rank, len(problems), session.layout.data_size))
    prompts = [tokenizer.chat_prompt([{"role": "user", "content": problems[index].question}]) for index in mine]
    engine = InProcessEngine(model.modules, session.recipe.rollout.batch_size)

    def sample(times: int, temperature: float) -> list[list[tuple[float, int]]]:
        """(score, length) of each response to each of this rank's problems."""
        rollouts = engine.generate(
            [prompt for prompt in prompts for _ in range(times)],
            [index * times + number for index in mine for number in range(times)],
            Sampling(
                max_new_tokens=session.recipe.rollout.max_new_tokens,
                stop_tokens=frozenset({tokenizer.eod}),
                seed=session.seed("evaluate", task.name),
                temperature=temperature,
            ),
        )
        outcomes = []
        for position, rollout in enumerate(rollouts):
            score, _ = guarded_score(task, problems[mine[position // times]], response_text(session, rollout))
            outcomes.append((score, len(rollout.response)))
        return [outcomes[start : start + times] for start in range(0, len(outcomes), times)]

    drawn, greedy = (sample(*how) if mine else [] for how in ((samples, 1.0), (1, 0.0)))
    return Attempts(
        gather_over_data_parallel(drawn), gather_over_data_parallel(greedy), *solution_loss(session, model, problems)
    )


def solution_loss(session: Session, model: ScoredModel, problems: list[Problem]) -> tuple[float, int]:
    """``(nats, tokens)`` of the problems' right solutions after their prompts, of all data-parallel ranks.

    A problem whose family has no solution counts for nothing; of one longer than model.max_position the beginning does.
    """
    limit, tokenizer, layout = session.recipe.model.max_position + 1, session.tokenizer, session.layout
    solved = [problem for problem in problems if problem.solution]
    if not solved:
        return 0.0, 0
    examples = []
    for problem in solved[layout.data_rank :: layout.data_size]:
        prompt = tokenizer.chat_prompt([{"role": "user", "content": problem.question}])
        response = [*tokenizer.encode(problem.solution), tokenizer.eod]
        mask = [0] * len(prompt) + [1] * len(response)
        examples.append(([*prompt, *response][:limit], mask[:limit]))
    size = session.recipe.evaluate.micro_batch_size
    rows = session.whole_rows(-(-len(solved) // layout.data_size), size)
    examples += [([tokenizer.pad] * 2, [0, 0])] * (rows - len(examples))
    batch = TokenBatch.from_examples(examples, tokenizer.pad, None, session.width_multiple).to(layout.device)
    scores, sums = model.score(batch, size), {}
    if scores is not None:
        counted = batch.loss_mask.bool()
        sums = {"nats": -scores.logprobs[counted].double().sum().item(), "tokens": batch.num_tokens()}
    sums = sum_over_data_parallel(broadcast_from_last_stage(sums))
    return sums["nats"], int(sums["tokens"])
