"""Megatron-Core 0.15 and 0.16 without a GPU: CUDA calls land on the CPU. And without Apex or Transformer Engine's Adam.

Each of these is dealt with here and nowhere else:

* ``torch.cuda.current_device()`` and a handful of its neighbours: replaced while ``cuda_on_cpu`` is entered
  (module attributes, so no torch mechanism can intercept them) and restored when it is left;
* ``device="cuda"`` literals, ``tensor.cuda()`` and comparisons of ``tensor.type()`` with ``torch.cuda.*Tensor``
  (optimizer, gradient clipping, checkpoints): rewritten by a ``TorchFunctionMode``, only inside ``redirected()``
  blocks, because a function mode makes every call of torch dearer;
* the one such literal of the schedules, around a model's whole forward and backward: the schedules' ``torch`` is
  replaced by one that knows better, while ``cuda_on_cpu`` is entered;
* functions compiled as Megatron-Core is imported: left as they are by ``without_compiler``;
* the distributed optimizer's loading code, which assumes Apex or Transformer Engine's Adam: two methods, replaced while
  ``cuda_on_cpu`` is entered, on a GPU too, where torch's Adam is used when neither package is installed.

With a GPU the others are no-ops.
"""

from __future__ import annotations

import contextlib
import logging
import queue
import types
from collections.abc import Iterator
from unittest import mock

import torch
from torch.overrides import TorchFunctionMode

_CPU = torch.device("cpu")


def _is_cuda(device: object) -> bool:
    return (isinstance(device, str) and device.startswith("cuda")) or (
        isinstance(device, torch.device) and device.type == "cuda"
    )


class _Redirect(TorchFunctionMode):
    """Send requests for a CUDA tensor to the CPU."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is torch.Tensor.cuda:
            return args[0]
        if kwargs and _is_cuda(kwargs.get("device")):
            kwargs = {**kwargs, "device": _CPU}
        if func is torch.Tensor.to and len(args) > 1 and _is_cuda(args[1]):
            args = (args[0], _CPU, *args[2:])
        result = func(*args, **(kwargs or {}))
        if func is torch.Tensor.type and isinstance(result, str):
            return result.replace("torch.", "torch.cuda.", 1)
        return result


class _TorchOfSchedules(types.ModuleType):
    """torch, whose ``zeros`` (of a step's token count, in pipeline_parallel/schedules.py) are on the CPU."""

    def __getattr__(self, name: str) -> object:
        return getattr(torch, name)

    def zeros(self, *size, device: object = None, **keywords) -> torch.Tensor:
        """Zeros on the CPU where CUDA is asked for."""
        return torch.zeros(*size, device=_CPU if _is_cuda(device) else device, **keywords)


def without_compiler() -> contextlib.AbstractContextManager:
    """A block in which torch.compile leaves functions as they are, to import Megatron-Core in.

    It decorates small functions with torch.compile as it is imported. On a CPU that loads the compiler (seconds of
    every process's start) and would build C++ at the first call.
    """
    if torch.cuda.is_available():
        return contextlib.nullcontext()
    return mock.patch.object(torch, "compile", lambda function=None, **_: function or (lambda decorated: decorated))


def redirected() -> contextlib.AbstractContextManager:
    """A block in which literal CUDA devices mean the CPU. Needed around Megatron's optimizer, not its schedules."""
    return contextlib.nullcontext() if torch.cuda.is_available() else _Redirect()


def _distributed_optimizer_patches() -> list:
    """Loading into torch's AdamW (distrib_optimizer.py:940 and :818 of 0.16.1 know only fused Adams).

    Without them: KeyError 'step', then one step tensor shared by all parameters.
    """
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

    set_states, load = DistributedOptimizer._set_main_param_and_optimizer_states, DistributedOptimizer.load_state_dict

    def set_with_step(self, model_param, tensors):
        group, order = self.model_param_group_index_map[model_param]
        state = self.optimizer.state[self.optimizer.param_groups[group]["params"][order]]
        set_states(self, model_param, {**tensors, "step": state["step"]} if "step" in state else tensors)

    def load_unshared(self, state_dict):
        load(self, state_dict)
        for state in self.optimizer.state.values():
            if "step" in state:
                state["step"] = state["step"].clone()

    return [
        mock.patch.object(DistributedOptimizer, "_set_main_param_and_optimizer_states", set_with_step),
        mock.patch.object(DistributedOptimizer, "load_state_dict", load_unshared),
    ]


def results_in_process() -> contextlib.AbstractContextManager:
    """A block in which a synchronous save collects its results without a helper process.

    Megatron starts a multiprocessing Manager for them, which costs seconds a save on two cores.
    """
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    return mock.patch.object(filesystem_async, "_get_write_results_queue", lambda *a, **k: queue.Queue())


@contextlib.contextmanager
def cuda_on_cpu() -> Iterator[None]:
    """Let Megatron-Core run on the CPU, and load states into torch's Adam, until the block is left."""
    import megatron.core.tensor_parallel.random as megatron_random
    from megatron.core.pipeline_parallel import schedules

    quiet = logging.getLogger(megatron_random.__name__)
    expected = lambda record: "CPU RNG state changed" not in record.getMessage()  # noqa: E731
    with contextlib.ExitStack() as stack:
        for patch in _distributed_optimizer_patches():
            stack.enter_context(patch)
        if torch.cuda.is_available():
            yield
            return
        for name, value in {
            "current_device": lambda: _CPU,
            "set_device": lambda device: None,
            "synchronize": lambda device=None: None,
            "manual_seed": lambda seed: torch.default_generator.manual_seed(int(seed)) and None,
            "get_rng_state": lambda device="cuda": torch.get_rng_state(),
            "set_rng_state": lambda state, device="cuda": torch.set_rng_state(state),
            "device_count": lambda: 1,  # the persistent checkpoint writer takes rank % device_count()
        }.items():
            stack.enter_context(mock.patch.object(torch.cuda, name, value))
        for name, value in {
            "_get_cuda_rng_state": lambda device="cuda", clone=False, graph_safe=False: torch.get_rng_state(),
            "_set_cuda_rng_state": lambda state, device=-1, graph_safe=False: torch.set_rng_state(state),
        }.items():
            stack.enter_context(mock.patch.object(megatron_random, name, value))
        stack.enter_context(mock.patch.object(schedules, "torch", _TorchOfSchedules("torch")))
        quiet.addFilter(expected)
        try:
            yield
        finally:
            quiet.removeFilter(expected)
