"""Responses that share their document's prefix against responses to copies of it: one rank, and every layout."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from megatron.core import dist_checkpointing
from shared_trunk_worker import FORKS, MARKER, SAMPLING, STOPS, VOCAB, branches, sample_branches, sample_copies
from small_recipe import small_recipe
from tiny_model import world
from torchrun import run_ranks

from nemo_rmt.megatron import cache
from nemo_rmt.megatron.cache import Caches, Forks, KeyValueCache
from nemo_rmt.megatron.checkpoint import model_state
from nemo_rmt.megatron.cpu import redirected, results_in_process
from nemo_rmt.megatron.model import LogprobGPT, build_model
from nemo_rmt.rollout.engine import BranchPrompt, Rollout, Sampling
from nemo_rmt.rollout.in_process import InProcessEngine

WORKER = Path(__file__).with_name("shared_trunk_worker.py")
LAYOUTS = {
    "tp2_sp": {"tensor": 2, "sequence": True},
    "pp2": {"pipeline": 2},
    "tp2_pp2": {"tensor": 2, "pipeline": 2},
}
ENDLESS = replace(SAMPLING, stop_tokens=frozenset(), marker=None)
EVERYTHING = sum(sum(forks.values()) for forks in FORKS.values())


@pytest.fixture(scope="module", autouse=True)
def alone():
    with world():
        yield


def model(**changes) -> list[LogprobGPT]:
    """The chunk of small_recipe's model, the same weights in every call."""
    recipe = small_recipe("unused", model=changes)
    torch.manual_seed(1)
    chunks = build_model(recipe.model, recipe.parallel, VOCAB)
    with torch.no_grad():
        for parameter in chunks[0].parameters():
            parameter.mul_(1.5)  # a less even distribution, so that errors show
    return chunks


@pytest.fixture(scope="module")
def chunks() -> list[LogprobGPT]:
    return model()


@pytest.fixture(scope="module")
def engine(chunks) -> InProcessEngine:
    return InProcessEngine(chunks, EVERYTHING)


def assert_same(found: list[Rollout], expected: list[Rollout]) -> None:
    """Tokens, ends and, to 1e-5, log-probabilities."""
    assert [rollout.response for rollout in found] == [rollout.response for rollout in expected]
    assert [rollout.finished for rollout in found] == [rollout.finished for rollout in expected]
    for one, other in zip(found, expected, strict=True):
        assert one.logprobs == pytest.approx(other.logprobs, abs=1e-5)


@pytest.mark.parametrize("changes", [{}, {"temperature": 0.7, "top_p": 0.8}, {"temperature": 0.0}])
def test_branches_equal_copied_prefixes(engine, changes):
    sampling = replace(SAMPLING, **changes)
    found = sample_branches(engine, sampling)
    assert_same(found, sample_copies(engine, sampling))
    assert [rollout.prompt for rollout in found] == [prompt.tokens for prompt in branches()[1]]


@pytest.mark.parametrize("groups", [1, 4])
def test_any_number_of_key_value_heads_is_shared(groups):
    engine = InProcessEngine(model(num_query_groups=groups), EVERYTHING)
    assert_same(sample_branches(engine), sample_copies(engine))


@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_branches_do_not_depend_on_their_batch(chunks, engine, batch_size):
    assert_same(sample_branches(InProcessEngine(chunks, batch_size)), sample_branches(engine))


def test_prompts_in_pieces_attend_alike(engine, monkeypatch):
    expected = sample_branches(engine)
    monkeypatch.setattr(cache, "MAX_SCORES", 1)
    assert_same(sample_branches(engine), expected)


def test_a_document_is_computed_once_up_to_its_last_fork(chunks, engine, monkeypatch):
    shapes, forward = [], chunks[0].forward
    monkeypatch.setattr(
        chunks[0], "forward", lambda tokens, *rest: shapes.append(tokens.shape) or forward(tokens, *rest)
    )
    sample_branches(engine)
    widest = max(len(prompt.tokens) for prompt in branches()[1])
    assert shapes[:2] == [(len(FORKS), max(max(forks) for forks in FORKS.values())), (EVERYTHING, widest)]
    assert all(columns == 1 for _, columns in shapes[2:]) and shapes[-1][0] < shapes[2][0]


def test_documents_leave_the_batch_with_their_last_branch(engine, monkeypatch):
    trunks, select = [], Caches.select

    def recorded(self, rows, length=None):
        select(self, rows, length)
        trunks.extend({(len(layer.trunk_keys), layer.forks.shape[0]) for layer in self.layers})

    monkeypatch.setattr(Caches, "select", recorded)
    sample_branches(engine)
    assert all(kept == named for kept, named in trunks) and trunks[-1][0] < len(FORKS)


def test_without_a_prefix_branches_are_prompts(engine):
    _, prompts = branches()
    alone = [BranchPrompt(0, 0, prompt.tokens) for prompt in prompts]
    ids = list(range(len(alone)))
    found = engine.generate_branches([[1, 2]], alone, ids, SAMPLING)
    assert_same(found, engine.generate([prompt.tokens for prompt in alone], ids, SAMPLING))


@pytest.mark.parametrize("after", [1, 4])
def test_a_response_ends_after_the_marker_or_at_a_stop_token(engine, after):
    reasons = set()
    sampled = sample_branches(engine, replace(SAMPLING, after_marker=after))
    for whole, rollout in zip(sample_branches(engine, ENDLESS), sampled, strict=True):
        ends: dict[str, int] = {}
        for index, token in enumerate(whole.response):
            if token in STOPS:
                ends.setdefault("stop", index + 1)
            if token == MARKER:
                ends.setdefault("marker", index + 1 + after)
        ends["limit"] = SAMPLING.max_new_tokens  # last: at the limit too, something else has ended it
        reason = min(ends, key=ends.get)
        assert rollout.response == whole.response[: ends[reason]]
        assert rollout.finished == (reason != "limit") and not whole.finished
        reasons.add(reason)
    assert reasons == {"stop", "marker", "limit"}


