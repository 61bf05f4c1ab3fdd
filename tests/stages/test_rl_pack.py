"""From scored rollouts to training rows, on rollouts made by hand."""

from __future__ import annotations

import pytest
import torch

from nemo_rmt.errors import UserError
from nemo_rmt.megatron.runtime import distributed
from nemo_rmt.objectives import group_advantages
from nemo_rmt.rollout.engine import Rollout
from nemo_rmt.stages import rl
from nemo_rmt.stages.job import StageJob
from nemo_rmt.stages.rl import ScoredRollouts, pack, summarise
from nemo_rmt.stages.session import Session

G = 2


@pytest.fixture(scope="module")
def session(recipe, data_folder):
    """An RL stage with groups of two and micro-batches of four."""
    recipe = recipe.model_copy(deep=True)
    recipe.rl.grpo.samples_per_group, recipe.rl.micro_batch_size, recipe.rl.sequence_length = G, 4, 24
    job = StageJob(stage="rl", iteration=0, run_dir="../..", inputs={"data": str(data_folder)}, recipe=recipe)
    with distributed(recipe.parallel, seed=1) as layout:
        yield Session(job, data_folder.parent / "rl", layout)


def scored(rewards: list[list[float]]) -> ScoredRollouts:
    """Responses of different lengths; every token and log-probability is told apart by its rollout and place."""
    rollouts = []
    for group in range(len(rewards)):
        prompt = [10 + group] * (2 + group)
        for sample in range(G):
            number = group * G + sample
            response = [100 + 10 * number + place for place in range(1 + number)]
            logprobs = [-(number + place / 10) for place in range(1 + number)]
            rollouts.append(Rollout(prompt, response, logprobs, finished=sample == 0))
    rewards = torch.tensor(rewards)
    return ScoredRollouts(rollouts, rewards, group_advantages(rewards), scoring_errors=0)


def test_the_loss_is_on_the_responses_tokens_with_their_advantage_and_logprob(session):
    step = scored([[1.0, 0.0], [0.0, 1.0]])
    batch = pack(session, step, session.recipe.rl.grpo)
    assert batch.tokens.shape[0] == 4
    for row, rollout in enumerate(step.rollouts):
        counted = batch.loss_mask[row].bool()
        assert batch.labels[row][counted].tolist() == rollout.response
        assert batch.extras["rollout_logprobs"][row][counted].tolist() == pytest.approx(rollout.logprobs)
        advantage = float(step.advantages.flatten()[row])
        assert advantage != 0
        assert batch.extras["advantages"][row][counted].tolist() == pytest.approx([advantage] * len(rollout.response))
        # each label is predicted from the whole prompt and the response before it
        first = int(counted.nonzero()[0])
        assert batch.tokens[row][: first + 1].tolist() == rollout.prompt
    for name in ("rollout_logprobs", "advantages"):
        assert not batch.extras[name][~batch.loss_mask.bool()].any()


def test_groups_without_a_signal_are_dropped_and_replaced_by_rows_without_loss(session):
    step = scored([[1.0, 1.0], [0.0, 1.0], [0.0, 0.0]])
    batch = pack(session, step, session.recipe.rl.grpo)
    assert batch.tokens.shape[0] == 4  # two kept, two fillers
    assert batch.num_tokens() == sum(len(rollout.response) for rollout in step.rollouts[2:4])
    assert batch.labels[batch.loss_mask.bool()].tolist() == [t for r in step.rollouts[2:4] for t in r.response]
    assert not batch.loss_mask[2:].any() and not batch.extras["advantages"][2:].any()


def test_groups_without_a_signal_are_kept_when_asked_for_and_count_in_the_denominator(session):
    step = scored([[1.0, 1.0], [0.0, 1.0], [0.0, 0.0]])
    kept = session.recipe.rl.grpo.model_copy(update={"drop_zero_variance": False})
    batch = pack(session, step, kept)
    assert batch.tokens.shape[0] == 8
    assert batch.num_tokens() == sum(len(rollout.response) for rollout in step.rollouts)
    assert batch.extras["advantages"].any(dim=1).tolist() == [False, False, True, True] + [False] * 4


def test_a_step_without_any_signal_still_has_a_whole_micro_batch(session):
    batch = pack(session, scored([[1.0, 1.0], [0.0, 0.0]]), session.recipe.rl.grpo)
    assert batch.tokens.shape[0] == 4 and batch.num_tokens() == 0


def test_every_rank_has_as_many_micro_batches_as_the_fullest(session, monkeypatch):
    monkeypatch.setattr(rl, "max_over_data_parallel", lambda count: max(count, 9.0))
    batch = pack(session, scored([[1.0, 0.0]]), session.recipe.rl.grpo)
    assert len(batch.micro_batches(4)) == 3
    assert batch.num_tokens() == 1 + 2


def test_interleaved_pipelines_get_a_multiple_of_their_size(session, monkeypatch):
    layout = {"pipeline": 2, "virtual_pipeline": 2}
    monkeypatch.setattr(session, "recipe", session.recipe.model_copy(update={
        "parallel": session.recipe.parallel.model_copy(update=layout)}))  # fmt: skip
    assert [session.whole_rows(count, 4) for count in (1, 8, 9)] == [8, 8, 16]


def test_a_response_that_does_not_fit_names_the_key_to_raise(session):
    step = scored([[1.0, 0.0]])
    step.rollouts[0] = Rollout([1] * 20, [2] * 10, [-1.0] * 10, finished=False)
    with pytest.raises(UserError, match="rl.sequence_length to at least 29"):
        pack(session, step, session.recipe.rl.grpo)


def test_the_metrics_of_a_step(session):
    metrics, tokens = summarise(session, scored([[1.0, 1.0], [0.0, 1.0]]))
    assert metrics == {
        "rl/reward_mean": 0.75,
        "rl/reward_std": pytest.approx(0.75**0.5 / 2),
        "rl/response_length": 2.5,
        "rl/zero_variance_groups": 0.5,
        "rl/finished": 0.5,
        "rl/scoring_errors": 0,
    }
    assert tokens == 1 + 2 + 3 + 4 + 2 * 2 + 2 * 3
