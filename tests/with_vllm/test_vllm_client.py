"""What the client makes of answers that no healthy server of ours gives: a stand-in gives them."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
import served_model

from nemo_rmt.errors import UserError
from nemo_rmt.rollout.vllm.backend import BackendLost, Completion, Request
from nemo_rmt.rollout.vllm.client import Client, Refused
from nemo_rmt.rollout.vllm.server import check_server

pytest.importorskip("httpx")
REQUEST = Request([5, 6], 4, 0.8, 0.9, 2**63 - 1, (7, 8))
Answer = tuple[int, Any]


def generated(**changes: Any) -> dict[str, Any]:
    """vLLM's answer for two tokens; ``changes`` replace fields of its choice."""
    choice = {
        "token_ids": [9, 7],
        "logprobs": {"content": [{"token_id": 9, "logprob": -0.5}, {"token_id": 7, "logprob": -1.5}]},
        "finish_reason": "stop",
        "weight_versions": [{"version": "4", "start": 0, "end": 1}, {"version": "12", "start": 1, "end": 2}],
    }
    usage = {"prompt_tokens": 2, "prompt_tokens_details": {"cached_tokens": 1}}
    return {"choices": [choice | changes], "usage": usage}


HEALTHY: dict[str, Answer] = {
    "/health": (200, None),
    "/version": (200, {"version": "0.32.0"}),
    "/v1/models": (200, {"data": [{"id": "policy", "max_model_len": 256}]}),
    "/weight_info": (200, {"weight_version": "default"}),
    "/server_info": (
        200,
        {
            "vllm_config": {
                "weight_transfer_config": {"backend": "gloo"},
                "model_config": {"logprobs_mode": "processed_logprobs", "generation_config": "vllm"},
            }
        },
    ),
    "/inference/v1/generate": (400, {"error": {"message": "token_ids: Field required"}}),
}
"""What a server that fits answers to the questions of ``check_server``."""


@contextmanager
def server(answers: dict[str, Answer] | Callable[[str, dict], Answer]) -> Iterator[str]:
    """A server that gives those answers, by path; 404 elsewhere. Yields its address."""

    class Handler(BaseHTTPRequestHandler):
        def answer(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            path = self.path.partition("?")[0]
            if callable(answers):
                status, content = answers(path, json.loads(body or b"{}"))
            else:
                status, content = answers.get(path, (404, {"detail": "Not Found"}))
            payload = (
                content if isinstance(content, bytes) else b"" if content is None else json.dumps(content).encode()
            )
            self.send_response(status)
            self.send_header("Content-Length", str(len(payload)))
            self.end_headers()
            self.wfile.write(payload)

        do_GET = do_POST = answer

        def log_message(self, *_: Any) -> None:
            pass

    serving = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=serving.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{serving.server_address[1]}"
    finally:
        serving.shutdown()
        serving.server_close()


def client(url: str, **changes: Any) -> Client:
    return Client(**{"url": url, "key": None, "timeout_s": 5.0, "in_flight": 4} | changes)


def complete(answer: Answer, requests: int = 1, **changes: Any) -> list[Completion]:
    with server({"/inference/v1/generate": answer}) as url:
        return client(url, **changes).complete([REQUEST] * requests)


def test_an_answer_becomes_a_completion_of_its_oldest_version():
    assert complete((200, generated())) == [Completion([9, 7], [-0.5, -1.5], True, 4)]
    assert complete((200, generated(finish_reason="length")))[0].stopped is False


def test_what_is_asked_for_is_what_the_request_says():
    seen = []

    def answer(path: str, body: dict) -> Answer:
        seen.append(body)
        return 200, generated()

    with server(answer) as url:
        asking = client(url)
        asking.complete([REQUEST])
    assert seen[0]["token_ids"] == [5, 6]
    wanted = {"max_tokens": 4, "temperature": 0.8, "top_p": 0.9, "seed": 2**63 - 1, "stop_token_ids": [7, 8]}
    wanted |= {"logprobs": 0, "ignore_eos": True}
    assert wanted.items() <= seen[0]["sampling_params"].items()
    assert (asking.prompt_tokens, asking.cached_tokens) == (2, 1)


def test_no_more_requests_are_in_flight_than_allowed_and_answers_keep_their_order():
    lock, now, most = threading.Lock(), [0], [0]

    def answer(path: str, body: dict) -> Answer:
        with lock:
            now[0] += 1
            most[0] = max(most[0], now[0])
        time.sleep(0.05 if body["token_ids"][0] % 2 else 0.01)
        with lock:
            now[0] -= 1
        token = body["token_ids"][0]
        content = [{"token_id": token, "logprob": -1.0}]
        return 200, generated(token_ids=[token], logprobs={"content": content})

    with server(answer) as url:
        answered = client(url).complete([Request([token], 1, 1.0, 1.0, 0, ()) for token in range(40)])
    assert [each.tokens for each in answered] == [[token] for token in range(40)]
    assert most[0] == 4


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"logprobs": {"content": [{"token_id": 9, "logprob": -9999.0}, {"token_id": 7, "logprob": -1}]}},
            "token 9.*NaN",
        ),
        (
            {"logprobs": {"content": [{"token_id": 8, "logprob": -1.0}, {"token_id": 7, "logprob": -1}]}},
            "not of the tok",
        ),
        ({"logprobs": {"content": [{"token_id": 9, "logprob": -1.0}]}}, "not of the tok"),
        ({"logprobs": None}, "0.32"),
        ({"finish_reason": "abort"}, "'abort'"),
        ({"weight_versions": [{"version": "default", "start": 0, "end": 2}]}, "did not send"),
        ({"weight_versions": None}, "0.32"),
    ],
)
def test_an_answer_without_what_training_needs_is_an_error(changes, message):
    with pytest.raises(ValueError, match=message):
        complete((200, generated(**changes)))