def test_a_stop_token_after_the_marker_ends_a_response_at_once(engine):
    whole = sample_branches(engine, ENDLESS)[0].response
    stop = next(index for index, token in enumerate(whole) if token != whole[0])
    sampling = replace(SAMPLING, marker=whole[0], after_marker=stop + 1, stop_tokens=frozenset({whole[stop]}))
    rollout = sample_branches(engine, sampling)[0]
    assert rollout.response == whole[: stop + 1] and rollout.finished


def test_only_the_first_marker_counts(engine):
    index, whole, first, second = next(
        (index, whole, first, second)
        for index, whole in enumerate(rollout.response for rollout in sample_branches(engine, ENDLESS))
        for second in range(1, len(whole) - 2)
        if (first := whole.index(whole[second])) < second
    )
    sampling = replace(ENDLESS, marker=whole[first], after_marker=second - first + 1)
    assert sample_branches(engine, sampling)[index].response == whole[: second + 2]


def test_the_marker_ends_a_response_at_the_limit_but_not_beyond(engine):
    whole = sample_branches(engine, ENDLESS)[0].response
    for after, finished in ((len(whole) - 1, True), (len(whole), False)):
        rollout = sample_branches(engine, replace(ENDLESS, marker=whole[0], after_marker=after))[0]
        assert rollout.response == whole and rollout.finished == finished


def test_what_cannot_be_sampled_is_refused(engine):
    with pytest.raises(ValueError, match="after_marker"):
        Sampling(4, STOPS, seed=0, marker=1)
    with pytest.raises(ValueError, match="at least one token"):
        BranchPrompt(0, 0, [])
    for position in (-1, 3):
        with pytest.raises(ValueError, match=f"position {position} .* 2 tokens"):
            engine.generate_branches([[1, 2]], [BranchPrompt(0, position, [5])], [0], SAMPLING)


@pytest.mark.parametrize("scale", [None, 0.3, 100.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_to_a_trunk_equals_attention_to_its_copies(dtype, scale):
    """Also after rows have left; in bfloat16 as exactly as the fused kernel; scores beyond what exp can take."""
    generator = torch.Generator().manual_seed(0)
    normal = lambda *shape: torch.randn(*shape, generator=generator).to(dtype)  # noqa: E731
    trunks, positions = torch.tensor([2, 0, 2, 1, 0]), torch.tensor([6, 3, 0, 1, 6])
    layer = KeyValueCache(6)
    layer.append(normal(3, 2, 6, 8), normal(3, 2, 6, 8))
    caches = Caches([layer])
    caches.fork(trunks, positions, 4)
    layer.append(normal(5, 2, 4, 8), normal(5, 2, 4, 8))
    keys = torch.cat([layer.trunk_keys[trunks], layer.keys], 2)
    values = torch.cat([layer.trunk_values[trunks], layer.values], 2)
    query, own = normal(5, 4, 3, 8), torch.ones(5, 1, 3, 4, dtype=torch.bool).tril(1)
    before_fork = (torch.arange(6) < positions[:, None])[:, None, None].expand(5, 1, 3, 6)
    mask = torch.cat([before_fork, own], -1)
    for rows in (torch.ones(5, dtype=torch.bool), torch.tensor([True, False, True, False, True])):
        if not rows.all():
            caches.select(rows.nonzero()[:, 0])
        exact = (tensor[rows].float() for tensor in (query, keys, values))
        expected = F.scaled_dot_product_attention(*exact, attn_mask=mask[rows], scale=scale, enable_gqa=True)
        torch.testing.assert_close(layer.attend(query[rows], own[rows], scale), expected.to(dtype))


def test_a_grid_holds_every_row_beside_its_trunk():
    trunks = torch.tensor([2, 0, 2, 1, 0, 2])
    forks = Forks(trunks, torch.zeros_like(trunks), 5)
    rows = torch.arange(6.0).view(6, 1, 1, 1)
    grid = forks.to_grid(rows)
    assert grid.shape == (3, 1, 3, 1, 1) and torch.equal(forks.to_rows(grid), rows)
    assert [set(trunk.flatten().tolist()) - {0.0} for trunk in grid] == [{1.0, 4.0}, {3.0}, {2.0, 5.0}]


@pytest.fixture(scope="module")
def weights(chunks, tmp_path_factory) -> Path:
    """The model's weights, for any layout."""
    folder = tmp_path_factory.mktemp("weights")
    with redirected(), results_in_process():
        dist_checkpointing.save(model_state(chunks), str(folder))
    return folder


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_samples_what_one_rank_does(engine, weights, tmp_path, layout):
    parallel = LAYOUTS[layout]
    ranks = parallel.get("tensor", 1) * parallel.get("pipeline", 1)
    recipe = small_recipe("unused", parallel=parallel, cluster={"gpus_per_node": ranks})
    run_ranks(WORKER, ranks, recipe.model_dump_json(), str(weights), str(tmp_path / "sampled.json"))
    shared, copied = ([Rollout(**r) for r in part] for part in json.loads((tmp_path / "sampled.json").read_text()))
    assert_same(shared, copied)
    assert_same(shared, sample_branches(engine))
