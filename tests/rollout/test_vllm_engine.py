"""What the engine makes of a vLLM backend's answers, and of its death."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import random
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from scripted_vllm import VOCAB, Scripted, expected, two_tensors
from small_recipe import small_recipe
from torchrun import run_ranks

from nemo_rmt.errors import UserError
from nemo_rmt.megatron.runtime import Layout, distributed
from nemo_rmt.rollout.engine import BranchPrompt, EngineLost, Sampling
from nemo_rmt.rollout.vllm.backend import Request, sequence_seed
from nemo_rmt.rollout.vllm.build import model_folder, vllm_engine
from nemo_rmt.rollout.vllm.engine import Replicas, VLLMEngine

SAMPLING = Sampling(9, frozenset({0}), seed=3)
RNG = random.Random(0)
PROMPTS = [[RNG.randrange(1, VOCAB) for _ in range(RNG.randrange(1, 6))] for _ in range(40)]
IDS = list(range(len(PROMPTS)))


@pytest.fixture(scope="module")
def layout() -> Iterator[Layout]:
    with distributed(small_recipe("unused").parallel, 5) as place:
        yield place


@pytest.fixture
def make(layout):
    def make_engine(backend: Scripted, **options) -> VLLMEngine:
        options = {"weights": two_tensors, "version": lambda: 7, "max_position": 64, **options}
        return VLLMEngine(backend, Replicas([0], 0), layout, **options)

    return make_engine


def requests(backend: Scripted, call: int = 0) -> dict[tuple[int, ...], Request]:
    return {tuple(request.tokens): request for request in backend.asked[call]}


def test_answers_are_in_the_callers_order_though_shared_prefixes_are_asked_for_together(make):
    backend = Scripted()
    rollouts = make(backend).generate(PROMPTS, IDS, SAMPLING)
    assert rollouts == [expected(prompt, SAMPLING, version=7) for prompt in PROMPTS]
    asked = [request.tokens for request in backend.asked[0]]
    assert asked == sorted(PROMPTS) != PROMPTS


def test_a_request_says_all_that_sampling_says(make):
    backend = Scripted()
    make(backend).generate([[1, 2]], [5], Sampling(9, frozenset({4, 0}), seed=3, temperature=0.5))
    assert backend.asked == [[Request([1, 2], 9, 0.5, 1.0, sequence_seed(3, 5, 0), (0, 4))]]


def test_branches_are_asked_for_whole_and_answered_without_their_document(make):
    backend, document = Scripted(), [5, 3, 8, 1, 9]
    branches = [BranchPrompt(0, 4, [2]), BranchPrompt(0, 0, [6, 6]), BranchPrompt(0, 4, [2]), BranchPrompt(0, 5, [1])]
    rollouts = make(backend).generate_branches([document], branches, [0, 1, 2, 3], SAMPLING)
    for rollout, branch in zip(rollouts, branches, strict=True):
        whole = expected(document[: branch.position] + branch.tokens, SAMPLING, version=7)
        assert rollout == dataclasses.replace(whole, prompt=branch.tokens)
    asked = [request.tokens for request in backend.asked[0]]
    assert asked[:2] == [[5, 3, 8, 1, 2]] * 2 and asked[2] == [5, 3, 8, 1, 9, 1], "copies and neighbours are adjacent"
    with pytest.raises(ValueError, match="outside of a document of 5"):
        make(backend).submit_branches([document], [BranchPrompt(0, 6, [1])], [0], SAMPLING)


@pytest.mark.parametrize("after_marker", [1, 2, 4, 50])
@pytest.mark.parametrize("limit", [1, 2, 5, 30])
def test_a_marker_ends_a_response_as_it_does_in_process(make, after_marker, limit):
    for marker in (0, 4):  # 0 is a stop token too
        sampling = Sampling(limit, frozenset({0}), seed=3, marker=marker, after_marker=after_marker)
        rollouts = make(Scripted()).generate(PROMPTS, IDS, sampling)
        assert rollouts == [expected(prompt, sampling, version=7) for prompt in PROMPTS]


def test_what_follows_a_marker_has_a_random_stream_of_its_own_and_the_older_version(make):
    class Updated(Scripted):
        def complete(self, requests):
            completions = super().complete(requests)
            self.version += 1
            return completions

    backend = Updated()
    sampling = Sampling(9, frozenset({0}), seed=3, marker=4, after_marker=2)
    rollouts = make(backend).generate(PROMPTS, IDS, sampling)
    assert len(backend.asked) == 2 and 0 < len(backend.asked[1]) < len(PROMPTS)
    seeds = [request.seed for call in backend.asked for request in call]
    assert len(set(seeds)) == len(seeds)
    assert {rollout.version for rollout in rollouts} == {7}


def test_a_seed_depends_on_the_sequence_alone(make):
    together, alone = Scripted(), Scripted()
    make(together).generate(PROMPTS, IDS, SAMPLING)
    make(alone).generate([PROMPTS[8]], [8], SAMPLING)
    assert requests(together)[tuple(PROMPTS[8])] == alone.asked[0][0]
    seeds = [sequence_seed(seed, id_, phase) for seed in range(9) for id_ in range(99) for phase in (0, 1)]
    assert len(set(seeds)) == len(seeds) and 0 <= min(seeds) and 2**62 < max(seeds) < 2**63


def test_weights_come_before_the_first_request_and_when_told(make):
    versions = iter([7, 8])
    backend = Scripted()
    engine = make(backend, version=lambda: next(versions))
    assert engine.generate([[1]], [0], SAMPLING)[0].version == 7
    assert engine.generate([[1]], [0], SAMPLING)[0].version == 7
    engine.update_weights()
    assert engine.generate([[1]], [0], SAMPLING)[0].version == 8
    assert backend.calls == ["load", "complete", "complete", "load", "complete"]
    assert engine.metrics["rollout/weight_version"] == 8 and engine.metrics["rollout/prefix_cached"] == 0.25
    assert engine.metrics["rollout/sync_s"] > 0 and engine.metrics["rollout/sample_s"] > 0


def test_weights_that_went_with_the_memory_come_again_before_the_next_request(make):
    backend = Scripted()
    engine = make(backend, release=lambda: True)
    first, second = engine.submit([[1]], [0], SAMPLING), engine.submit([[2]], [1], SAMPLING)
    assert [first(), second()] == [[expected([1], SAMPLING, 7)], [expected([2], SAMPLING, 7)]]
    assert backend.calls == ["load", "complete", "load", "complete"]


def test_what_was_lost_with_the_sampler_is_asked_for_again_from_live_weights(make):
    backend, done = Scripted(["complete", "load", "complete"], restarts=3), iter(range(20))
    engine = make(backend, version=lambda: next(done))
    rollouts = engine.generate(PROMPTS, IDS, SAMPLING)
    calls = ["load", "complete", "restart", "load", "restart", "load", "complete", "restart", "load", "complete"]
    assert backend.calls == calls
    assert rollouts == [expected(prompt, SAMPLING, version=3) for prompt in PROMPTS]
    assert engine.metrics["rollout/restarts"] == 3


def test_a_sampler_that_cannot_be_brought_back_is_lost(make):
    with pytest.raises(EngineLost, match="exit status 9, restarted too often"):
        make(Scripted(["complete"])).generate([[1]], [0], SAMPLING)
    with pytest.raises(EngineLost, match="exit status 9, restarted too often"):
        make(Scripted(["load"])).update_weights()


def test_the_stream_of_weights_is_taken_to_its_end_though_the_backend_dies(make):
    ended = []

    def weights():
        yield from two_tensors()
        ended.append(True)

    with pytest.raises(EngineLost):
        make(Scripted(["load"]), weights=weights).update_weights()
    assert ended == [True]


def test_with_overlap_sampling_starts_before_anyone_waits(make):
    backend = Scripted(may_answer=threading.Event())
    pending = make(backend, overlap=True).submit([[1]], [0], SAMPLING)
    assert backend.calls == ["load"]
    backend.may_answer.set()
    assert pending() == [expected([1], SAMPLING, version=7)]


def test_with_overlap_a_loss_is_mended_and_other_errors_are_raised_where_it_is_waited_for(make):
    pending = make(Scripted(["complete"], restarts=1), overlap=True).submit([[1]], [0], SAMPLING)
    assert pending() == [expected([1], SAMPLING, version=7)]
    broken = Scripted()
    broken.complete = lambda requests: 1 / 0
    with pytest.raises(ZeroDivisionError):
        make(broken, overlap=True).submit([[1]], [0], SAMPLING)()


def test_logprobs_that_vllm_would_not_report_are_refused(make):
    processed, raw = make(Scripted()), make(Scripted(), mode="raw_logprobs")
    for engine, sampling in (
        (processed, {"top_p": 0.9}),
        (raw, {"top_p": 0.9, "temperature": 0.7}),
        (raw, {"temperature": 0.7}),
    ):
        with pytest.raises(ValueError, match="log-probabilities before top-p"):
            engine.submit([[1]], [0], dataclasses.replace(SAMPLING, **sampling))
    processed.generate([[1]], [0], dataclasses.replace(SAMPLING, temperature=0.7))
    raw.generate([[1]], [0], dataclasses.replace(SAMPLING, top_p=0.9))
    raw.generate([[1]], [0], dataclasses.replace(SAMPLING, temperature=0.0))


def test_a_response_that_could_outgrow_the_model_is_refused(make):
    engine = make(Scripted(), max_position=12)
    engine.generate([[1, 2, 3]], [0], SAMPLING)
    with pytest.raises(UserError, match="model.max_position=12"):
        engine.submit([[1, 2, 3, 4]], [0], SAMPLING)


def test_nothing_asked_for_is_nothing_answered(make):
    assert make(Scripted()).generate([], [], SAMPLING) == []


@pytest.mark.parametrize("ranks", ["2 replicas", "1 of 2 ranks", "tensor parallel"])
def test_two_ranks_share_the_work_the_answers_and_the_losses(ranks):
    assert run_ranks(Path(__file__).with_name("vllm_engine_worker.py"), 2, ranks).count("done") == 2


def test_the_model_folder_describes_the_architecture(layout, tmp_path):
    model = small_recipe("unused", model={"qkv_bias": False}).model
    folder = model_folder(model, 300, eos=2, folder=tmp_path / "vllm", write=True)
    config = json.loads((folder / "config.json").read_text())
    assert config["architectures"] == ["Qwen3ForCausalLM"]
    assert (config["vocab_size"], config["eos_token_id"]) == (300, 2)


def test_without_vllm_the_error_says_what_to_install(layout, tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install nemo-rmt\[vllm\]"):
        start(layout, tmp_path)


def test_what_vllm_cannot_run_is_refused_before_it_starts(layout, tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    with pytest.raises(UserError, match="no attention for heads of 16: set model.head_dim to one of 32, 64"):
        start(layout, tmp_path)
    with pytest.raises(UserError, match="heads of hidden_size / num_attention_heads = 16 only, got model.head_dim=32"):
        start(layout, tmp_path, model={"head_dim": 32})
    with pytest.raises(UserError, match="rollout.vllm.tensor=2 does not divide the 1 training processes"):
        start(layout, tmp_path, model={"head_dim": 32, "qkv_bias": False}, rollout={"vllm": {"tensor": 2}})


def start(layout: Layout, folder: Path, **changes) -> VLLMEngine:
    recipe = small_recipe("unused", **changes)
    return vllm_engine(recipe, layout, [], folder=folder, vocab_size=300, eos=2, version=lambda: 0)
