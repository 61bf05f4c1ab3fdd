"""vLLM inside the training processes, on their own devices, taking turns with the training.

A replica over several processes is one engine that all of its ranks call alike, each with its part of the weights: what
vLLM calls an external launcher. Nothing listens, and weights move through the trainer's collectives alone.
Written against vLLM 0.32; imports it when a backend is made.
"""

from __future__ import annotations

import contextlib
import logging
import os
import random
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from unittest import mock

import numpy
import torch
import torch.distributed as dist
from torch import Tensor

from nemo_rmt import pulse
from nemo_rmt.config import Model, Rollout
from nemo_rmt.megatron.runtime import Layout
from nemo_rmt.rollout.engine import EngineLost
from nemo_rmt.rollout.vllm.backend import BackendLost, Completion, Request
from nemo_rmt.rollout.vllm.process import CPU_BLOCK_SIZE, CPU_KV_CACHE_GIB, GIB, logprobs_mode

ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the engine in this process, not in one that it starts
    "VLLM_CONFIGURE_LOGGING": "0",  # its messages go where the rank's go
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
}
"""Of this process while vLLM starts."""


class ColocatedBackend:
    """A Backend on every rank; the ranks of a replica must make the same calls.

    With a GPU it sleeps from its start to the first ``load``, and from ``release`` to the next: its memory is the
    training's meanwhile. Errors of vLLM are raised as BackendLost; it cannot be started again.

    Args:
        model_folder: with the model's config.json.
    """

    def __init__(self, settings: Rollout, model: Model, layout: Layout, *, model_folder: Path):
        self.on_gpu = layout.device.type == "cuda"
        self.tied = model.tie_embeddings
        self.version = 0
        self.prefix_cached = 0.0
        self._lost = ""
        self._devices = [layout.device] if self.on_gpu else []
        vllm = settings.vllm
        options = {
            "model": str(model_folder),
            "skip_tokenizer_init": True,
            "generation_config": "vllm",
            "load_format": "dummy",
            "dtype": {"fp32": "float32", "bf16": "bfloat16"}[model.precision],
            "max_model_len": model.max_position,
            "max_num_seqs": settings.batch_size,
            "logprobs_mode": logprobs_mode(settings),
            "enable_prefix_caching": True,
            "tensor_parallel_size": vllm.tensor,
            "distributed_executor_backend": "external_launcher" if layout.world_size > 1 else None,
            "enforce_eager": vllm.enforce_eager or not self.on_gpu,
            "enable_sleep_mode": self.on_gpu,
            "disable_log_stats": True,
        }
        if vllm.kv_cache_gib is not None or not self.on_gpu:
            options["kv_cache_memory_bytes"] = int((vllm.kv_cache_gib or CPU_KV_CACHE_GIB) * GIB)
        if self.on_gpu:
            options["gpu_memory_utilization"] = vllm.gpu_memory_utilization
        else:
            options["block_size"] = CPU_BLOCK_SIZE
        with _undisturbed(self._devices):
            from vllm import EngineArgs
            from vllm.v1.engine.llm_engine import LLMEngine

            self.engine = LLMEngine.from_engine_args(EngineArgs(**options))
        # It would run at the interpreter's exit too, when the process groups that it destroys are gone.
        self.engine.engine_core._finalizer.atexit = False
        self.release()

    def complete(self, requests: list[Request]) -> list[Completion]:
        """See Backend."""
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        answers, cached = {}, 0
        try:
            # Draws from the global generator too, although every request has its own.
            with torch.random.fork_rng(self._devices):
                for index, request in enumerate(requests):
                    parameters = SamplingParams(
                        temperature=request.temperature,
                        top_p=request.top_p,
                        seed=request.seed,
                        max_tokens=request.max_tokens,
                        stop_token_ids=list(request.stop_tokens),
                        ignore_eos=True,  # config.json's; stop_tokens say what ends a response
                        logprobs=0,
                        detokenize=False,
                        output_kind=RequestOutputKind.FINAL_ONLY,
                    )
                    self.engine.add_request(str(index), {"prompt_token_ids": request.tokens}, parameters)
                while self.engine.has_unfinished_requests():
                    pulse.tick(f"vLLM sampling: {len(answers)} of {len(requests)} responses are done")
                    for output in self.engine.step():
                        answers[int(output.request_id)] = self._completion(output.outputs[0])
                        cached += output.num_cached_tokens
        except RuntimeError as error:
            raise self._failed("sampled", error) from error
        self.prefix_cached = cached / max(1, sum(len(request.tokens) for request in requests))
        return [answers[index] for index in range(len(requests))]

    def load(self, weights: Iterable[tuple[str, Tensor]], version: int) -> None:
        """See Backend. Takes one tensor at a time."""
        try:
            self._wake("weights")
            stream = _with_output_layer(weights) if self.tied else weights
            self.engine.collective_rpc("reload_weights", kwargs={"weights_iterator": stream})
            self._wake("kv_cache")
            if not self.engine.reset_prefix_cache():
                raise RuntimeError("the prefix cache cannot be emptied")
        except RuntimeError as error:
            raise self._failed("took weights", error) from error
        self.version = version

    def release(self) -> bool:
        """Give memory back to the training until the next ``load``. Returns whether the weights went with it."""
        if self.on_gpu:
            self.engine.sleep(level=2)
        return self.on_gpu

    def restart(self) -> None:
        """Raises EngineLost: it lives and dies with the training processes."""
        raise EngineLost(self._lost)

    def close(self) -> None:
        """End it; the training's process groups stay."""
        # vLLM's own shutdown also destroys the default group, if there is one.
        with mock.patch.object(dist, "is_initialized", return_value=False):
            self.engine.engine_core.shutdown()

    def _failed(self, doing: str, error: RuntimeError) -> BackendLost:
        self._lost = f"vLLM failed in a training process while it {doing}: {type(error).__name__}: {error}"
        return BackendLost(self._lost)

    def _wake(self, memory: str) -> None:
        if self.on_gpu and self.engine.is_sleeping():
            self.engine.wake_up(tags=[memory])

    def _completion(self, output) -> Completion:
        if output.finish_reason not in ("stop", "length"):
            raise RuntimeError(f"a response ended with {output.finish_reason}")
        tokens = list(output.token_ids)
        logprobs = [each[token].logprob for token, each in zip(tokens, output.logprobs, strict=True)]
        return Completion(tokens, logprobs, output.finish_reason == "stop", self.version)


def _with_output_layer(weights: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """Tied weights under both of their names: on a CPU vLLM keeps a packed copy for the output layer, which a reload of
    the embedding alone leaves as it was (0.32)."""
    for name, tensor in weights:
        yield name, tensor
        if name == "model.embed_tokens.weight":
            yield "lm_head.weight", tensor


@contextlib.contextmanager
def _undisturbed(devices: list[torch.device]) -> Iterator[None]:
    """Put back what vLLM changes in this process as it starts: environment, random state, torch's thread setter.

    devices: those of CUDA whose random state is kept too.
    """
    logging.getLogger("vllm").setLevel(logging.WARNING)
    python, numbers = random.getstate(), numpy.random.get_state()
    try:
        with (
            mock.patch.dict(os.environ, ENVIRONMENT),
            mock.patch.object(torch, "set_num_threads", torch.set_num_threads),
            torch.random.fork_rng(devices),
            warnings.catch_warnings(),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        random.setstate(python)
        numpy.random.set_state(numbers)
