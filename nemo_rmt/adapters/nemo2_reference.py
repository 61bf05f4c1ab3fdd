"""The frozen RL reference beside a model that NeMo trains: built, loaded and asked for log-probabilities."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path

import lightning.pytorch as pl
import torch
from lightning.pytorch.accelerators import CPUAccelerator
from megatron.core.dist_checkpointing import ShardedTensor, load_tensors_metadata
from megatron.core.dist_checkpointing.dict_utils import nested_values
from nemo.collections.llm.gpt.model.base import GPTModel
from nemo.lightning._strategy_lib import load_model_state_dict
from nemo.lightning.ckpt_utils import WEIGHTS_PATH
from nemo.lightning.megatron_parallel import MegatronLossReduction, MegatronParallel, MegatronStep
from torch import Tensor

from nemo_rmt.errors import UserError

# What NeMo hangs on a model's configuration to train it. The reference must not sync gradients or run timers.
TRAINING_HOOKS = (
    "finalize_model_grads_func",
    "grad_scale_func",
    "grad_sync_func",
    "no_sync_func",
    "param_sync_func",
    "timers",
)


def weights_folder(reference: str | Path | None) -> Path:
    """The weights of a NeMo 2 checkpoint: the folder itself, or its ``weights``.

    Raises UserError where there is no distributed checkpoint.
    """
    if not reference:
        raise UserError("remit.reference is not set: give the folder of the RL model's NeMo 2 checkpoint")
    folder = Path(reference)
    weights = folder / WEIGHTS_PATH if (folder / WEIGHTS_PATH).is_dir() else folder
    if not (weights / "metadata.json").is_file():
        what = "is not a NeMo 2 checkpoint" if folder.is_dir() else "does not exist"
        raise UserError(
            f"remit.reference={reference} {what}: give a folder that holds weights/metadata.json, or its weights "
            "(llm.import_ckpt makes one from a Hugging Face model)"
        )
    return weights


class FrozenReference:
    """A second model of the policy's architecture and layout. It is in no optimizer, DDP buffer or checkpoint.

    trainer, policy: of a run whose strategy is set up. weights: from :func:`weights_folder`.
    Raises UserError where the checkpoint's tensors are not those of the policy's architecture.
    """

    def __init__(self, trainer: pl.Trainer, policy: GPTModel, weights: Path):
        strategy = trainer.strategy
        config = copy.copy(policy.config)
        # Initial values would only be overwritten, and drawing them would move the policy's random numbers.
        config.perform_initialization = False
        for hook in TRAINING_HOOKS:
            setattr(config, hook, None)
        chunks = []
        for vp_stage in range(strategy.virtual_pipeline_model_parallel_size or 1):
            chunk = type(policy)(config, tokenizer=policy.tokenizer)
            chunk.module = config.configure_model(policy.tokenizer, vp_stage=vp_stage)
            chunks.append(chunk)
        self.model = MegatronParallel(
            chunks,
            precision_plugin=strategy.precision_plugin,
            vp_size=strategy.virtual_pipeline_model_parallel_size,
            cpu=isinstance(trainer.accelerator, CPUAccelerator),
            convert_module_fn=getattr(strategy.precision_plugin, "convert_module", None),
        )
        self.model.trainer = trainer
        self.model.init_model_parallel()
        self.model.eval().requires_grad_(False)
        self._load(strategy, weights)

    def _load(self, strategy: pl.strategies.Strategy, weights: Path) -> None:
        metadata = strategy.unwrapped_checkpoint_io.load_content_metadata(weights)
        # The prefix that NeMo's own checkpoints have; MegatronParallel's depends on what wraps the model.
        states = [chunk.module.sharded_state_dict(prefix="module.", metadata=metadata) for chunk in self.model]
        state = states[0] if self.model.vp_size is None else {f"model_{i}": part for i, part in enumerate(states)}
        vocab_size = self.model.module.config.vocab_size or self.model.module.tokenizer.vocab_size
        differences = _differences(state, load_tensors_metadata(str(weights)), vocab_size)
        if differences:
            raise UserError(
                f"remit.reference={weights} is not a checkpoint of the trained model's architecture: "
                + "; ".join(differences[:3])
            )
        checkpoint = strategy.checkpoint_io.load_checkpoint(weights, sharded_state_dict={"state_dict": state})
        load_model_state_dict(self.model, checkpoint, strict=True)

    @torch.no_grad()
    def logprobs(self, batches: Sequence, step: MegatronStep) -> list[Tensor]:
        """Log-probabilities of the labels, one ``[batch, sequence]`` float32 tensor per micro-batch of a step.

        batches: what the step's data iterator yields in all. On pipeline stages without labels the list is empty.
        """
        outputs = self.model.validation_step(
            iter(batches),
            loss_reduction=_Logprobs(),
            seq_length=step.seq_length,
            micro_batch_size=step.micro_batch_size,
            num_microbatches=step.num_microbatches,
        )
        return outputs if isinstance(outputs, list) else []


class _Logprobs(MegatronLossReduction):
    """Passes a forward-only schedule's token losses on, as log-probabilities."""

    def forward(self, batch: dict[str, Tensor], token_losses: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        no_loss = token_losses.new_zeros(())
        return no_loss, no_loss.int(), {"logprobs": -token_losses.float()}

    def reduce(self, micro_batches: Sequence[dict[str, Tensor]]) -> list[Tensor]:
        return [micro_batch["logprobs"] for micro_batch in micro_batches]


def _differences(state: dict, stored: dict[str, ShardedTensor], vocab_size: int) -> list[str]:
    """What keeps a checkpoint from being loaded into a model, one sentence a tensor.

    The vocabulary is padded to a multiple that depends on the layout, so of it only the true size counts.
    """
    differences = {}
    for tensor in nested_values(state):
        if not isinstance(tensor, ShardedTensor):
            continue
        if tensor.key not in stored:
            differences[tensor.key] = f"it has no {tensor.key}"
            continue
        ours, theirs = tuple(tensor.global_shape), tuple(stored[tensor.key].global_shape)
        if tensor.allow_shape_mismatch and theirs[0] >= vocab_size:
            ours, theirs = ours[1:], theirs[1:]
        if ours != theirs:
            differences[tensor.key] = f"{tensor.key} is {list(theirs)}, not {list(ours)}"
    return list(differences.values())
