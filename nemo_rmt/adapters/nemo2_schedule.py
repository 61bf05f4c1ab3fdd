"""NeMo's learning-rate schedule for a run that ends with an annealing stage: warm-up, constant, linearly to zero.

nemo_run reads annotations as objects, so here they are not left as strings.
"""

from typing import Any

from nemo.lightning.pytorch.optim.base import LRSchedulerModule
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR


class StableThenDecayScheduler(LRSchedulerModule):
    """The peak learning rate from the end of warm-up to ``stable_steps``, then a line to zero at ``max_steps``.

    warmup_steps: step n of the warm-up runs at peak·(n+1)/(warmup_steps+1), as in NeMo's own schedules.
    stable_steps: the first step of the decay. The ReMiT stage sets it from its own as training starts.
    max_steps: NeMo sets it from the trainer's.

    NeMo's WarmupHoldAnnealScheduler takes shares of max_steps, so the switch would move with the run's length.
    """

    def __init__(self, warmup_steps: int = 0, stable_steps: int = 0, max_steps: int = 10):
        super().__init__()
        self.warmup_steps, self.stable_steps, self.max_steps = warmup_steps, stable_steps, max_steps

    def share(self, step: int) -> float:
        """The learning rate of a step, counted from 0, as a share of the peak."""
        if step < self.warmup_steps:
            return (step + 1) / (self.warmup_steps + 1)
        if step < self.stable_steps:
            return 1.0
        return max(0.0, (self.max_steps - step) / (self.max_steps - self.stable_steps))

    def scheduler(self, model: Any, optimizer: Optimizer) -> dict[str, Any]:
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": _FromRecipe(optimizer, self.share), "interval": "step", "frequency": 1},
            "monitor": "val_loss",
        }


class _FromRecipe(LambdaLR):
    """Takes only its place from a checkpoint.

    Otherwise a stable checkpoint that is annealed again, or one of a cosine run, would bring its own schedule along:
    torch restores every attribute, and the optimizer the learning rate it was saved with.
    """

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.last_epoch = state_dict["last_epoch"]
        self._step_count = state_dict["_step_count"]
        self._last_lr = [peak * share(self.last_epoch) for peak, share in zip(self.base_lrs, self.lr_lambdas)]
        for group, lr in zip(self.optimizer.param_groups, self._last_lr):
            group["lr"] = lr
