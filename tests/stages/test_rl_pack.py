"""From scored rollouts to training rows, on rollouts made by hand: one response in each, and packed."""

from __future__ import annotations

import pytest
import torch

from nemo_rmt.data.tree import BRANCH_MASK
from nemo_rmt.errors import UserError
from nemo_rmt.megatron.runtime import distributed
from nemo_rmt.objectives import group_advantages
from nemo_rmt.rollout.engine import Rollout
from nemo_rmt.stages import rl
from nemo_rmt.stages import session as session_module
from nemo_rmt.stages.job import StageJob
from nemo_rmt.stages.rl import ScoredRollouts, pack, summarise, tree_of
from nemo_rmt.stages.session import Session

G = 2


@pytest.fixture(scope="module")
def stage(recipe, data_folder):
    """An RL stage with groups of two and micro-batches of four."""
    recipe = recipe.model_copy(deep=True)
    recipe.rl.grpo.samples_per_group, recipe.rl.micro_batch_size, recipe.rl.sequence_length = G, 4, 24
    job = StageJob(stage="rl", iteration=0, run_dir="../..", inputs={"data": str(data_folder)}, recipe=recipe)
    with distributed(recipe.parallel, seed=1) as layout:
        yield Session(job, data_folder.parent / "rl", layout)


@pytest.fixture
def packing(stage, monkeypatch) -> Session:
    """With rl.pack."""
    monkeypatch.setattr(stage.recipe.rl, "pack", True)
    return stage


@pytest.fixture
def session(stage, monkeypatch) -> Session:
    """Without rl.pack."""
    monkeypatch.setattr(stage.recipe.rl, "pack", False)
    return stage


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
    batch, size = pack(session, step)
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
    batch, size = pack(session, step)
    assert batch.tokens.shape[0] == 4  # two kept, two fillers
    assert batch.num_tokens() == sum(len(rollout.response) for rollout in step.rollouts[2:4])
    assert batch.labels[batch.loss_mask.bool()].tolist() == [t for r in step.rollouts[2:4] for t in r.response]
    assert not batch.loss_mask[2:].any() and not batch.extras["advantages"][2:].any()


def test_groups_without_a_signal_are_kept_when_asked_for_and_count_in_the_denominator(session, monkeypatch):
    step = scored([[1.0, 1.0], [0.0, 1.0], [0.0, 0.0]])
    monkeypatch.setattr(session.recipe.rl.grpo, "drop_zero_variance", False)
    batch, _ = pack(session, step)
    assert batch.tokens.shape[0] == 8
    assert batch.num_tokens() == sum(len(rollout.response) for rollout in step.rollouts)
    assert batch.extras["advantages"].any(dim=1).tolist() == [False, False, True, True] + [False] * 4


def test_a_step_without_any_signal_still_has_a_whole_micro_batch(session):
    batch, size = pack(session, scored([[1.0, 1.0], [0.0, 0.0]]))
    assert batch.tokens.shape[0] == 4 and batch.num_tokens() == 0


def test_every_rank_has_as_many_micro_batches_as_the_fullest(session, monkeypatch):
    monkeypatch.setattr(rl, "max_over_data_parallel", lambda count: max(count, 9.0))
    batch, size = pack(session, scored([[1.0, 0.0]]))
    assert size == 4 and len(batch.micro_batches(size)) == 3
    assert batch.num_tokens() == 1 + 2


def test_interleaved_pipelines_get_a_multiple_of_their_size(session, monkeypatch):
    layout = {"pipeline": 2, "virtual_pipeline": 2}
    monkeypatch.setattr(session, "recipe", session.recipe.model_copy(update={
        "parallel": session.recipe.parallel.model_copy(update=layout)}))  # fmt: skip
    assert [session.whole_rows(count, 4) for count in (1, 8, 9)] == [8, 8, 16]


@pytest.mark.parametrize("pack_responses", [True, False])
def test_a_response_that_does_not_fit_names_the_key_to_raise(session, monkeypatch, pack_responses):
    monkeypatch.setattr(session.recipe.rl, "pack", pack_responses)
    step = scored([[1.0, 0.0]])
    step.rollouts[0] = Rollout([1] * 20, [2] * 10, [-1.0] * 10, finished=False)
    with pytest.raises(UserError, match="rl.sequence_length to at least 29"):
        pack(session, step)


def responses_of(batch) -> dict[tuple[int, ...], dict]:
    """What a packed batch holds of each response: by its tokens, what they are predicted from and with."""
    found = {}
    for row in range(len(batch.tokens)):
        for branch in range(1, int(batch.branch_ids[row].max()) + 1):
            own = batch.branch_ids[row] == branch
            (fork,) = set(batch.fork_columns[row][own].tolist())
            trunk = (batch.segment_ids[row] == batch.segment_ids[row][own][0]) & (batch.branch_ids[row] == 0)
            seen = trunk & (torch.arange(len(trunk)) < fork)
            assert batch.extras[BRANCH_MASK][row][own].all()
            found[tuple(batch.labels[row][own].tolist())] = {
                "read": [*batch.tokens[row][seen].tolist(), *batch.tokens[row][own].tolist()],
                "positions": [*batch.position_ids[row][seen].tolist(), *batch.position_ids[row][own].tolist()],
                **{name: batch.extras[name][row][own].tolist() for name in ("advantages", "rollout_logprobs")},
            }
    return found


