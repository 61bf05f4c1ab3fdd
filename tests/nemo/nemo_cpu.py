"""NeMo's own trainer on a CPU: what nemo_rmt.megatron.cpu redirects, and the CUDA calls of NeMo and Lightning."""

from __future__ import annotations

import contextlib
import types
from collections.abc import Iterator
from unittest import mock

import numpy
import torch
from megatron.core.transformer.torch_norm import WrappedTorchNorm
from nemo.lightning import nemo_logger
from nemo.lightning.io import pl as checkpoint_io
from torch.overrides import TorchFunctionMode

from nemo_rmt.megatron.cpu import cuda_on_cpu, redirected, results_in_process


class _Unpinned(TorchFunctionMode):
    """NeMo logs through pinned tensors (megatron_strategy.py of 2.7.3), which need a GPU."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if kwargs and kwargs.get("pin_memory"):
            kwargs = {**kwargs, "pin_memory": False}
        return func(*args, **(kwargs or {}))


def _norm(cls, config, hidden_size: int, eps: float = 1e-5, **_) -> torch.nn.Module:
    """Megatron's own norm without Transformer Engine refuses sequence parallelism, where its gradient is summed."""
    norm = torch.nn.RMSNorm(hidden_size, eps=eps)
    norm.weight.sequence_parallel = config.sequence_parallel
    return norm


@contextlib.contextmanager
def nemo_on_cpu() -> Iterator[None]:
    """Let ``llm.pretrain`` run without a GPU until the block is left."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(cuda_on_cpu())
        stack.enter_context(results_in_process())
        stack.enter_context(mock.patch.object(torch.cuda, "Stream", lambda *a, **k: None))
        stack.enter_context(mock.patch.object(torch.cuda, "stream", lambda stream: contextlib.nullcontext()))
        stack.enter_context(mock.patch.object(WrappedTorchNorm, "__new__", _norm))
        # Megatron-Core 0.15.3 is of numpy 1; pandas 3 needs numpy 2
        stack.enter_context(mock.patch.object(numpy, "product", numpy.prod, create=True))
        # isinstance() against a class that only exists with nvidia_resiliency_ext (nemo_logger.py:208 of 2.7.3)
        absent = types.SimpleNamespace(LocalCheckpointCallback=type("LocalCheckpointCallback", (), {}))
        stack.enter_context(mock.patch.object(nemo_logger, "lcp", absent))
        # moves what was loaded to the GPU, after asserting that there is one
        stack.enter_context(mock.patch.object(checkpoint_io, "_fix_tensors_device", lambda checkpoint: checkpoint))
        stack.enter_context(redirected())
        stack.enter_context(_Unpinned())
        yield