def test_an_answer_of_another_vllm_names_the_missing_field():
    with pytest.raises(ValueError, match="'usage'.*0.32"):
        complete((200, {"choices": generated()["choices"]}))


def test_a_refusal_gives_the_servers_own_words():
    with pytest.raises(Refused, match="400.*too long"):
        complete((400, {"error": {"message": "too long"}}), requests=9)


def test_a_failing_server_is_lost_with_its_own_words():
    with pytest.raises(BackendLost, match="500.*EngineDeadError"):
        complete((500, {"error": {"message": "EngineDeadError"}}), requests=9)


def test_a_server_that_does_not_answer_in_time_is_lost():
    def answer(path: str, body: dict) -> Answer:
        time.sleep(3)
        return 200, generated()

    with server(answer) as url, pytest.raises(BackendLost, match="request_timeout_s=0.3"):
        client(url, timeout_s=0.3).complete([REQUEST])


def test_the_end_of_its_process_is_noticed_before_any_timeout():
    began = time.monotonic()

    def answer(path: str, body: dict) -> Answer:
        time.sleep(3)
        return 200, generated()

    def ended() -> str | None:
        return "exit status 9" if time.monotonic() - began > 0.3 else None

    with server(answer) as url:
        with pytest.raises(BackendLost, match="exit status 9"):
            client(url, ended=ended).complete([REQUEST])
        assert time.monotonic() - began < 2


def test_nothing_listening_is_lost():
    with server({}) as url:
        pass
    with pytest.raises(BackendLost, match=url):
        client(url).complete([REQUEST])


def check(answers: dict[str, Answer]) -> None:
    with server(answers) as url:
        check_server(client(url), served_model.rollout(url=url), served_model.MODEL, "gloo")


def test_a_server_that_fits_is_accepted():
    check(HEALTHY)


def test_an_address_where_nothing_listens_is_the_users_error():
    with server({}) as url:
        pass
    with pytest.raises(UserError, match=f"rollout.vllm.url={url}.*start the server, or correct the address"):
        check_server(client(url), served_model.rollout(url=url), served_model.MODEL, "gloo")


def config(transfer: str = "gloo", mode: str = "processed_logprobs", generation: str = "vllm") -> Answer:
    model = {"logprobs_mode": mode, "generation_config": generation}
    return 200, {"vllm_config": {"weight_transfer_config": {"backend": transfer}, "model_config": model}}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"/health": (404, b"<html>")}, "is no vLLM server"),
        ({"/version": (200, b"<html>welcome</html>")}, "is no vLLM server.*welcome"),
        ({"/v1/models": (200, {"data": []})}, "is no vLLM server"),
        ({"/v1/models": (401, {"error": "Unauthorized"})}, "VLLM_API_KEY"),
        ({"/v1/models": (200, {"data": [{"max_model_len": 128}]})}, "--max-model-len 256"),
        ({"/weight_info": (404, {"detail": "Not Found"})}, "no routes for weights.*VLLM_SERVER_DEV_MODE=1"),
        ({"/inference/v1/generate": (403, {"error": {"message": "disabled"}})}, "no route for token.*enable-scale-out"),
        ({"/server_info": config(transfer="nccl")}, "--weight-transfer-config nccl instead of gloo"),
        ({"/server_info": config(mode="raw_logprobs")}, "--logprobs-mode raw_logprobs instead of processed_logprobs"),
        ({"/server_info": config(generation="auto")}, "--generation-config auto instead of vllm"),
    ],
)
def test_a_server_that_does_not_fit_is_refused_with_what_to_change(changes, message):
    with pytest.raises(UserError, match=f"(?s)rollout.vllm.url=http://127.0.0.1:.*{message}"):
        check(HEALTHY | changes)
