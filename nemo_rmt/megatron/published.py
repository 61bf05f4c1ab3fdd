"""The model under its published names: which tensors of a Hugging Face model each parameter of Megatron's holds.

A parameter may hold several of them (query, key and value; gate and up), a tensor-parallel rank a part of each, and a
pipeline stage some of the layers. What is said here once serves to read a rank's parts from files, and to stream whole
tensors out of a model in use.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.distributed as dist
from megatron.core.parallel_state import (
    get_pipeline_model_parallel_group,
    get_tensor_model_parallel_group,
)
from torch import Tensor, nn

from nemo_rmt.config import VOCAB_MULTIPLE, Model
from nemo_rmt.megatron.model import DTYPES, LogprobGPT


class Published(NamedTuple):
    """One tensor of a published model."""

    name: str
    shape: tuple[int, ...]
    split: int | None = None
    """The dimension that tensor-parallel ranks share; None: each has it whole."""
    padding: int = 0
    """Rows that Megatron appends along it."""

    def local_rows(self, tensor_size: int) -> int:
        """Size of the first dimension on one of that many tensor-parallel ranks."""
        return (self.shape[0] + self.padding) // tensor_size if self.split == 0 else self.shape[0]

    def local_range(self, tensor_rank: int, tensor_size: int) -> tuple[slice, ...]:
        """What of the tensor a tensor-parallel rank holds; it may be empty, where only padding is left."""
        index = [slice(None)] * len(self.shape)
        if self.split is not None:
            whole = self.shape[self.split]
            size = (whole + self.padding) // tensor_size
            index[self.split] = slice(min(tensor_rank * size, whole), min((tensor_rank + 1) * size, whole))
        return tuple(index)


class Counterpart(NamedTuple):
    """What one parameter is made of."""

    parameter: str
    """Megatron's name, with the layers of the whole model numbered from 0."""
    tensors: tuple[Published, ...]
    """One below the other in the parameter."""
    groups: int = 1
    """They take turns that often, over all tensor-parallel ranks: for each group its queries, its key, its value."""

    def parts(self, parameter: Tensor, tensor_size: int) -> list[Tensor]:
        """Views of a rank's parameter, one for each tensor: ``[groups of this rank, rows of a group, ...]``."""
        groups = max(1, self.groups // tensor_size)
        rows = [tensor.local_rows(tensor_size) // groups for tensor in self.tensors]
        # Detached: split() makes tensors that require gradients even where none are recorded.
        return list(parameter.detach().unflatten(0, (groups, -1)).split(rows, dim=1))


def counterparts(settings: Model, vocab_size: int) -> list[Counterpart]:
    """Every parameter of the model, in the order in which its tensors are published.

    vocab_size: tokens the model predicts over, without padding.
    """
    shape, padding = (vocab_size, settings.hidden_size), -vocab_size % VOCAB_MULTIPLE
    embedding = Published("model.embed_tokens.weight", shape, 0, padding)
    found = [Counterpart("embedding.word_embeddings.weight", (embedding,))]
    for number in range(settings.num_layers):
        found += _layer(settings, number)
    norm = Published("model.norm.weight", (settings.hidden_size,))
    found.append(Counterpart("decoder.final_layernorm.weight", (norm,)))
    if not settings.tie_embeddings:
        found.append(Counterpart(OUTPUT, (Published("lm_head.weight", shape, 0, padding),)))
    return found


OUTPUT = "output_layer.weight"
"""Also a pipeline's last stage's copy of a tied embedding."""


def _layer(settings: Model, number: int) -> list[Counterpart]:
    """One layer's parameters."""
    hidden, ffn, groups = settings.hidden_size, settings.ffn_hidden_size, settings.num_query_groups
    head_dim = settings.head_dim or hidden // settings.num_attention_heads
    sizes = {"q": settings.num_attention_heads * head_dim, "k": groups * head_dim, "v": groups * head_dim}

    def entry(parameter: str, *tensors: Published, groups: int = 1) -> Counterpart:
        published = tuple(tensor._replace(name=f"model.layers.{number}.{tensor.name}") for tensor in tensors)
        return Counterpart(f"decoder.layers.{number}.{parameter}", published, groups)

    def norm(parameter: str, name: str) -> Counterpart:
        return entry(parameter, Published(name, (hidden,)))

    before_attention, before_mlp = "input_layernorm.weight", "pre_mlp_layernorm.weight"
    if settings.layers == "transformer_engine":  # has them in the linear layers that follow
        before_attention, before_mlp = "self_attention.linear_qkv.layer_norm_weight", "mlp.linear_fc1.layer_norm_weight"
    is_before = settings.norm_position == "before"
    found = [norm(before_attention, "input_layernorm.weight")] if is_before else []
    qkv = [Published(f"self_attn.{part}_proj.weight", (size, hidden), 0) for part, size in sizes.items()]
    found.append(entry("self_attention.linear_qkv.weight", *qkv, groups=groups))
    if settings.qkv_bias:
        biases = [Published(f"self_attn.{part}_proj.bias", (size,), 0) for part, size in sizes.items()]
        found.append(entry("self_attention.linear_qkv.bias", *biases, groups=groups))
    if settings.qk_norm:
        for part in "qk":
            name = f"self_attn.{part}_norm.weight"
            over_all = settings.qk_norm_span == "all_heads"
            weight = Published(name, (sizes[part],), 0) if over_all else Published(name, (head_dim,))
            found.append(entry(f"self_attention.{part}_layernorm.weight", weight))
    found.append(
        entry("self_attention.linear_proj.weight", Published("self_attn.o_proj.weight", (hidden, sizes["q"]), 1))
    )
    if is_before:
        found.append(norm(before_mlp, "post_attention_layernorm.weight"))
    else:
        found.append(norm("self_attention.linear_proj.norm.weight", "post_attention_layernorm.weight"))
    gate_up = [Published(f"mlp.{part}_proj.weight", (ffn, hidden), 0) for part in ("gate", "up")]
    found.append(entry("mlp.linear_fc1.weight", *gate_up))
    found.append(entry("mlp.linear_fc2.weight", Published("mlp.down_proj.weight", (hidden, ffn), 1)))
    if not is_before:
        found.append(norm("mlp.linear_fc2.norm.weight", "post_feedforward_layernorm.weight"))
    return found


def own_parameters(chunks: list[LogprobGPT]) -> Iterator[tuple[str, nn.Parameter]]:
    """This rank's parameters under the names of ``Counterpart.parameter``."""
    for chunk in chunks:
        for name, parameter in chunk.named_parameters():
            if name.startswith("decoder.layers."):
                place, rest = name.removeprefix("decoder.layers.").split(".", 1)
                name = f"decoder.layers.{chunk.decoder.layers[int(place)].layer_number - 1}.{rest}"
            yield name, parameter


def published_shapes(settings: Model, vocab_size: int) -> list[tuple[str, torch.dtype, tuple[int, ...]]]:
    """Name, dtype and shape of every tensor, in the order of ``published_stream``."""
    dtype = DTYPES[settings.precision]
    return [(each.name, dtype, each.shape) for entry in counterparts(settings, vocab_size) for each in entry.tensors]


@torch.no_grad()
def published_stream(chunks: list[LogprobGPT], settings: Model) -> Iterator[tuple[str, Tensor]]:
    """Every tensor under its published name, whole, one at a time, on every rank of the model-parallel group.

    Collective over the tensor and pipeline groups, so each of their ranks must take all of them. The order is always
    the same. Tensors are contiguous, of the parameters' dtype and device, without padding of the vocabulary, and may
    share memory with the parameters: copy what is to be kept.
    """
    held = dict(own_parameters(chunks))
    tensor_group, pipeline_group = get_tensor_model_parallel_group(), get_pipeline_model_parallel_group()
    holders: list[list[str]] = [[] for _ in range(pipeline_group.size())]
    dist.all_gather_object(holders, list(held), group=pipeline_group)
    example = next(iter(held.values()))
    for entry in counterparts(settings, chunks[0].true_vocab_size):
        owner = next(rank for rank, names in enumerate(holders) if entry.parameter in names)
        parts: list[Tensor | None] = [None] * len(entry.tensors)
        if owner == pipeline_group.rank():
            parts = entry.parts(held[entry.parameter], tensor_group.size())
        for tensor, part in zip(entry.tensors, parts, strict=True):
            yield tensor.name, _whole(tensor, part, example, owner, tensor_group, pipeline_group)


def _whole(
    tensor: Published,
    part: Tensor | None,
    example: Tensor,
    owner: int,
    tensor_group: dist.ProcessGroup,
    pipeline_group: dist.ProcessGroup,
) -> Tensor:
    """A tensor from its parts. part: this rank's, on the pipeline stage ``owner``. example: has dtype and device."""
    whole = example.new_empty(tensor.shape) if part is None else part.flatten(0, 1)
    if part is not None and tensor.split is not None:
        if tensor_group.size() > 1:
            shards = [torch.empty_like(whole) for _ in range(tensor_group.size())]
            dist.all_gather(shards, whole.contiguous(), group=tensor_group)
            whole = torch.cat(shards, dim=tensor.split)
        whole = whole.narrow(tensor.split, 0, tensor.shape[tensor.split])
    whole = whole.contiguous()
    if pipeline_group.size() > 1:
        dist.broadcast(whole, dist.get_global_rank(pipeline_group, owner), group=pipeline_group)
    return whole
