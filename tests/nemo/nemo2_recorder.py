"""Watches a NeMo run from the inside: its losses, and what they must be, from logits with plain torch."""

from __future__ import annotations

from pathlib import Path

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from nemo.lightning.io.pl import TrainerContext
from nemo2_model import STEPS, VOCAB, Rows, loss_mask
from torch import Tensor

from nemo_rmt.adapters.nemo2_annealing import ReMiTAnnealing
from nemo_rmt.megatron.optimizer import prepare_for_loading


def megatron_model(chunk: torch.nn.Module) -> torch.nn.Module:
    while hasattr(chunk, "module"):
        chunk = chunk.module
    return chunk


def whole_vocabulary(shard: Tensor) -> Tensor:
    """``[batch, sequence, vocabulary]`` float64 from every tensor-parallel rank's ``[sequence, batch, part]``."""
    group = parallel_state.get_tensor_model_parallel_group()
    parts = [torch.empty_like(shard) for _ in range(group.size())]
    dist.all_gather(parts, shard.contiguous(), group=group)
    return torch.cat(parts, -1).transpose(0, 1).double()


class Scored:
    """The labels, logits and logits' gradients of every forward of a model's last stage."""

    def __init__(self, model: torch.nn.Module):
        self.labels, self.logits, self.gradients = [], [], []
        model.register_forward_pre_hook(self._forward, with_kwargs=True)
        model.output_layer.register_forward_hook(self._output)

    def _forward(self, model, args, kwargs) -> None:
        self.labels.append(kwargs["labels"])

    def _output(self, layer, args, output) -> None:
        # a copy: the fused cross-entropy subtracts the maximum in place
        self.logits.append(output[0].detach().clone())
        if output[0].requires_grad:
            output[0].register_hook(self.gradients.append)

    def logprobs(self) -> list[Tensor]:
        """Per micro-batch, ``[batch, sequence]``."""
        return [
            whole_vocabulary(logits).log_softmax(-1).gather(-1, labels.unsqueeze(-1)).squeeze(-1)
            for logits, labels in zip(self.logits, self.labels)
        ]

    def clear(self) -> None:
        for values in (self.labels, self.logits, self.gradients):
            values.clear()


class Recorder(pl.Callback):
    """What a run does, step by step.

    remit: the stage's callback, to look at its reference. save: where to, after which step. context: folder for what
    NeMo says of a run beside its weights. score_rows: whether the final model scores the rows of all steps.
    """

    def __init__(
        self,
        remit: ReMiTAnnealing | None,
        save: dict[int, Path] | None = None,
        context: Path | None = None,
        score_rows: bool = False,
    ):
        self.remit, self.save, self.context, self.score_rows = remit, save or {}, context, score_rows
        self.facts = {"loss": [], "lr": [], "metrics": [], "expected": {}, "gradient_error": {}}
        self.policy = self.reference = None

    def on_fit_start(self, trainer, module) -> None:
        if trainer.ckpt_path:
            prepare_for_loading(trainer.optimizers[0].mcore_optimizer)

    def on_train_start(self, trainer, module) -> None:
        chunks, optimizer = trainer.strategy.megatron_parallel, trainer.optimizers[0].mcore_optimizer
        self.facts["parameters"] = sum(p.numel() for p in chunks.parameters())
        self.facts["optimizer_parameters"] = sum(p.numel() for group in optimizer.param_groups for p in group["params"])
        self.facts["buffers"] = sum(b.grad_data.numel() for b in chunks[0].module.buffers)
        if self.remit is None:
            return
        frozen = self.remit._frozen.model
        self.facts["reference_trains"] = frozen.training or any(p.requires_grad for p in frozen.parameters())
        policy = megatron_model(chunks[-1])
        if policy.post_process:
            self.policy, self.reference = Scored(policy), Scored(megatron_model(frozen[-1]))

    def on_train_batch_start(self, trainer, *_) -> None:
        self.facts["lr"].append(trainer.optimizers[0].param_groups[0]["lr"])

    def on_train_batch_end(self, trainer, *_) -> None:
        step, metrics = trainer.global_step - 1, trainer.callback_metrics
        self.facts["loss"].append(metrics["reduced_train_loss"].item())
        self.facts["metrics"].append({k: v.item() for k, v in metrics.items() if k.startswith("remit/")})
        if self.policy is not None:
            if self.reference.logits:
                self._compare(step)
            self.policy.clear(), self.reference.clear()
        if trainer.global_step in self.save:
            trainer.save_checkpoint(self.save[trainer.global_step])

    def on_train_end(self, trainer, module) -> None:
        chunks = trainer.strategy.megatron_parallel
        # with overlap_param_gather, the other ranks' part of the last update comes at the next forward
        chunks.force_param_sync()
        if self.context is not None and trainer.is_global_zero:
            TrainerContext.from_trainer(trainer).io_dump(self.context, yaml_attrs=["model"])
        self.facts["weights"] = [p.double().sum().item() for p in chunks.parameters()]
        if self.score_rows:
            rows = [Rows()[row] for row in range(STEPS * 4)]
            batch = {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
            with torch.no_grad():
                losses = megatron_model(chunks[0])(
                    batch["tokens"], batch["position_ids"], batch["attention_mask"], labels=batch["labels"]
                )
            self.facts["logprobs"] = (-losses).tolist()

    def _compare(self, step: int) -> None:
        """The weighted loss of this step and its gradient at the logits, from the logits of both models."""
        total, gradient_error = torch.zeros(2, dtype=torch.float64), 0.0
        micro_batches = list(zip(self.policy.logprobs(), self.reference.logprobs(), self.policy.labels, strict=True))
        for index, (policy, reference, labels) in enumerate(micro_batches):
            mask = loss_mask(labels).double()
            gap = reference - policy
            centred = gap - (gap * mask).sum(1, keepdim=True) / mask.sum(1, keepdim=True)
            weights = (2 / (1 + torch.exp(-self.remit.scale * centred))).clip(
                1 - self.remit.epsilon, 1 + self.remit.epsilon
            )
            total += torch.stack([-(weights * policy * mask).sum(), mask.sum()])
            logits, gradient = self.policy.logits[index], self.policy.gradients[index]
            expected = whole_vocabulary(logits).softmax(-1) - torch.nn.functional.one_hot(labels, VOCAB)
            expected *= (weights * mask / mask.sum() / len(micro_batches)).unsqueeze(-1)
            gradient_error = max(gradient_error, (whole_vocabulary(gradient) - expected).abs().max().item())
        dist.all_reduce(total, group=parallel_state.get_data_parallel_group())
        self.facts["expected"][step] = (total[0] / total[1]).item()
        self.facts["gradient_error"][step] = gradient_error
        self.facts.setdefault("reference_logprobs", {})[step] = [row for m in micro_batches for row in m[1].tolist()]
