"""Megatron's GPTModel from the recipe, with our attention and the log-probability head."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region
from megatron.core.transformer.enums import AttnBackend
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from nemo_rmt.config import VOCAB_MULTIPLE, Model, Parallel
from nemo_rmt.megatron.cpu import redirected
from nemo_rmt.megatron.head import Teacher, TokenScores, token_scores
from nemo_rmt.megatron.layers import layer_spec

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class LogprobGPT(GPTModel):
    """A GPTModel whose last pipeline stage returns per-token scores instead of logits."""

    def __init__(self, settings: Model, config: TransformerConfig, vocab_size: int, vp_stage: int | None):
        stage = {"ignore_virtual": vp_stage is None, "vp_stage": vp_stage}
        super().__init__(
            config,
            layer_spec(settings, config, vp_stage),
            vocab_size=-(-vocab_size // VOCAB_MULTIPLE) * VOCAB_MULTIPLE,
            max_sequence_length=settings.max_position,
            pre_process=parallel_state.is_pipeline_first_stage(**stage),
            post_process=parallel_state.is_pipeline_last_stage(**stage),
            share_embeddings_and_output_weights=settings.tie_embeddings,
            position_embedding_type="mrope",  # the one that takes arbitrary position ids
            rotary_base=settings.rope_base,
            vp_stage=vp_stage,
        )
        self.true_vocab_size = vocab_size
        self.logprob_chunk = settings.logprob_chunk

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        attention_mask: Tensor | None,
        labels: Tensor | None = None,
        *,
        temperature: float | Tensor = 1.0,
        with_entropy: bool = False,
        teacher: Teacher | None = None,
        top_k: int = 0,
    ) -> Tensor | TokenScores:
        """One forward of this pipeline stage.

        Args:
            input_ids, position_ids, labels: ``[batch, sequence]`` int64.
            attention_mask: what each token sees, see MaskedAttention.
            labels: next tokens; None: sample, see Returns.
            temperature: the scores' softmax temperature, one for all or ``[batch, sequence]``.
            with_entropy: fill ``TokenScores.entropy``.
            teacher: fill ``TokenScores.divergence``.
            top_k: fill ``TokenScores.top_tokens`` and ``top_logprobs`` with as many.

        Returns:
            Before the last stage: hidden states ``[sequence, batch, hidden]``. On the last: TokenScores, or without
            labels the last position's float32 logits over the true vocabulary, ``[batch, vocabulary]``.
        """
        hidden = self.hidden_states(input_ids, position_ids, attention_mask)
        if not self.post_process:
            return hidden
        if labels is None:
            logits = gather_from_tensor_model_parallel_region(hidden[-1] @ self.output_weight.t())
            return logits[:, : self.true_vocab_size].float()
        return token_scores(
            hidden,
            self.output_weight,
            labels,
            vocab_size=self.true_vocab_size,
            temperature=temperature,
            with_entropy=with_entropy,
            teacher=teacher,
            top_k=top_k,
            chunk=self.logprob_chunk,
            sequence_parallel=self.config.sequence_parallel,
        )

    def hidden_states(self, input_ids: Tensor, position_ids: Tensor, attention_mask: Tensor | None) -> Tensor:
        """What this pipeline stage makes of its input, ``[sequence, batch, hidden]``; on the last one normed.

        With sequence parallelism it is this rank's part of the sequence. The arguments are those of ``forward``.
        """
        decoder_input, rotary_pos_emb, *_ = self._preprocess(
            input_ids=input_ids, position_ids=position_ids.expand(3, *position_ids.shape)
        )
        return self.decoder(hidden_states=decoder_input, attention_mask=attention_mask, rotary_pos_emb=rotary_pos_emb)

    @property
    def output_weight(self) -> Tensor:
        """The output embedding of the last stage, this rank's shard: ``[padded vocabulary / tensor size, hidden]``."""
        shared = self.shared_embedding_or_output_weight() if self.share_embeddings_and_output_weights else None
        return self.output_layer.weight if shared is None else shared


