"""A real vLLM inside the training process: what it samples, from which weights, and what it leaves as it was."""

from __future__ import annotations

import dataclasses
import os
import random
from collections.abc import Iterator
from pathlib import Path

import numpy
import pytest
import torch
from colocated_model import (
    MARKER,
    STOPS,
    TOLERANCE,
    VOCAB,
    build,
    largest_error,
    logits,
    prompts,
    require_same,
    running,
)
from small_recipe import small_recipe
from torchrun import run_ranks

from nemo_rmt.config import Recipe
from nemo_rmt.megatron.runtime import Layout, distributed
from nemo_rmt.rollout.engine import BranchPrompt, EngineLost, Sampling
from nemo_rmt.rollout.in_process import InProcessEngine
from nemo_rmt.rollout.vllm.engine import VLLMEngine

GREEDY = Sampling(24, STOPS, seed=3, temperature=0.0)
DRAWN = Sampling(24, STOPS, seed=3)
IDS = list(range(64))
ARCHITECTURES = {
    "Llama": {"qk_norm": False, "tie_embeddings": False},
    "Llama, tied": {"qk_norm": False},
    "Qwen2": {
        "qk_norm": False,
        "qkv_bias": True,
        "tie_embeddings": False,
        "num_attention_heads": 2,
        "num_query_groups": 1,
    },
    "OLMo 2": {"norm_position": "after", "qk_norm_span": "all_heads", "tie_embeddings": False},
    "SmolLM3": {"qk_norm": False, "rope_skip_interval": 2},
}
"""Beside Qwen3, which the other tests use."""


def recipe(world_size: int = 1, **changes: dict) -> Recipe:
    """Two layers of a tied, grouped-query model with qk-norm, unless ``changes`` say otherwise."""
    model = {
        "num_layers": 2,
        "hidden_size": 64,
        "num_attention_heads": 4,
        "num_query_groups": 2,
        "head_dim": 32,
        "qkv_bias": False,
        "init_std": 0.2,
        "max_position": 128,
    }
    vllm = {"kv_cache_gib": 0.02, **changes.pop("vllm", {})}
    return small_recipe(
        "unused",
        model={**model, **changes.pop("model", {})},
        cluster={"gpus_per_node": world_size},
        rollout={"engine": "vllm", "batch_size": 48, "vllm": vllm, **changes.pop("rollout", {})},
        **changes,
    )


@pytest.fixture(scope="module")
def layout() -> Iterator[Layout]:
    with distributed(recipe().parallel, seed=5) as place:
        yield place


class Session:
    """A model in training, its sampler, and the training steps it had."""

    def __init__(self, engine: VLLMEngine, chunks):
        self.engine, self.chunks, self.done = engine, chunks, 0
        self.in_process = InProcessEngine(chunks, 64)

    def train(self) -> None:
        for parameter in self.chunks[0].parameters():
            parameter.data += 0.05 * torch.randn_like(parameter)
        self.done += 1


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_architecture_samples_as_in_process(layout, tmp_path, architecture):
    settings = recipe(model=ARCHITECTURES[architecture])
    chunks = build(settings)
    with running(settings, layout, chunks, tmp_path) as engine:
        found = engine.generate(prompts(16), IDS[:16], GREEDY)
    require_same(found, InProcessEngine(chunks, 64).generate(prompts(16), IDS[:16], GREEDY))


def test_with_top_p_logprobs_are_those_before_it_and_tokens_from_the_nucleus(layout, tmp_path):
    settings = recipe(rollout={"top_p": 0.6})
    chunks = build(settings)
    with running(settings, layout, chunks, tmp_path) as engine:
        drawn = engine.generate(prompts(16), IDS[:16], dataclasses.replace(DRAWN, top_p=0.6))
        greedy = engine.generate(prompts(8), IDS[:8], GREEDY)
    assert largest_error(chunks, drawn) < TOLERANCE and largest_error(chunks, greedy) < TOLERANCE
    for rollout in drawn:
        probabilities = logits(chunks, rollout).softmax(-1)
        own = probabilities.gather(1, torch.tensor(rollout.response)[:, None])
        likelier = torch.where(probabilities > own, probabilities, 0.0).sum(-1)
        assert (likelier < 0.6 + TOLERANCE).all()


@pytest.fixture(scope="module")
def session(layout, tmp_path_factory) -> Iterator[Session]:
    settings = recipe()
    chunks = build(settings)
    folder: Path = tmp_path_factory.mktemp("stage")
    with running(settings, layout, chunks, folder, version=lambda: made.done) as engine:
        made = Session(engine, chunks)
        yield made


def test_greedy_responses_are_those_of_the_in_process_engine(session):
    found = session.engine.generate(prompts(64), IDS, GREEDY)
    require_same(found, session.in_process.generate(prompts(64), IDS, GREEDY))
    assert len({len(rollout.response) for rollout in found}) > 5
    assert {rollout.finished for rollout in found} == {True, False}


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_logprobs_of_drawn_responses_are_the_trainers_scores(session, temperature):
    sampling = dataclasses.replace(DRAWN, temperature=temperature)
    rollouts = session.engine.generate(prompts(64), IDS, sampling)
    assert largest_error(session.chunks, rollouts, temperature) < TOLERANCE
    for rollout in rollouts:
        assert rollout.finished == (rollout.response[-1] in STOPS) and not STOPS & set(rollout.response[:-1])


