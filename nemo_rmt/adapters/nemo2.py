"""A ReMiT annealing stage for any pre-training recipe of NeMo 2.7: one call, or ``--factory <recipe>_remit``.

Importing this registers the factories. nemo_run reads annotations as objects, so here they are not left as strings.
"""

import copy
import functools
import inspect
from pathlib import Path
from typing import Annotated, Callable, Optional

import fiddle as fdl
import lightning.pytorch as pl
import nemo_run as run
from nemo.collections import llm
from nemo.collections.llm import recipes
from nemo.lightning import AutoResume, NeMoLogger, OptimizerModule, Trainer

from nemo_rmt.adapters.nemo2_annealing import ReMiTAnnealing
from nemo_rmt.adapters.nemo2_schedule import StableThenDecayScheduler
from nemo_rmt.errors import UserError


def remit_stage(
    recipe: run.Partial,
    *,
    reference: Optional[str],
    stable_steps: int,
    anneal_steps: int,
    epsilon: float = 0.2,
    scale: float = 1.0,
) -> run.Partial:
    """The same recipe, ending with ``anneal_steps`` steps of ReMiT; every override works on it as before.

    recipe: of ``llm.pretrain``; it is not changed.
    reference: folder of the RL model's NeMo 2 checkpoint, of the recipe's architecture. It is looked for where the
        training starts, not here; None leaves it to an override of ``remit.reference``.
    stable_steps: steps of ordinary training, the recipe's warm-up and then its peak learning rate.
    anneal_steps: steps with weighted tokens, while the learning rate goes to zero.
    epsilon, scale: of :func:`nemo_rmt.objectives.remit_weights`.

    The result has one more argument, ``remit``; ``trainer.max_steps`` and ``optim.lr_scheduler`` are replaced.
    Raises UserError for another function's recipe, or one without an optimizer.
    """
    if fdl.get_callable(recipe) is not llm.pretrain:
        raise UserError(f"remit_stage needs a recipe of llm.pretrain, got one of {fdl.get_callable(recipe).__name__}")
    staged = copy.deepcopy(recipe)
    if getattr(staged, "optim", None) is None:
        raise UserError("remit_stage needs a recipe with optim, whose learning-rate schedule it replaces")
    fdl.update_callable(staged, pretrain)
    staged.remit = run.Config(
        ReMiTAnnealing, reference=reference, stable_steps=stable_steps, epsilon=epsilon, scale=scale
    )
    staged.trainer.max_steps = stable_steps + anneal_steps
    warmup_steps = getattr(staged.optim.lr_scheduler, "warmup_steps", 0)
    staged.optim.lr_scheduler = run.Config(StableThenDecayScheduler, warmup_steps=warmup_steps)
    return staged


def pretrain(
    model: pl.LightningModule,
    data: pl.LightningDataModule,
    trainer: Trainer,
    remit: ReMiTAnnealing,
    log: Annotated[Optional[NeMoLogger], run.Config[NeMoLogger]] = None,
    resume: Annotated[Optional[AutoResume], run.Config[AutoResume]] = None,
    optim: Optional[OptimizerModule] = None,
) -> Path:
    """llm.pretrain with a ReMiT stage at its end. Raises UserError before anything starts when that cannot be.

    The callback joins the trainer here and not in the recipe, so that replacing ``trainer.callbacks`` cannot lose it.
    """
    remit.check(trainer.max_steps)
    trainer.callbacks.append(remit)
    if optim is not None and isinstance(optim.lr_scheduler, StableThenDecayScheduler):
        if optim.lr_scheduler.warmup_steps > remit.stable_steps:
            raise UserError(
                f"optim.lr_scheduler.warmup_steps={optim.lr_scheduler.warmup_steps} must end before annealing starts, "
                f"at remit.stable_steps={remit.stable_steps}"
            )
        optim.lr_scheduler.stable_steps = remit.stable_steps
        # What a checkpoint says of its own making: a NeMo without this package must be able to read it.
        optim.__io__.lr_scheduler = None
    return llm.pretrain(model=model, data=data, trainer=trainer, log=log, resume=resume, optim=optim)


def _factory(pretrain_recipe: Callable[..., run.Partial]) -> Callable[..., run.Partial]:
    """A recipe's own factory with the stage's arguments added."""

    def with_stage(
        *,
        reference: Optional[str] = None,
        stable_steps: Optional[int] = None,
        anneal_steps: Optional[int] = None,
        epsilon: float = 0.2,
        scale: float = 1.0,
        **arguments: object,
    ) -> run.Partial:
        recipe = pretrain_recipe(**arguments)
        total = recipe.trainer.max_steps
        if anneal_steps is None:
            anneal_steps = total // 10 if stable_steps is None else total - stable_steps
        if stable_steps is None:
            stable_steps = total - anneal_steps
        return remit_stage(
            recipe,
            reference=reference,
            stable_steps=stable_steps,
            anneal_steps=anneal_steps,
            epsilon=epsilon,
            scale=scale,
        )

    # nemo_run reads the arguments it may set, and their types, from the signature
    parameters = [
        *inspect.signature(pretrain_recipe).parameters.values(),
        *(p for p in inspect.signature(with_stage).parameters.values() if p.kind is p.KEYWORD_ONLY),
    ]
    functools.update_wrapper(with_stage, pretrain_recipe)
    with_stage.__signature__ = inspect.Signature(sorted(parameters, key=lambda parameter: parameter.kind))
    return with_stage


def _register_factories() -> None:
    for name in recipes.__all__:
        module = getattr(recipes, name)
        if hasattr(module, "pretrain_recipe"):
            run.cli.factory(_factory(module.pretrain_recipe), target=llm.pretrain, name=f"{name}_remit")


_register_factories()
