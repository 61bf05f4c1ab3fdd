"""Import this first: megatron.bridge on a machine without CUDA, where two of its dependencies cannot be.

The package imports Transformer Engine to name classes of its LoRA layers, and Megatron's Mamba layers, which it imports
too, import Triton for kernels. Both are stood in for while the package is imported and gone afterwards, so that nothing
takes them for real. What is tested is the package itself.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import sys
import types
from collections.abc import Iterator
from unittest import mock

import torch

from nemo_rmt.megatron.cpu import redirected, results_in_process, without_compiler


def _module(name: str, **contents: object) -> types.ModuleType:
    module = types.ModuleType(name)
    vars(module).update(contents)
    return module


def _import_with(stand_ins: dict[str, types.ModuleType], name: str) -> None:
    if importlib.util.find_spec(next(iter(stand_ins))):
        stand_ins = {}
    sys.modules.update(stand_ins)
    importlib.import_module(name)
    for stand_in in stand_ins:
        del sys.modules[stand_in]


with without_compiler():
    # Megatron-Core decides for good whether there is a Transformer Engine: before there seems to be one.
    import megatron.core.models.gpt.gpt_layer_specs  # noqa: F401

    language = _module("triton.language", constexpr=int)
    _import_with(
        {"triton": _module("triton", jit=lambda function: function, language=language), "triton.language": language},
        "megatron.core.inference.contexts.attention_context.triton.tensor_ops",
    )
    import megatron.core.models.mamba.mamba_layer_specs  # noqa: F401

    pytorch = _module(
        "transformer_engine.pytorch",
        Linear=torch.nn.Linear,
        ops=types.SimpleNamespace(Sequential=torch.nn.Sequential),
    )
    _import_with(
        {"transformer_engine": _module("transformer_engine", pytorch=pytorch), "transformer_engine.pytorch": pytorch},
        "megatron.bridge.training.gpt_step",
    )
    from megatron.bridge.training import initialize, pretrain, setup  # noqa: F401


@contextlib.contextmanager
def training_on_cpu() -> Iterator[None]:
    """A block in which Bridge's whole ``pretrain`` runs, inside ``nemo_rmt.megatron.runtime.distributed``."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(redirected())
        stack.enter_context(results_in_process())
        on_cpu = functools.partial(initialize.initialize_megatron, allow_no_cuda=True)
        stack.enter_context(mock.patch.object(setup, "initialize_megatron", on_cpu))
        # Megatron-Core's wheel has the helper compiled, and no Makefile to compile it again with.
        stack.enter_context(mock.patch.object(initialize, "compile_helpers", lambda: None))
        # AutoBridge scatters strided parts of a weight: gloo sends other memory. Copied to a GPU, they are whole.
        scatter = torch.distributed.scatter
        stack.enter_context(
            mock.patch.object(
                torch.distributed,
                "scatter",
                lambda output, parts, **settings: scatter(
                    output, parts and [p.contiguous() for p in parts], **settings
                ),
            )
        )
        for name, value in {
            "Stream": mock.MagicMock,
            "current_stream": mock.MagicMock(),
            "stream": lambda stream: contextlib.nullcontext(),
        }.items():
            stack.enter_context(mock.patch.object(torch.cuda, name, value))
        yield
