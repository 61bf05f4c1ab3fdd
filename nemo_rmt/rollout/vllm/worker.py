"""What a vLLM server of ours loads into its own processes; imports nothing of Megatron, and nobody else imports it."""

from __future__ import annotations

import hmac
import os
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

from nemo_rmt.rollout.vllm.transfer import GlooGroup, own_address


@dataclass
class GlooInitInfo(WeightTransferInitInfo):
    """Where the trainer waits. size: of the group, the trainer included."""

    address: str
    port: int
    size: int
    timeout_s: float


@dataclass
class GlooUpdateInfo(WeightTransferUpdateInfo):
    """What the trainer is about to send, in order."""

    names: list[str]
    dtype_names: list[str]
    shapes: list[list[int]]


class GlooWeightTransferEngine(WeightTransferEngine[GlooInitInfo, GlooUpdateInfo]):
    """Receives whole tensors over gloo, one at a time; vLLM's NCCL engine without a GPU."""

    init_info_cls = GlooInitInfo
    update_info_cls = GlooUpdateInfo
    _group: GlooGroup | None = None

    def init_transfer_engine(self, init_info: GlooInitInfo) -> None:
        """Join the trainer. Workers are numbered over replicas, then within one, from 1."""
        parallel = self.parallel_config
        rank = 1 + parallel.data_parallel_index * parallel.world_size + parallel.rank
        store = dist.TCPStore(
            init_info.address,
            init_info.port,
            init_info.size,
            wait_for_workers=False,
            timeout=timedelta(seconds=init_info.timeout_s),
        )
        self._group = GlooGroup(store, rank, init_info.size, own_address(init_info.address), init_info.timeout_s)

    def start_weight_update(self) -> None:
        """Prepare the layers for tensors of a checkpoint."""
        from vllm.model_executor.model_loader.reload import initialize_layerwise_reload

        initialize_layerwise_reload(self.model)

    def update_weights(self, update_info: dict[str, Any]) -> None:
        """As the base class, which also waits for an accelerator that a CPU does not have."""
        self.receive_weights(self.parse_update_info(update_info))

    def receive_weights(self, update_info: GlooUpdateInfo) -> None:
        """Receive every tensor and load it."""
        if self._group is None:
            raise RuntimeError("update_weights before init_weight_transfer_engine")
        try:
            for name, dtype, shape in zip(update_info.names, update_info.dtype_names, update_info.shapes, strict=True):
                weight = torch.empty(shape, dtype=getattr(torch, dtype))
                self._group.broadcast(weight)
                self.model.load_weights([(name, weight)])
        except BaseException:
            self.shutdown()  # closes the connection, so that the trainer does not wait for this worker
            raise

    def finish_weight_update(self) -> None:
        """Bring the layers into the form that kernels want."""
        from vllm.model_executor.model_loader.reload import finalize_layerwise_reload

        finalize_layerwise_reload(self.model, self.model_config)
        pack_output_layer(self.model)

    def shutdown(self) -> None:
        """Leave the trainer."""
        self._group = None


def pack_output_layer(model: torch.nn.Module) -> None:
    """Pack the output projection anew.

    On a CPU vLLM 0.32 computes with a packed copy of it, which a reload forgets when the weight is the embedding's: it
    would go on sampling with the old one.
    """
    for module in model.modules():
        if isinstance(module, ParallelLMHead):
            module.quant_method.process_weights_after_loading(module)


WeightTransferEngineFactory.register_engine("gloo", GlooWeightTransferEngine)


class Extension:
    """For --worker-extension-cls: naming it makes every worker import this module."""


class RequireKey:
    """For --middleware: refuses every request that does not bring the key in VLLM_API_KEY.

    vLLM's own check covers the routes for text alone: not those that replace weights or call into workers.
    """

    def __init__(self, app: Any):
        self.app = app
        self.expected = f"Bearer {os.environ['VLLM_API_KEY']}".encode()

    async def __call__(self, scope: dict[str, Any], receive: Any, send: Any) -> None:
        """ASGI."""
        if scope["type"] == "lifespan" or hmac.compare_digest(
            dict(scope["headers"]).get(b"authorization", b""), self.expected
        ):
            await self.app(scope, receive, send)
            return
        await send({"type": "http.response.start", "status": 401, "headers": [(b"content-type", b"application/json")]})
        await send({"type": "http.response.body", "body": b'{"error": "Unauthorized"}'})
