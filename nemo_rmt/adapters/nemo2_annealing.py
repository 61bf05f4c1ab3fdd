"""The switch to ReMiT's weighted loss inside NeMo's training loop, a callback.

nemo_run reads annotations as objects, so here they are not left as strings.
"""

from collections import deque
from collections.abc import Sequence
from itertools import islice
from typing import Optional

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.utils import get_batch_on_this_cp_rank
from nemo.collections.llm.gpt.model.base import GPTModel
from nemo.lightning.megatron_parallel import MaskedTokenLossReduction, MegatronStep
from torch import Tensor

from nemo_rmt.adapters.nemo2_reference import FrozenReference, weights_folder
from nemo_rmt.adapters.weighted import weighted_token_loss
from nemo_rmt.errors import UserError
from nemo_rmt.objectives import standard_deviation

METRICS = ("loss", "remit/gap_mean", "remit/weight_mean", "remit/weight_square", "remit/share_low", "remit/share_high")
"""Of weighted_token_loss; added over micro-batches and ranks, and logged."""


class ReMiTAnnealing(pl.Callback):
    """From step ``stable_steps`` on every token is weighted by how much more the RL reference likes it.

    reference: folder of a NeMo 2 checkpoint of the trained model's architecture, or of its weights.
    stable_steps: optimizer steps of ordinary training before; the step number decides, so a resumed run is no
        exception.
    epsilon, scale: of :func:`nemo_rmt.objectives.remit_weights`.

    Logged while annealing: ``reduced_train_loss`` is the weighted loss; ``remit/nll`` the unweighted one, in nats;
    the mean and the standard deviation of the weights, their shares at the clip bounds, and the mean gap.
    """

    def __init__(self, reference: Optional[str], stable_steps: int, epsilon: float = 0.2, scale: float = 1.0):
        self.reference, self.stable_steps, self.epsilon, self.scale = reference, stable_steps, epsilon, scale
        self._frozen: FrozenReference | None = None
        self._loss: ReMiTLossReduction | None = None

    def check(self, max_steps: int) -> None:
        """Raise UserError for settings with which a run of ``max_steps`` could not anneal."""
        weights_folder(self.reference)
        if not 0 <= self.stable_steps < max_steps:
            raise UserError(
                f"remit.stable_steps={self.stable_steps} must be at least 0 and below trainer.max_steps={max_steps}: "
                "the steps between them are the annealing stage"
            )
        if not 0 < self.epsilon <= 1:
            raise UserError(f"remit.epsilon={self.epsilon} must be above 0 and at most 1")
        if not self.scale > 0:
            raise UserError(f"remit.scale={self.scale} must be above 0")

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Load the reference from the start: a missing tensor, or memory, must not show after the stable steps."""
        if not isinstance(pl_module, GPTModel):
            raise UserError(f"a ReMiT stage needs a model derived from llm.GPTModel, got {type(pl_module).__name__}")
        self._frozen = FrozenReference(trainer, pl_module, weights_folder(self.reference))
        self._loss = ReMiTLossReduction(self.epsilon, self.scale)
        for chunk in trainer.strategy.megatron_parallel:
            # GPTModel.training_loss_reduction keeps what it finds here; validation has its own.
            chunk._training_loss_reduction = self._loss

    def annealing(self, step: MegatronStep) -> bool:
        """Whether a step is one of the annealing stage."""
        return not step.forward_only and step.trainer.global_step >= self.stable_steps

    def on_megatron_microbatches_start(self, step: MegatronStep) -> None:
        """Score a step's micro-batches with the reference before the policy sees them.

        A schedule of its own, so that pipeline stages pass the reference's activations as they do the policy's.
        """
        if not self.annealing(step):
            return
        batches = list(islice(step.data, 1 if step.has_global_batch_sampler else step.num_microbatches))
        step.data = iter(batches)
        logprobs = self._frozen.logprobs(batches, step)
        segment_ids = _segment_ids(batches, step.num_microbatches)
        self._loss.scored = deque(zip(logprobs, segment_ids))

    def on_megatron_step_end(self, step: MegatronStep, microbatch_outputs: Sequence[dict[str, Tensor]]) -> None:
        if not self.annealing(step):
            return
        self._loss.scored = None
        totals = torch.zeros(len(METRICS), 2, device=torch.cuda.current_device())
        for output in microbatch_outputs:
            totals += output["remit"]
        dist.all_reduce(totals, group=parallel_state.get_data_parallel_group(with_context_parallel=True))
        if parallel_state.get_pipeline_model_parallel_world_size() > 1:
            group = parallel_state.get_pipeline_model_parallel_group()
            dist.broadcast(totals, parallel_state.get_pipeline_model_parallel_last_rank(), group=group)
        means = dict(zip(METRICS, (totals[:, 0] / totals[:, 1].clamp(min=1)).tolist()))
        means["remit/nll"] = means.pop("loss")
        means["remit/weight_std"] = standard_deviation(means["remit/weight_mean"], means.pop("remit/weight_square"))
        for name, value in means.items():
            step.pl_module.log(name, value, batch_size=1)


class ReMiTLossReduction(MaskedTokenLossReduction):
    """NeMo's loss, or ReMiT's for as long as ``scored`` is there."""

    def __init__(self, epsilon: float, scale: float):
        super().__init__()
        self.epsilon, self.scale = epsilon, scale
        self.scored: deque[tuple[Tensor, Tensor | None]] | None = None
        """Per micro-batch still to come: reference log-probabilities and segment ids, ``[batch, sequence]``."""

    def forward(self, batch: dict[str, Tensor], token_losses: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        if self.scored is None:
            return super().forward(batch, token_losses)
        reference_logprobs, segment_ids = self.scored.popleft()
        output = weighted_token_loss(
            token_losses,
            reference_logprobs,
            batch["loss_mask"],
            epsilon=self.epsilon,
            scale=self.scale,
            segment_ids=segment_ids,
            context_parallel_group=parallel_state.get_context_parallel_group(),
        )
        # Megatron keeps the count in an int32, and divides loss_sum in place: NeMo's report needs its own copy.
        num_tokens = output.num_tokens.int()
        reported = torch.stack([output.loss_sum.detach().clone(), num_tokens.float()])
        metrics = torch.stack([torch.stack(output.metrics[name]) for name in METRICS])
        return output.loss_sum, num_tokens, {"loss_sum_and_ub_size": reported, "remit": metrics}


def _segment_ids(batches: Sequence, num_micro_batches: int) -> list[Tensor | None]:
    """Per micro-batch, which document each token of this rank's part belongs to: ``[batch, sequence]``.

    A new document is where the position ids start again at 0 (``reset_position_ids``, packed sequences). Data that
    numbers whole rows gets None: a row is then one sequence.
    """
    rows = [batch[0] if isinstance(batch, tuple) else batch for batch in batches]
    starts = torch.cat([row["position_ids"] for row in rows]) == 0
    if not starts[:, 1:].any():
        return [None] * num_micro_batches
    return [
        get_batch_on_this_cp_rank({"segment_ids": part.cumsum(-1).cuda(non_blocking=True)})["segment_ids"]
        for part in starts.chunk(num_micro_batches)
    ]