def test_drawn_tokens_have_the_models_frequencies(session):
    count = 2000
    rollouts = session.engine.generate([[5, 6]] * count, list(range(count)), Sampling(1, frozenset(), seed=1))
    drawn = numpy.bincount([rollout.response[0] for rollout in rollouts], minlength=VOCAB) / count
    probabilities = logits(session.chunks, rollouts[0])[0].softmax(-1).numpy()
    assert numpy.abs(drawn - probabilities).max() < 5 * (0.25 / count) ** 0.5


def test_a_sequence_is_drawn_alike_whatever_is_asked_beside_it_and_in_whatever_order(session):
    asked = prompts(24)
    together = session.engine.generate(asked, IDS[:24], DRAWN)
    backwards = session.engine.generate(asked[::-1], IDS[:24][::-1], DRAWN)
    require_same(backwards[::-1], together)
    require_same(session.engine.generate(asked[5:6], [5], DRAWN), together[5:6])
    other_ids = session.engine.generate(asked, [index + 100 for index in IDS[:24]], DRAWN)
    other_seed = session.engine.generate(asked, IDS[:24], dataclasses.replace(DRAWN, seed=4))
    for others in (other_ids, other_seed):
        assert sum(a.response != b.response for a, b in zip(together, others, strict=True)) > 20


def test_branches_are_the_copied_prefixes_and_the_cache_is_hit(session):
    document = prompts(1, seed=8, longest=90)[0] + prompts(1, seed=9, longest=1)[0]
    document = (document * 90)[:90]
    branches = [BranchPrompt(0, position, [position % VOCAB]) for position in (90, 40, 70, 3) for _ in range(4)]
    copies = [document[: branch.position] + branch.tokens for branch in branches]
    session.engine.update_weights()
    found = session.engine.generate_branches([document], branches, IDS[:16], DRAWN)
    cached = session.engine.metrics["rollout/prefix_cached"]
    same = session.engine.generate(copies, IDS[:16], DRAWN)
    require_same(found, [dataclasses.replace(r, prompt=b.tokens) for r, b in zip(same, branches, strict=True)])
    # whole blocks of 32 tokens: of 91, 71, 41 and 4 tokens all but the first time
    assert cached > 0.5


@pytest.mark.parametrize("after_marker", [1, 5, 40])
def test_a_marker_ends_responses_as_in_process(session, after_marker):
    sampling = dataclasses.replace(GREEDY, marker=MARKER, after_marker=after_marker)
    asked = prompts(64) + [prompt + [MARKER - 1] for prompt in prompts(64, seed=1)]
    ids = list(range(len(asked)))
    found = session.engine.generate(asked, ids, sampling)
    require_same(found, session.in_process.generate(asked, ids, sampling))
    assert sum(MARKER in rollout.response for rollout in found) > 5


def test_what_is_served_is_the_last_update_and_nothing_cached_before(session):
    engine, asked = session.engine, [prompts(1, seed=3, longest=1)[0] * 80]
    engine.update_weights()
    before = engine.generate(asked, [0], DRAWN)
    assert engine.metrics["rollout/prefix_cached"] == 0
    session.train()
    unchanged = engine.generate(asked, [0], DRAWN)
    require_same(unchanged, before)
    assert engine.metrics["rollout/prefix_cached"] == 64 / 80
    assert unchanged[0].version == before[0].version == session.done - 1
    assert largest_error(session.chunks, before) > 100 * TOLERANCE
    engine.update_weights()
    after = engine.generate(asked, [0], DRAWN)
    assert engine.metrics["rollout/prefix_cached"] == 0
    assert largest_error(session.chunks, after) < TOLERANCE
    assert after[0].version == engine.metrics["rollout/weight_version"] == session.done


def test_the_training_process_is_left_as_it_was(session, layout, tmp_path):
    def state() -> list:
        return [
            dict(os.environ),
            torch.get_rng_state().tolist(),
            random.getstate(),
            numpy.random.get_state()[1].tolist(),
            torch.set_num_threads,
            torch.get_num_threads(),
            torch.get_default_dtype(),
            torch.is_grad_enabled(),
        ]

    before = state()
    session.engine.generate(prompts(4), IDS[:4], DRAWN)
    session.engine.update_weights()
    assert state() == before
    session.engine.close()
    assert state() == before
    with running(recipe(), layout, session.chunks, tmp_path) as session.engine:
        assert state() == before
        require_same(
            session.engine.generate(prompts(4), IDS[:4], GREEDY),
            session.in_process.generate(prompts(4), IDS[:4], GREEDY),
        )
        broken = pytest.MonkeyPatch()
        broken.setattr(session.engine.backend.engine, "step", lambda: (_ for _ in ()).throw(RuntimeError("no memory")))
        with pytest.raises(EngineLost, match="while it sampled: RuntimeError: no memory"):
            session.engine.generate(prompts(4), IDS[:4], GREEDY)
        broken.undo()


@pytest.mark.slow
@pytest.mark.parametrize("trainer, vllm", [(2, 1), (1, 2)])
def test_two_ranks_sample_from_the_weights_they_hold_together(tmp_path, trainer, vllm):
    """A tensor-parallel trainer with a replica on each rank; two data-parallel trainers with one over both."""
    worker = Path(__file__).with_name("colocated_worker.py")
    settings = recipe(2, parallel={"tensor": trainer}, vllm={"tensor": vllm})
    output = run_ranks(worker, 2, settings.model_dump_json(), str(tmp_path), timeout=300)
    assert output.count("sampled alike") == 2
