"""A configuration of Bridge for a tiny Qwen3, and ReMiT's formula in plain torch."""

from __future__ import annotations

import torch
from megatron.bridge import AutoBridge
from megatron.bridge.models.gpt_provider import local_layer_spec
from megatron.bridge.training.config import (
    CheckpointConfig,
    ConfigContainer,
    DistributedInitConfig,
    LoggerConfig,
    MockGPTDatasetConfig,
    OptimizerConfig,
    SchedulerConfig,
    TrainingConfig,
)
from megatron.bridge.training.tokenizers.config import TokenizerConfig
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from torch import Tensor
from transformers import Qwen3Config, Qwen3ForCausalLM

from nemo_rmt.megatron.layers import RMSNorm

SEQUENCE, VOCAB = 24, 300


def hugging_face_model(seed: int, layers: int = 2) -> Qwen3ForCausalLM:
    """Random weights, large enough to tell two models apart."""
    torch.manual_seed(seed)
    return Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=VOCAB,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=layers,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=8,
            tie_word_embeddings=False,
            initializer_range=0.1,
        )
    )


def layer_spec(config) -> TransformerBlockSubmodules:
    """Bridge's layers without Transformer Engine, and norms that may be sequence-parallel there."""
    layer = local_layer_spec(config)
    attention = layer.submodules.self_attention.submodules
    layer.submodules.input_layernorm = layer.submodules.pre_mlp_layernorm = RMSNorm
    attention.q_layernorm = attention.k_layernorm = RMSNorm
    return TransformerBlockSubmodules(layer_specs=[layer] * config.num_layers, layer_norm=RMSNorm)


def tiny_config(hugging_face_folder: str, **train: object) -> ConfigContainer:
    """A pre-training run of the folder's architecture, from random weights, on Megatron's mock data."""
    model = AutoBridge.from_hf_pretrained(hugging_face_folder).to_megatron_provider(load_weights=False)
    model.transformer_layer_spec = layer_spec
    model.gradient_accumulation_fusion = False
    model.cross_entropy_loss_fusion = False  # it rounds the loss's gradient to bfloat16
    model.seq_length = SEQUENCE
    return ConfigContainer(
        train=TrainingConfig(
            **{"micro_batch_size": 2, "global_batch_size": 4, "train_iters": 50, "eval_iters": 1, **train}
        ),
        model=model,
        optimizer=OptimizerConfig(optimizer="adam", lr=1e-2, min_lr=1e-3, use_distributed_optimizer=True),
        scheduler=SchedulerConfig(lr_decay_style="cosine", start_weight_decay=0.1, end_weight_decay=0.1),
        dataset=MockGPTDatasetConfig(
            seq_length=SEQUENCE,
            random_seed=1,
            reset_position_ids=False,
            reset_attention_mask=False,
            eod_mask_loss=False,
            num_workers=0,
            dataloader_type="single",
        ),
        logger=LoggerConfig(log_interval=1),
        tokenizer=TokenizerConfig(tokenizer_type="NullTokenizer", vocab_size=VOCAB),
        checkpoint=CheckpointConfig(),
        dist=DistributedInitConfig(distributed_backend="gloo"),
    )


def token_logprobs(logits: Tensor, labels: Tensor) -> Tensor:
    """``[batch, sequence]`` float64 log-probabilities of the labels, from full logits."""
    return logits.double().log_softmax(-1).gather(-1, labels[..., None])[..., 0]


def remit_sum(
    policy: Tensor, reference: Tensor, mask: Tensor, documents: Tensor, epsilon: float, scale: float
) -> Tensor:
    """Σ w·nll, token by token; w = clip(2·σ(scale·(Δ − mean Δ)), 1 − ε, 1 + ε), mean over the document."""
    total = torch.zeros((), dtype=torch.float64)
    for row in range(len(policy)):
        for document in documents[row].unique():
            places = [i for i in range(policy.shape[1]) if documents[row, i] == document and mask[row, i] > 0]
            gaps = [(reference[row, i] - policy[row, i]).detach() for i in places]
            for i, gap in zip(places, gaps, strict=True):
                weight = 2 / (1 + torch.exp(-scale * (gap - sum(gaps) / len(gaps))))
                total = total - weight.clamp(1 - epsilon, 1 + epsilon) * policy[row, i]
    return total
