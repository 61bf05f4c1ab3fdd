"""The HTTP side of a vLLM server: requests in flight, its answers checked, its routes for weights."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from nemo_rmt import pulse
from nemo_rmt.rollout.vllm.backend import BackendLost, Completion, Request

if TYPE_CHECKING:
    import httpx

T = TypeVar("T")
POLL_S = 0.2
EXIT_WAIT_S = 3.0
"""A lost connection is reported with the exit status of the process behind it, which may take a moment."""
KEEPALIVE_S = 2.0
"""Below vLLM's 5 s, so that no request meets a connection that the server is closing."""
NOT_FINITE = -9999.0
"""What vLLM sends for NaN and for -inf, which JSON has not."""


class Refused(ValueError):
    """The server answered with an error of the client's. status: of HTTP."""

    def __init__(self, message: str, status: int):
        super().__init__(message)
        self.status = status


@dataclass
class Client:
    """Asks one server. All calls block, from any thread; each raises BackendLost, Refused or ValueError.

    key: the bearer token, or None. timeout_s: of one response. in_flight: most requests asked for at once.
    ended: why the process of the server ended, or None while it runs; None: nobody here knows.
    """

    url: str
    key: str | None
    timeout_s: float
    in_flight: int
    ended: Callable[[], str | None] | None = None
    version: str = ""
    """Of the weights that the next update brings."""
    prompt_tokens: int = 0
    """Of the last ``complete``."""
    cached_tokens: int = 0
    """Those of them that were found in the prefix cache."""

    def get(self, path: str) -> dict[str, Any]:
        """The JSON of a route; {} for an empty body."""
        return self._run(lambda client: self._ask(client, "GET", path))

    def post(self, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        """The same for POST."""
        return self._run(lambda client: self._ask(client, "POST", path, body))

    def complete(self, requests: list[Request]) -> list[Completion]:
        """One completion per request, in order; they are started in order too."""
        self.prompt_tokens = self.cached_tokens = 0
        return self._run(lambda client: self._complete_all(client, requests))

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        """See transfer.WeightRoutes, as for the following."""
        self.post("/init_weight_transfer_engine", {"init_info": init_info})

    def start_weight_update(self) -> None:
        self.post("/start_weight_update")

    def update_weights(self, update_info: dict[str, Any]) -> None:
        self.post("/update_weights", {"update_info": update_info})

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        self.post("/finish_weight_update", {"weight_version": weight_version or self.version})

    def _run(self, work: Callable[[httpx.AsyncClient], Awaitable[T]]) -> T:
        return asyncio.run(self._watched(work))

    async def _watched(self, work: Callable[[httpx.AsyncClient], Awaitable[T]]) -> T:
        """Do the work unless the server's process ends. What is under way then is cancelled."""
        import httpx

        headers = {} if self.key is None else {"Authorization": f"Bearer {self.key}"}
        limits = httpx.Limits(
            max_connections=self.in_flight, max_keepalive_connections=self.in_flight, keepalive_expiry=KEEPALIVE_S
        )
        # No proxy from the environment: the key is for this server alone.
        async with httpx.AsyncClient(
            base_url=self.url, headers=headers, timeout=self.timeout_s, limits=limits, trust_env=False
        ) as client:
            task = asyncio.ensure_future(work(client))
            while not task.done():
                await asyncio.wait({task}, timeout=POLL_S)
                if self.ended is not None and not task.done() and (reason := self.ended()) is not None:
                    raise BackendLost(reason)
            return task.result()

    async def _ask(
        self, client: httpx.AsyncClient, method: str, path: str, body: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        import httpx

        try:
            response = await client.request(method, path, json=body)
        except httpx.TimeoutException:
            raise BackendLost(
                f"the vLLM server {self.url} did not answer {path} within "
                f"rollout.vllm.request_timeout_s={self.timeout_s:g}"
            ) from None
        except httpx.TransportError as error:
            raise BackendLost(await self._reason(f"{error or type(error).__name__} at {path}")) from None
        if response.is_server_error:
            raise BackendLost(await self._reason(f"{response.status_code} for {path}: {_message(response)}"))
        if not response.is_success:
            message = f"the vLLM server {self.url} answers {response.status_code} for {path}: {_message(response)}"
            raise Refused(message, response.status_code)
        if not response.content:
            return {}
        try:
            answer = response.json()
        except ValueError:
            answer = None
        if not isinstance(answer, dict):
            raise Refused(f"{self.url}{path} answers no JSON object: {_message(response)}", response.status_code)
        return answer

    async def _reason(self, seen: str) -> str:
        """Why the server's process ended, if it did, else what was seen of it."""
        for _ in range(0 if self.ended is None else round(EXIT_WAIT_S / POLL_S)):
            if (reason := self.ended()) is not None:
                return reason
            await asyncio.sleep(POLL_S)
        return f"the vLLM server {self.url} failed: {seen}"

    async def _complete_all(self, client: httpx.AsyncClient, requests: list[Request]) -> list[Completion]:
        allowed = asyncio.Semaphore(self.in_flight)

        async def one(request: Request) -> Completion:
            async with allowed:
                answer = await self._ask(client, "POST", "/inference/v1/generate", _body(request))
            try:
                completion = _completion(answer)
                self.prompt_tokens += answer["usage"]["prompt_tokens"]
                self.cached_tokens += (answer["usage"].get("prompt_tokens_details") or {}).get("cached_tokens") or 0
            except (KeyError, TypeError, IndexError) as error:
                raise ValueError(
                    f"the vLLM server {self.url} answered /inference/v1/generate without {error}: its version does not "
                    "fit, 0.32 does"
                ) from error
            pulse.tick("sampling with vLLM")
            return completion

        return await asyncio.gather(*(one(request) for request in requests))


def _body(request: Request) -> dict[str, Any]:
    return {
        "token_ids": request.tokens,
        "sampling_params": {
            "max_tokens": request.max_tokens,
            "temperature": request.temperature,
            "top_p": request.top_p,
            "seed": request.seed,
            "stop_token_ids": list(request.stop_tokens),
            "ignore_eos": True,  # the model's own; the caller says what stops
            "logprobs": 0,  # of the sampled token alone
            "detokenize": False,
        },
    }


def _completion(answer: dict[str, Any]) -> Completion:
    """Raises ValueError for log-probabilities that are not finite, or of other tokens."""
    (choice,) = answer["choices"]
    tokens = choice["token_ids"]
    content = choice["logprobs"]["content"]
    if [each["token_id"] for each in content] != tokens:
        raise ValueError("vLLM's log-probabilities are not of the tokens that it sampled")
    logprobs = [float(each["logprob"]) for each in content]
    for token, logprob in zip(tokens, logprobs, strict=True):
        if not math.isfinite(logprob) or logprob <= NOT_FINITE:
            raise ValueError(
                f"vLLM reports no finite log-probability for token {token}: the weights it serves hold NaN or overflow"
            )
    if choice["finish_reason"] not in ("stop", "length"):
        raise ValueError(f"vLLM ended a response by {choice['finish_reason']!r}, neither stop token nor length")
    versions = [span["version"] for span in choice["weight_versions"]]
    if not all(version.isdecimal() for version in versions):
        raise ValueError(f"vLLM sampled with weights {versions} that this trainer did not send")
    return Completion(tokens, logprobs, choice["finish_reason"] == "stop", min(map(int, versions)))


def _message(response: httpx.Response) -> str:
    """The server's own words, in one line."""
    try:
        error = response.json()["error"]
        text = error["message"] if isinstance(error, dict) else str(error)
    except (ValueError, KeyError, TypeError):
        text = response.text
    return " ".join(text.split())[:500]