def transformer_config(settings: Model, parallel: Parallel) -> TransformerConfig:
    """Megatron's configuration of this architecture in this layout."""
    head_dim = settings.head_dim or settings.hidden_size // settings.num_attention_heads
    dtype, gpu = DTYPES[settings.precision], torch.cuda.is_available()
    interleaved = parallel.virtual_pipeline is not None
    return TransformerConfig(
        num_layers=settings.num_layers,
        hidden_size=settings.hidden_size,
        num_attention_heads=settings.num_attention_heads,
        num_query_groups=settings.num_query_groups,
        kv_channels=head_dim,
        ffn_hidden_size=settings.ffn_hidden_size,
        # Says that the gradients of these norms' weights are to be summed over tensor-parallel ranks: not where each
        # rank has its own part of the weights.
        qk_layernorm=settings.qk_norm and settings.qk_norm_span == "head",
        no_rope_freq=settings.rope_skip_interval,
        add_qkv_bias=settings.qkv_bias,
        layernorm_epsilon=settings.norm_epsilon,
        init_method_std=settings.init_std,
        normalization="RMSNorm",
        gated_linear_unit=True,
        activation_func=nn.functional.silu,
        add_bias_linear=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        mrope_section=[head_dim // 2 - 2 * (head_dim // 8), head_dim // 8, head_dim // 8],
        tensor_model_parallel_size=parallel.tensor,
        pipeline_model_parallel_size=parallel.pipeline,
        virtual_pipeline_model_parallel_size=parallel.virtual_pipeline,
        context_parallel_size=parallel.context,
        sequence_parallel=parallel.sequence,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        calculate_per_token_loss=True,
        attention_backend=AttnBackend.auto,
        use_cpu_initialization=not gpu,
        # Interleaving with batched p2p trains on wrong activations on gloo, silently (Megatron-Core 0.16.1).
        overlap_p2p_comm=interleaved,
        batch_p2p_comm=not interleaved,
        recompute_granularity="full" if parallel.recompute == "full" else None,
        recompute_method="uniform" if parallel.recompute == "full" else None,
        recompute_num_layers=1 if parallel.recompute == "full" else None,
        # These need Apex or Transformer Engine, or a compiler at run time.
        apply_rope_fusion=False,
        gradient_accumulation_fusion=False,
        persist_layer_norm=False,
        masked_softmax_fusion=False,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        **_fp8_options(settings, parallel),
    )


def _fp8_options(settings: Model, parallel: Parallel) -> dict[str, Any]:
    """Megatron's FP8 keys; none when the recipe does not ask for FP8."""
    if settings.fp8 is None:
        return {}
    first, last = settings.fp8_bf16_layers
    return {
        "fp8": settings.fp8,
        "fp8_recipe": settings.fp8_recipe,
        "fp8_amax_history_len": 1024,  # of fp8_recipe=delayed
        "fp8_amax_compute_algo": "max",
        "first_last_layers_bf16": first + last > 0,
        "num_layers_at_start_in_bf16": first,
        "num_layers_at_end_in_bf16": last,
    }


def build_model(settings: Model, parallel: Parallel, vocab_size: int, *, initialize: bool = True) -> list[LogprobGPT]:
    """This process's model chunks (one, or virtual_pipeline of them), on its device, in its precision.

    initialize: draw initial weights. Without, memory as it comes: for weights that are to be set, and not trained.
    """
    config = transformer_config(settings, parallel)
    config.perform_initialization = initialize
    stages = range(parallel.virtual_pipeline) if parallel.virtual_pipeline else [None]
    with redirected():
        chunks = [LogprobGPT(settings, config, vocab_size, stage) for stage in stages]
        return [chunk.to(DTYPES[settings.precision]).to(torch.cuda.current_device()) for chunk in chunks]


@contextlib.contextmanager
def set_for_sampling(chunks: list[nn.Module]) -> Iterator[None]:
    """Switch sequence parallelism and FP8 off inside the block: single positions can neither be split over ranks nor
    make up the 16 tokens of an FP8 product."""
    flags = ("sequence_parallel", "scatter_to_sequence_parallel", "reduce_scatter_embeddings")
    configs = [chunk.config for chunk in chunks]
    owners = [*configs, *(module for chunk in chunks for module in chunk.modules())]
    switched = [(owner, flag, True) for owner in owners for flag in flags if getattr(owner, flag, None) is True]
    switched += [(config, "fp8", config.fp8) for config in configs]
    for owner, name, value in switched:
        setattr(owner, name, False if value is True else None)
    try:
        yield
    finally:
        for owner, name, value in switched:
            setattr(owner, name, value)
