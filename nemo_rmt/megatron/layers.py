"""What a layer is made of: Megatron's layer specs, with our attention, and norms where published models have them."""

from __future__ import annotations

import functools
import importlib.util
from typing import Any

import torch
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.parallel_state import get_tensor_model_parallel_world_size
from megatron.core.tensor_parallel import (
    ColumnParallelLinear,
    copy_to_tensor_model_parallel_region,
    reduce_from_tensor_model_parallel_region,
    set_tensor_model_parallel_attributes,
)
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from torch import Tensor, nn

from nemo_rmt.config import FP8_CAPABILITY, Model
from nemo_rmt.errors import UserError
from nemo_rmt.megatron.attention import MaskedAttention


class RMSNorm(nn.RMSNorm):
    """RMSNorm that marks its weight for sequence parallelism (Megatron's WrappedTorchNorm refuses it in 0.16)."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_):
        super().__init__(hidden_size, eps=eps)
        self.weight.sequence_parallel = config.sequence_parallel

    def forward(self, states: Tensor) -> Tensor:
        """``[..., hidden]`` to the same."""
        if states.is_cuda or not (torch.is_grad_enabled() and states.requires_grad):
            return super().forward(states)
        return _RMSNormOnCPU.apply(states, self.weight, self.eps)


class _RMSNormOnCPU(torch.autograd.Function):
    """RMSNorm with a backward of its own: torch (2.13) has none on the CPU, and differentiates a dozen operations."""

    @staticmethod
    def forward(ctx, states, weight, eps):
        floats = states.float()
        # In torch's order of operations: scoring, which has no gradients, gives to the bit what training does.
        scale = floats.square().mean(-1, keepdim=True).add_(eps).rsqrt_()
        normed = floats * scale
        ctx.save_for_backward(states, scale, weight)
        return (normed * weight).to(states.dtype)

    @staticmethod
    def backward(ctx, grad):
        states, scale, weight = ctx.saved_tensors
        normed = states.float() * scale
        grad_weight = (grad * normed).flatten(0, -2).sum(0).to(weight.dtype)
        grad_normed = grad.float() * weight
        along = torch.linalg.vecdot(grad_normed, normed).div_(normed.shape[-1])[..., None]
        grad_states = torch.addcmul(grad_normed, normed, along, value=-1).mul_(scale)
        return grad_states.to(grad.dtype), grad_weight, None


class AllHeadsRMSNorm(nn.Module):
    """RMSNorm over all query (or key) heads together; each tensor-parallel rank holds some of them, and their weights.

    Args:
        hidden_size: of one head. heads: of all ranks.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float, heads: int):
        super().__init__()
        self.size, self.eps = heads * hidden_size, eps
        self.weight = nn.Parameter(torch.ones(self.size // get_tensor_model_parallel_world_size()))
        set_tensor_model_parallel_attributes(self.weight, True, 0, 1)

    def forward(self, heads: Tensor) -> Tensor:
        """``[sequence, batch, heads of this rank, dim]`` to the same."""
        states = heads.flatten(2).float()
        squares = reduce_from_tensor_model_parallel_region(states.square().sum(-1, keepdim=True))
        # Every rank normalises by the sum, so its gradient is that of all ranks.
        squares = copy_to_tensor_model_parallel_region(squares)
        states = states * torch.rsqrt(squares / self.size + self.eps)
        return (states * self.weight).to(heads.dtype).view_as(heads)

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None
    ) -> dict[str, Any]:
        """The weight is split over the tensor-parallel ranks."""
        return make_sharded_tensors_for_checkpoint({"weight": self.weight}, prefix, {"weight": 0}, sharded_offsets)


@functools.cache
def with_norm(linear: type) -> type:
    """A row-parallel linear layer, Megatron's or Transformer Engine's, with an RMSNorm on what comes out of it."""

    class NormedLinear(linear):
        def __init__(self, input_size: int, output_size: int, *, config: TransformerConfig, **keywords):
            super().__init__(input_size, output_size, config=config, **keywords)
            self.norm = RMSNorm(config, output_size, config.layernorm_epsilon)

        def forward(self, states: Tensor) -> tuple[Tensor, Tensor | None]:
            output, bias = super().forward(states)
            return self.norm(output), bias

    return NormedLinear


def layer_spec(
    settings: Model, config: TransformerConfig, vp_stage: int | None
) -> TransformerBlockSubmodules | ModuleSpec:
    """The layers of one model chunk, with our attention in every one.

    Raises UserError when Transformer Engine layers or FP8 are asked for and cannot run here.
    """
    if settings.layers == "transformer_engine":
        require_transformer_engine(settings)
        from megatron.core.extensions.transformer_engine import TEColumnParallelLinear

        spec = get_gpt_layer_with_transformer_engine_spec(qk_layernorm=settings.qk_norm)
        _adapt(spec, settings, TEColumnParallelLinear)
        return spec
    spec = get_gpt_layer_local_spec(normalization="RMSNorm", qk_layernorm=settings.qk_norm)
    spec.submodules.input_layernorm = spec.submodules.pre_mlp_layernorm = RMSNorm
    if settings.qk_norm:
        attention = spec.submodules.self_attention.submodules
        attention.q_layernorm = attention.k_layernorm = RMSNorm
    _adapt(spec, settings, ColumnParallelLinear)
    layers = get_num_layers_to_build(config, vp_stage=vp_stage)
    return TransformerBlockSubmodules(layer_specs=[spec] * layers, layer_norm=RMSNorm)


def _adapt(spec: ModuleSpec, settings: Model, column_parallel: type) -> None:
    """Put our attention and the published norms into a layer's spec.

    column_parallel: the linear layer without the norm that Transformer Engine's has in front.
    """
    attention, mlp = spec.submodules.self_attention.submodules, spec.submodules.mlp.submodules
    attention.core_attention = MaskedAttention
    if settings.qk_norm and settings.qk_norm_span == "all_heads":
        heads = {"q_layernorm": settings.num_attention_heads, "k_layernorm": settings.num_query_groups}
        for name, number in heads.items():
            setattr(attention, name, ModuleSpec(module=AllHeadsRMSNorm, params={"heads": number}))
    if settings.norm_position == "after":
        spec.submodules.input_layernorm = spec.submodules.pre_mlp_layernorm = IdentityOp
        attention.linear_qkv = mlp.linear_fc1 = column_parallel
        attention.linear_proj, mlp.linear_fc2 = with_norm(attention.linear_proj), with_norm(mlp.linear_fc2)


def require_transformer_engine(settings: Model) -> None:
    """Raise UserError unless Transformer Engine and a GPU that can do what the recipe asks of it are here."""
    missing = [] if torch.cuda.is_available() else ["a CUDA GPU"]
    if importlib.util.find_spec("transformer_engine") is None:
        missing.append("the package transformer_engine")
    if missing:
        remedy = "set model.layers=local" + (" and model.fp8=null" if settings.fp8 else "")
        raise UserError(f"model.layers=transformer_engine needs {' and '.join(missing)}: {remedy}")
    if settings.fp8 is None:
        return
    needed, found = FP8_CAPABILITY[settings.fp8_recipe], torch.cuda.get_device_capability()
    if found < needed:
        remedy = "set model.fp8=null"
        if found >= FP8_CAPABILITY["tensorwise"]:
            remedy = "set model.fp8_recipe=tensorwise"
        raise UserError(
            f"model.fp8={settings.fp8} with model.fp8_recipe={settings.fp8_recipe} needs a GPU of compute capability "
            f"{needed[0]}.{needed[1]} or more, this one has {found[0]}.{found[1]}: {remedy}"
        )
