"""Evaluation's figures against direct computations."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from nemo_rmt.data.batch import TokenBatch
from nemo_rmt.errors import UserError
from nemo_rmt.megatron.datasets import held_out_rows
from nemo_rmt.stages.evaluate import evaluate_text, measured_checkpoints, whole_batches

DOMAINS = ("chains", "more")


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
