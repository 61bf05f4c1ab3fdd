"""A NeMo recipe made small: Qwen3's 14B recipe through its ordinary overrides, and rows of random tokens."""

from __future__ import annotations

from pathlib import Path

import lightning.pytorch as pl
import nemo_run as run
import torch
from nemo.collections import llm
from nemo.lightning.io.mixin import IOMixin
from nemo.lightning.pytorch.plugins import MegatronDataSampler
from torch.utils.data import DataLoader, Dataset

VOCAB, SEQUENCE, ROWS = 96, 16, 4
"""Tokens, tokens a row, rows a step."""
WARMUP, STABLE, STEPS, PEAK = 2, 3, 6, 0.01


class Tokenizer:
    """As much of a tokenizer as a recipe needs."""

    vocab_size = VOCAB


def loss_mask(labels: torch.Tensor) -> torch.Tensor:
    """About every fifth token carries no loss; float 0/1 of the labels' shape."""
    return (labels % 5 != 0).float()


class Rows(Dataset):
    """Row i is the same in every process."""

    def __len__(self) -> int:
        return 10_000

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        tokens = torch.randint(0, VOCAB, (SEQUENCE + 1,), generator=torch.Generator().manual_seed(index))
        return {
            "tokens": tokens[:-1],
            "labels": tokens[1:],
            "loss_mask": loss_mask(tokens[1:]),
            "position_ids": torch.arange(SEQUENCE),
            "attention_mask": torch.ones(1, SEQUENCE, SEQUENCE).tril() < 0.5,
        }


class RandomRows(pl.LightningDataModule, IOMixin):
    """Rows of random tokens. NeMo's MockDataModule makes no attention mask without Transformer Engine."""

    def __init__(self, micro_batch_size: int = 2, global_batch_size: int = ROWS):
        super().__init__()
        self.seq_length, self.micro_batch_size, self.global_batch_size = SEQUENCE, micro_batch_size, global_batch_size
        self.tokenizer = Tokenizer()
        self.data_sampler = MegatronDataSampler(SEQUENCE, micro_batch_size, global_batch_size)

    def train_dataloader(self) -> DataLoader:
        return DataLoader(Rows())

    def state_dict(self) -> dict[str, int]:
        return {"consumed_samples": self.data_sampler.compute_consumed_samples(self.trainer.global_step)}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        self.data_sampler.init_consumed_samples = state_dict["consumed_samples"]


def tiny_recipe(
    folder: Path, *, tensor: int = 1, pipeline: int = 1, virtual_pipeline: int | None = None, devices: int = 1
) -> run.Partial:
    """qwen3_14b's recipe with four small layers in fp32 on the CPU, everything else as it is."""
    recipe = llm.qwen3_14b.pretrain_recipe(
        dir=str(folder),
        name="tiny",
        tensor_parallelism=tensor,
        pipeline_parallelism=pipeline,
        virtual_pipeline_parallelism=virtual_pipeline,
        pipeline_parallelism_type=torch.float32 if pipeline > 1 else None,
        sequence_parallelism=tensor > 1,
        num_gpus_per_node=devices,
        max_steps=STEPS,
        precision="32",
        warmup_steps=WARMUP,
        max_lr=PEAK,
        limit_val_batches=0,
        val_check_interval=None,
        log_every_n_steps=1,
    )
    config = recipe.model.config
    config.num_layers, config.hidden_size, config.ffn_hidden_size = 4, 32, 48
    config.num_attention_heads, config.num_query_groups, config.kv_channels = 4, 2, 8
    config.seq_length, config.vocab_size = SEQUENCE, VOCAB
    config.use_cpu_initialization = True
    # with batches of messages, interleaved stages train on wrong activations on gloo
    config.overlap_p2p_comm, config.batch_p2p_comm = virtual_pipeline is not None, False
    # the fused one rounds its gradient to bfloat16 whatever the precision
    config.cross_entropy_loss_fusion = False
    recipe.data = run.Config(RandomRows)
    recipe.trainer.accelerator = "cpu"
    recipe.trainer.num_sanity_val_steps = 0
    recipe.trainer.enable_checkpointing = False
    strategy = recipe.trainer.strategy
    strategy.ckpt_async_save = False
    # the default form cannot hold torch's Adam, which is used where Transformer Engine is not installed
    strategy.ckpt_optim_fully_reshardable = True
    # NeMo's progress printer gathers its timers on rank 0 alone, which hangs on gloo
    recipe.trainer.enable_progress_bar = strategy.replace_progress_bar = False
    recipe.log.tensorboard = recipe.log.ckpt = recipe.resume = None
    return recipe