def test_packed_responses_are_predicted_from_their_prompt_with_their_advantage_and_logprob(packing):
    step = scored([[1.0, 0.0], [0.0, 1.0]])
    batch, _ = pack(packing, step)
    found = responses_of(batch)
    assert len(found) == len(step.rollouts)
    for rollout, advantage in zip(step.rollouts, step.advantages.flatten().tolist(), strict=True):
        response = found[tuple(rollout.response)]
        assert response["read"] == [*rollout.prompt, *rollout.response[:-1]]
        assert response["positions"] == list(range(len(response["read"])))
        assert response["advantages"] == pytest.approx([advantage] * len(rollout.response)) and advantage
        assert response["rollout_logprobs"] == pytest.approx(rollout.logprobs)
    assert not batch.loss_mask.any() and batch.extras[BRANCH_MASK].sum() == 1 + 2 + 3 + 4
    # a prompt is there once for its group, but for its last token
    assert (batch.segment_ids >= 0).sum() == (2 - 1) + (1 + 2) + (3 - 1) + (3 + 4)


def test_a_prompt_of_one_token_is_in_its_responses_alone(packing):
    step = scored([[1.0, 0.0]])
    step.rollouts[:] = [Rollout([7], r.response, r.logprobs, r.finished) for r in step.rollouts]
    batch, _ = pack(packing, step)
    assert [found["read"] for found in responses_of(batch).values()] == [[7], [7, *step.rollouts[1].response[:-1]]]
    assert (batch.segment_ids >= 0).sum() == 1 + 2


def test_groups_longer_than_a_row_are_split_and_share_rows(packing, monkeypatch):
    monkeypatch.setattr(packing.recipe.rl, "sequence_length", 10)
    step = scored([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0]])  # 4, 9, and 3 + 11 columns
    batch, size = pack(packing, step)
    assert len(tree_of(step, 2)) > 10 >= batch.tokens.shape[1]
    assert (batch.tokens.shape[0], size) == (4, 4)
    assert sorted(responses_of(batch)) == sorted(tuple(rollout.response) for rollout in step.rollouts)


def test_packed_groups_without_a_signal_are_dropped_or_kept(packing, monkeypatch):
    step = scored([[1.0, 1.0], [0.0, 1.0], [0.0, 0.0]])
    batch, _ = pack(packing, step)
    assert sorted(responses_of(batch)) == sorted(tuple(rollout.response) for rollout in step.rollouts[2:4])
    monkeypatch.setattr(packing.recipe.rl.grpo, "drop_zero_variance", False)
    kept = responses_of(pack(packing, step)[0])
    assert len(kept) == 6 and [any(found["advantages"]) for found in kept.values()].count(True) == 2


def test_a_packed_step_without_any_signal_is_a_row_of_padding_that_carries_what_the_loss_needs(packing):
    batch, size = pack(packing, scored([[1.0, 1.0], [0.0, 0.0]]))
    assert batch.tokens.shape[0] == size == 1 and (batch.segment_ids == -1).all()
    assert not any(batch.extras[name].any() for name in (BRANCH_MASK, "advantages", "rollout_logprobs"))
    assert not batch.branch_ids.any() and not batch.fork_columns.any()


def test_packed_rows_make_as_many_micro_batches_on_every_rank(packing, monkeypatch):
    monkeypatch.setattr(session_module, "max_over_data_parallel", lambda count: max(count, 9.0))
    batch, size = pack(packing, scored([[1.0, 0.0]]))
    assert (batch.tokens.shape[0], size) == (9, 3)  # three of three, not of four
    assert batch.extras[BRANCH_MASK].sum() == 1 + 2


def test_packed_rows_keep_a_pipeline_busy(packing, monkeypatch):
    def found(**layout) -> list[tuple[int, int]]:
        parallel = packing.recipe.parallel.model_copy(update=layout)
        with monkeypatch.context() as patched:
            patched.setattr(packing, "recipe", packing.recipe.model_copy(update={"parallel": parallel}))
            return [packing.micro_batches(rows) for rows in (1, 4, 5, 9)]

    assert found() == [(1, 1), (1, 4), (2, 3), (3, 3)]
    assert found(pipeline=2) == [(1, 1), (2, 2), (2, 3), (3, 3)]
    assert found(pipeline=2, virtual_pipeline=2) == [(2, 1), (2, 2), (2, 3), (4, 3)]


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
