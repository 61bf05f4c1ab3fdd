"""vLLM as a server on GPUs of its own, asked over HTTP by the first rank of the training.

Security: the server listens on loopback unless ``rollout.vllm.host`` says otherwise. It needs vLLM's development mode,
whose routes replace the weights and call into the workers, so that a server of ours refuses every request without a key
that is made anew for each start; it crosses the network in clear, as do the prompts and responses. Weights go over
connections of gloo or NCCL between this node and the server's: keep both on a network that you trust. A server at
``rollout.vllm.url`` is somebody else's to guard: its key is taken from the environment variable VLLM_API_KEY, and vLLM
itself asks for it on routes below /v1 and /inference only.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from urllib.parse import urlsplit

import torch
from torch import Tensor

from nemo_rmt.config import Model, Rollout
from nemo_rmt.errors import UserError
from nemo_rmt.megatron.published import published_shapes
from nemo_rmt.rollout.engine import EngineLost
from nemo_rmt.rollout.vllm.backend import BackendLost, Completion, Request
from nemo_rmt.rollout.vllm.client import Client, Refused
from nemo_rmt.rollout.vllm.process import ServerProcess, logprobs_mode
from nemo_rmt.rollout.vllm.transfer import (
    GlooSender,
    Sender,
    TransferFailed,
    WeightMeta,
    WeightStream,
    connect_nccl,
    own_address,
)

RESET_TRIES = 20
RESET_WAIT_S = 0.25
START = (
    "start it with VLLM_SERVER_DEV_MODE=1 vllm serve MODEL --skip-tokenizer-init --enable-scale-out "
    "--worker-extension-cls nemo_rmt.rollout.vllm.worker.Extension and the option that is missing, or set "
    "rollout.vllm.url=null"
)


class ServerBackend:
    """A Backend; on global rank 0 only.

    Args:
        model_folder: with the model's config.json. vocab_size: tokens the model predicts over. log: of the server that
            is started here.

    ``complete`` may run in another thread than the rest, but nothing may run beside ``load``. Raises UserError when a
    running server does not fit or this node has too few GPUs, and EngineLost when a new one does not start.
    """

    def __init__(self, settings: Rollout, model: Model, *, model_folder: Path, vocab_size: int, log: Path):
        self.settings, self.model = settings, model
        self.model_folder, self.vocab_size, self.log = model_folder, vocab_size, log
        self.transfer = "nccl" if torch.cuda.is_available() else "gloo"
        self.shapes = [WeightMeta(*each) for each in published_shapes(model, vocab_size)]
        self.restarts = 0
        self._lost = ""
        self._process: ServerProcess | None = None
        self._sender: Sender | None = None
        if settings.vllm.url is None:
            self._start()
        else:
            self.client = self._client(settings.vllm.url.rstrip("/"), os.environ.get("VLLM_API_KEY"))
            check_server(self.client, settings, model, self.transfer)

    @property
    def prefix_cached(self) -> float:
        """Share of the last call's prompt tokens that the server found in its cache."""
        return self.client.cached_tokens / max(1, self.client.prompt_tokens)

    def complete(self, requests: list[Request]) -> list[Completion]:
        """See Backend. ValueError: the server refuses a request, or answers without what was asked for."""
        for request in requests:
            # vLLM without a tokenizer does not look, and an embedding without such a row ends the whole server.
            if not 0 <= min(request.tokens) <= max(request.tokens) < self.vocab_size:
                raise ValueError(f"a prompt has a token outside of the model's {self.vocab_size}: {request.tokens}")
        try:
            return self.client.complete(requests)
        except BackendLost as error:
            self._lost = str(error)
            raise

    def load(self, weights: Iterable[tuple[str, Tensor]], version: int) -> None:
        """See Backend. Takes one tensor at a time, and none more once the server is lost."""
        try:
            if self._sender is None:
                self._sender = self._connect()
            self._sender.source.tensors = weights
            self.client.version = str(version)
            self._sender.send_weights()
            self._sender.source.tensors = ()
            self._forget_prefixes()
            served = self.client.get("/weight_info").get("weight_version")
        except (BackendLost, Refused) as error:
            self._disconnect()
            self._lost = str(error)
            raise BackendLost(self._lost) from error
        except TransferFailed as error:
            self._disconnect()
            ended = self._process.ended() if self._process is not None else None
            self._lost = ended or f"{error}, while weights were sent to {self.client.url}"
            raise BackendLost(self._lost) from error
        except BaseException:
            self._disconnect()  # lets go of the workers, who wait for the rest
            raise
        if served != str(version):
            raise ValueError(f"{self.client.url} serves weights {served} after an update to {version}: who else sends?")

    def restart(self) -> None:
        """Bring a lost server back, without weights. Raises EngineLost when that was done too often, or cannot be."""
        allowed = self.settings.vllm.restarts
        if self._process is None:
            raise EngineLost(f"{self._lost}; rollout.vllm.url={self.client.url} was not started here: start it again")
        if self.restarts >= allowed:
            raise EngineLost(f"{self._lost}\nIt was started again rollout.vllm.restarts={allowed} times already.")
        print(f"{self._lost}\nvLLM server: starting it again", flush=True)
        self.restarts += 1
        self.close()
        self._start()

    def close(self) -> None:
        """End the server, if it was started here. May be called again."""
        self._disconnect()
        if self._process is not None:
            self._process.close()

    def _start(self) -> None:
        self._process = process = ServerProcess(
            self.settings, self.model, model_folder=self.model_folder, transfer=self.transfer, log=self.log
        )
        probe = self._client(process.url, process.key)

        def ready() -> bool:
            try:
                probe.get("/health")
            except BackendLost:
                return False
            return True

        process.wait_until(ready)
        self.client = self._client(process.url, process.key, process.ended)

    def _client(self, url: str, key: str | None, ended: Callable[[], str | None] | None = None) -> Client:
        vllm = self.settings.vllm
        return Client(url, key, vllm.request_timeout_s, self.settings.batch_size * vllm.data, ended)

    def _connect(self) -> Sender:
        workers = self.client.get("/get_world_size")["world_size"]
        source = WeightStream(self.shapes)
        if self.transfer == "nccl":
            return connect_nccl(self.client, source, workers=workers)
        address = own_address(urlsplit(self.client.url).hostname)
        timeout_s = self.settings.vllm.request_timeout_s
        return GlooSender.connect(self.client, source, workers=workers, address=address, timeout_s=timeout_s)

    def _disconnect(self) -> None:
        if self._sender is not None:
            self._sender.shutdown()
            self._sender = None

    def _forget_prefixes(self) -> None:
        """vLLM keeps its prefix cache over an update: keys and values of the old weights."""
        for _ in range(RESET_TRIES):
            if self.client.post("/reset_prefix_cache").get("success"):
                return
            time.sleep(RESET_WAIT_S)  # a request that was just given up may still hold some of it
        raise BackendLost(f"{self.client.url} does not forget the prefixes of the old weights: it still samples")


