"""remit_weights against loops over tokens, and the properties the paper's weights must have."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nemo_rmt.objectives import ntp_loss, remit_metrics, remit_weights, standard_deviation

shapes = st.tuples(st.integers(1, 4), st.integers(1, 12))
seeds = st.integers(0, 10_000)
epsilons = st.sampled_from([0.01, 0.2, 0.5, 1.0])


def batch(shape, seed, spread=2.0):
    """Reference and policy logprobs, mask and segment ids of one random batch."""
    generator = torch.Generator().manual_seed(seed)
    reference = -spread * torch.rand(shape, generator=generator)
    policy = -spread * torch.rand(shape, generator=generator)
    mask = (torch.rand(shape, generator=generator) > 0.3).long()
    segments = torch.randint(3, shape, generator=generator)
    return reference, policy, mask, segments


def weights_by_loops(reference, policy, mask, epsilon, scale, segments=None):
    """The formula in plain Python, token by token."""
    rows, columns = mask.shape
    result = [[0.0] * columns for _ in range(rows)]
    for row in range(rows):
        groups = {}
        for column in range(columns):
            if mask[row, column]:
                name = 0 if segments is None else int(segments[row, column])
                groups.setdefault(name, []).append(column)
        for members in groups.values():
            gaps = [reference[row, c].item() - policy[row, c].item() for c in members]
            mean = sum(gaps) / len(gaps)
            for column, gap in zip(members, gaps):
                weight = 2 / (1 + math.exp(-scale * (gap - mean)))
                result[row][column] = min(max(weight, 1 - epsilon), 1 + epsilon)
    return torch.tensor(result)


@settings(max_examples=40, deadline=None)
@given(shapes, seeds, epsilons, st.sampled_from([0.5, 1.0, 4.0]), st.booleans())
def test_weights_equal_a_loop_over_tokens(shape, seed, epsilon, scale, documents):
    reference, policy, mask, segments = batch(shape, seed)
    segments = segments if documents else None
    weights = remit_weights(reference, policy, mask, epsilon=epsilon, scale=scale, segment_ids=segments)
    torch.testing.assert_close(weights, weights_by_loops(reference, policy, mask, epsilon, scale, segments))


def test_without_centring_a_reference_that_likes_everything_less_weighs_everything_less():
    reference, policy, mask, segments = batch((3, 8), 4)
    weights = remit_weights(reference - 9, policy, mask, epsilon=0.3, segment_ids=segments, centred=False)
    torch.testing.assert_close(weights, 0.7 * mask)
    alone = remit_weights(reference, policy, mask, epsilon=1.0, centred=False)
    torch.testing.assert_close(alone, 2 / (1 + torch.exp(policy - reference)) * mask)


@settings(max_examples=25, deadline=None)
@given(shapes, seeds, epsilons)
def test_equal_models_give_exactly_one_on_the_mask_and_zero_elsewhere(shape, seed, epsilon):
    reference, _, mask, segments = batch(shape, seed)
    for ids in (None, segments):
        weights = remit_weights(reference, reference.clone(), mask, epsilon=epsilon, segment_ids=ids)
        assert torch.equal(weights, mask.float())


@settings(max_examples=25, deadline=None)
@given(shapes, seeds, st.floats(-5, 5))
def test_shifting_the_reference_by_a_constant_changes_nothing(shape, seed, shift):
    reference, policy, mask, segments = batch(shape, seed)
    for ids in (None, segments):
        torch.testing.assert_close(
            remit_weights(reference + shift, policy, mask, epsilon=1.0, segment_ids=ids),
            remit_weights(reference, policy, mask, epsilon=1.0, segment_ids=ids),
            atol=1e-5,
            rtol=1e-5,
        )


@settings(max_examples=25, deadline=None)
@given(shapes, seeds, epsilons)
def test_weights_stay_within_the_bounds_and_are_detached_float32(shape, seed, epsilon):
    reference, policy, mask, _ = batch(shape, seed, spread=50.0)
    weights = remit_weights(reference.bfloat16(), policy.bfloat16().requires_grad_(), mask, epsilon=epsilon)
    assert weights.dtype == torch.float32 and not weights.requires_grad
    kept = weights[mask.bool()]
    assert bool((kept >= torch.tensor(1 - epsilon)).all()) and bool((kept <= torch.tensor(1 + epsilon)).all())


def test_documents_packed_into_a_row_get_the_weights_they_get_alone():
    reference, policy, _, _ = batch((3, 5), 0)
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0], [1, 1, 0, 0, 0]])
    alone = remit_weights(reference, policy, mask)
    lengths = [5, 3, 2]

    def pack(rows):
        return torch.cat([rows[i, :length] for i, length in enumerate(lengths)] + [torch.zeros(2)]).unsqueeze(0)

    segments = torch.tensor([[7] * 5 + [900_000] * 3 + [0] * 2 + [7] * 2])
    packed = remit_weights(pack(reference), pack(policy), pack(mask.float()), segment_ids=segments)
    assert torch.equal(packed, pack(alone))


def test_padding_neither_enters_the_mean_nor_may_be_finite():
    reference = torch.tensor([[-1.0, -2.0, torch.nan, -torch.inf]])
    policy = torch.tensor([[-2.0, -2.0, 0.0, -torch.inf]])
    weights = remit_weights(reference, policy, torch.tensor([[1, 1, 0, 0]]), epsilon=1.0)
    expected = [2 / (1 + math.exp(-0.5)), 2 / (1 + math.exp(0.5)), 0.0, 0.0]
    torch.testing.assert_close(weights, torch.tensor([expected]))


def test_the_loss_divides_by_the_token_count_and_not_by_the_weights():
    reference, policy, mask, _ = batch((2, 9), 3)
    weights = remit_weights(reference, policy, mask)
    output = ntp_loss(policy, mask, weights)
    assert output.num_tokens.item() == mask.sum().item()
    assert weights.sum().item() != pytest.approx(output.num_tokens.item(), abs=1e-3)


def test_metrics_equal_counts_by_loops():
    reference, policy, mask, _ = batch((4, 50), 5)
    epsilon, bins = 0.2, 20
    weights = remit_weights(reference, policy, mask, epsilon=epsilon)
    metrics = remit_metrics(weights, reference - policy, mask, epsilon, bins)
    kept = weights[mask.bool()].tolist()
    gaps = (reference - policy)[mask.bool()].tolist()
    count = len(kept)
    mean = sum(kept) / count
    values = {name: (total / n) for name, (total, n) in metrics.items()}
    assert all(n.item() == count for _, n in metrics.values())
    assert values["weight_mean"].item() == pytest.approx(mean)
    spread = standard_deviation(values["weight_mean"].item(), values["weight_square"].item())
    assert spread == pytest.approx(math.sqrt(sum((w - mean) ** 2 for w in kept) / count), rel=1e-4)
    low, high = torch.tensor(1 - epsilon).item(), torch.tensor(1 + epsilon).item()
    assert values["share_low"].item() == pytest.approx(sum(w == low for w in kept) / count)
    assert values["share_high"].item() == pytest.approx(sum(w == high for w in kept) / count)
    assert 0 < values["share_low"].item() < 1
    assert values["gap_mean"].item() == pytest.approx(sum(gaps) / count, rel=1e-4, abs=1e-6)
    assert values["gap_abs"].item() == pytest.approx(sum(map(abs, gaps)) / count, rel=1e-4)
    assert values["gap_hist"].tolist() == pytest.approx(
        [
            sum(-2 + 4 * b / bins <= min(max(gap, -2), 1.99) < -2 + 4 * (b + 1) / bins for gap in gaps) / count
            for b in range(bins)
        ]  # fmt: skip
    )
    assert values["weight_hist"].shape == (bins,)
    assert values["weight_hist"].sum().item() == pytest.approx(1.0)
    assert values["weight_hist"][0].item() == pytest.approx(
        sum(w < low + 2 * epsilon / bins - 1e-6 for w in kept) / count
    )


def test_gaps_beyond_the_histogram_are_in_its_outer_bins():
    gap = torch.tensor([[-9.0, -2.0, 0.0, 1.95, 9.0, torch.inf]])
    mask = torch.tensor([[1, 1, 1, 1, 1, 0]])
    histogram, count = remit_metrics(torch.ones(1, 6), gap, mask, 0.2)["gap_hist"]
    assert histogram.tolist() == [2.0] + [0.0] * 9 + [1.0] + [0.0] * 8 + [2.0] and count == 5


def test_metrics_of_equal_models_lie_in_one_bin_with_no_spread():
    logprobs, _, _, _ = batch((2, 10), 1)
    mask = torch.ones(2, 10)
    for epsilon in (0.1, 0.2, 0.3, 1.0):
        metrics = remit_metrics(remit_weights(logprobs, logprobs, mask), torch.zeros(2, 10), mask, epsilon)
        assert metrics["weight_hist"][0].tolist() == [0.0] * 10 + [20.0] + [0.0] * 9
        means = [(total / count).item() for total, count in (metrics["weight_mean"], metrics["weight_square"])]
        assert standard_deviation(*means) == 0.0
        assert metrics["share_low"][0].item() == metrics["share_high"][0].item() == 0.0


@pytest.mark.parametrize("epsilon", [0.0, -0.2, 1.5, math.nan])
def test_epsilon_out_of_range_is_refused(epsilon):
    ones = torch.ones(1, 2)
    with pytest.raises(ValueError, match="epsilon must be above 0 and at most 1"):
        remit_weights(ones, ones, ones, epsilon=epsilon)
    with pytest.raises(ValueError, match="epsilon"):
        remit_metrics(ones, ones, ones, epsilon)


def test_wrong_scale_shapes_and_segment_types_are_refused():
    ones = torch.ones(1, 2)
    with pytest.raises(ValueError, match="scale must be above 0, got 0"):
        remit_weights(ones, ones, ones, scale=0)
    with pytest.raises(ValueError, match="segment_ids must have the shape of reference_logprobs"):
        remit_weights(ones, ones, ones, segment_ids=torch.zeros(1, 3, dtype=torch.long))
    with pytest.raises(ValueError, match="segment_ids must be integers, got torch.float32"):
        remit_weights(ones, ones, ones, segment_ids=ones)
    with pytest.raises(ValueError, match="bins must be at least 1"):
        remit_metrics(ones, ones, ones, 0.2, bins=0)
