"""A real `vllm serve` as the backend: what it samples, with which weights, and what happens when it dies.

One server for the whole file, killed and brought back by the later tests: they depend on their order.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import served_model
from served_model import largest_error, random_model, requests, session_processes, weights
from torchrun import run_ranks

from nemo_rmt.rollout.engine import EngineLost
from nemo_rmt.rollout.vllm.backend import BackendLost
from nemo_rmt.rollout.vllm.server import ServerBackend

pytest.importorskip("vllm")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return served_model.model_folder(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def backend(folder) -> Iterator[ServerBackend]:
    made = ServerBackend(
        served_model.rollout(restarts=1),
        served_model.MODEL,
        model_folder=folder,
        vocab_size=served_model.VOCAB,
        log=folder / "log" / "vllm_server.log",
    )
    yield made
    made.close()


def kill(backend: ServerBackend) -> None:
    os.kill(backend._process.pid, signal.SIGKILL)


def test_no_answer_passes_as_sampled_before_weights_were_sent(backend):
    with pytest.raises(ValueError, match="did not send"):
        backend.complete(requests(1))


def test_logprobs_are_those_of_transformers_and_the_version_is_the_one_loaded(backend, folder):
    model = random_model(folder, seed=1)
    backend.load(weights(model), version=3)
    for temperature in (1.0, 0.7, 0.0):
        asked = requests(24, temperature=temperature)
        answered = backend.complete(asked)
        assert largest_error(model, asked, answered) < 1e-4
        assert {each.version for each in answered} == {3}


def test_responses_end_at_a_stop_token_which_is_part_of_them_or_at_the_longest_length(backend):
    answered = backend.complete(requests(64, stop=tuple(range(0, 300, 10))))
    for each in answered:
        assert each.stopped == (each.tokens[-1] % 10 == 0)
        assert each.stopped or len(each.tokens) == 12
        assert all(token % 10 for token in each.tokens[:-1])
    assert {each.stopped for each in answered} == {True, False}


def test_a_seed_decides_a_response_whatever_is_sampled_beside_it(backend):
    asked = requests(20)
    together = backend.complete(asked)
    assert backend.complete(asked[::-1])[::-1] == together
    alone = backend.complete(asked[4:5])[0]
    assert alone.tokens == together[4].tokens
    assert alone.logprobs == pytest.approx(together[4].logprobs, abs=1e-5)
    assert len({tuple(each.tokens) for each in backend.complete([asked[0], *requests(9)])}) > 1


def test_prompts_in_the_prefix_cache_are_counted_and_forgotten_with_the_weights(backend, folder):
    asked = [served_model.Request([*range(100), last], 4, 1.0, 1.0, last, ()) for last in range(8)]
    backend.complete(asked)
    backend.complete(asked)
    assert backend.prefix_cached == pytest.approx(96 / 101)  # blocks of 32
    model = random_model(folder, seed=2)
    backend.load(weights(model), version=4)
    answered = backend.complete(asked[:1])
    assert backend.prefix_cached == 0
    assert largest_error(model, asked[:1], answered) < 1e-4


def test_a_refused_request_names_vllms_reason(backend):
    with pytest.raises(ValueError, match="400.*longer than the maximum model length of 256"):
        backend.complete([served_model.Request([1] * 300, 4, 1.0, 1.0, 0, ())])


def test_a_token_that_would_end_the_server_is_refused_before_it_is_sent(backend):
    with pytest.raises(ValueError, match="outside of the model's 300: .*300"):
        backend.complete([served_model.Request([1, 300], 4, 1.0, 1.0, 0, ())])


def test_nobody_is_served_without_the_key(backend):
    import httpx

    for path in ("/health", "/weight_info", "/v1/models", "/collective_rpc", "/inference/v1/generate"):
        for headers in ({}, {"Authorization": "Bearer wrong"}):
            assert httpx.get(backend.client.url + path, headers=headers).status_code == 401
            assert httpx.post(backend.client.url + path, headers=headers, json={}).status_code == 401


def test_it_serves_the_weights_of_a_tensor_parallel_trainer(backend, folder, monkeypatch):
    """Through rollout.vllm.url; another trainer's server is not ended by it."""
    monkeypatch.setenv("VLLM_API_KEY", backend.client.key)
    monkeypatch.setenv("PYTHONPATH", served_model.environment()["PYTHONPATH"])
    worker = Path(__file__).with_name("trainer_worker.py")
    assert "served both" in run_ranks(worker, 2, backend.client.url, str(folder))
    assert {each.version for each in backend.complete(requests(2))} == {42}


def test_its_death_while_sampling_is_noticed_at_once_and_it_comes_back(backend, folder):
    threading.Timer(1.0, kill, [backend]).start()
    start = time.monotonic()
    with pytest.raises(BackendLost, match=r"(?s)exit status 137.*killed by signal 9.*vllm_server.log"):
        backend.complete(requests(5000, max_tokens=200, stop=()))
    assert time.monotonic() - start < 6
    backend.restart()
    model = random_model(folder, seed=3)
    backend.load(weights(model), version=6)
    asked = requests(8)
    answered = backend.complete(asked)
    assert largest_error(model, asked, answered) < 1e-4
    assert {each.version for each in answered} == {6}


def test_its_death_while_weights_are_sent_is_noticed_and_no_more_restarts_are_an_error(backend, folder):
    def deadly() -> Iterator:
        for index, entry in enumerate(weights(random_model(folder, seed=4))):
            if index == 5:
                kill(backend)
                time.sleep(1)
            yield entry

    start = time.monotonic()
    with pytest.raises(BackendLost):
        backend.load(deadly(), version=7)
    assert time.monotonic() - start < 10
    with pytest.raises(EngineLost, match=r"(?s)exit status 137.*vllm_server.log.*restarts=1 times already"):
        backend.restart()


def test_closing_leaves_no_process_and_may_be_repeated(backend):
    backend.close()
    assert session_processes(backend._process.pid) == []
    backend.close()