def check_server(client: Client, settings: Rollout, model: Model, transfer: str) -> None:
    """Raise UserError, naming what is wrong, when a running server cannot do what one of ours can.

    transfer: how it must take weights, "gloo" or "nccl".
    """
    where = f"rollout.vllm.url={client.url}"
    try:
        client.get("/health")
        client.get("/version")
        (served,) = client.get("/v1/models")["data"]
        length = served["max_model_len"]
    except BackendLost as error:
        raise UserError(f"{where}: {error}: start the server, or correct the address") from None
    except Refused as error:
        if error.status in (401, 403):
            raise UserError(f"{where}: {error}: put its key into the environment variable VLLM_API_KEY") from None
        raise UserError(f"{where} is no vLLM server: {error}") from None
    except (KeyError, TypeError, ValueError):
        raise UserError(f"{where} is no vLLM server: /v1/models names no model with its max_model_len") from None
    if length < model.max_position:
        raise UserError(
            f"{where} takes sequences of {length} tokens, model.max_position={model.max_position} has more: "
            f"serve it with --max-model-len {model.max_position}"
        )
    try:
        client.get("/weight_info")
        config = client.get("/server_info?config_format=json")["vllm_config"]
    except (Refused, KeyError) as error:
        raise UserError(f"{where} has no routes for weights ({error}): {START}") from None
    try:
        client.post("/inference/v1/generate", {})
    except Refused as error:
        if error.status in (403, 404):
            raise UserError(f"{where} has no route for token ids ({error}): {START}") from None
    wanted = {
        "--weight-transfer-config": ((config.get("weight_transfer_config") or {}).get("backend"), transfer),
        "--logprobs-mode": (config["model_config"].get("logprobs_mode"), logprobs_mode(settings)),
        "--generation-config": (config["model_config"].get("generation_config"), "vllm"),
    }
    for option, (found, expected) in wanted.items():
        if found != expected:
            raise UserError(f"{where} has {option} {found} instead of {expected}: {START}")
