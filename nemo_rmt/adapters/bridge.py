"""ReMiT's annealing in a Megatron-Bridge 0.3 pre-training run (arXiv 2602.03075).

    from megatron.bridge.training.pretrain import pretrain
    from nemo_rmt.adapters.bridge import ReMiTForwardStep, remit_config

    cfg = remit_config(cfg, stable_steps=90_000, anneal_steps=10_000)
    pretrain(cfg, ReMiTForwardStep("/checkpoints/rl", stable_steps=90_000))

The learning rate stays flat for ``stable_steps`` and then falls to 0. Until it falls, a step's loss is Bridge's own;
from there on each token is weighted by how much more the RL reference likes it than the model does. Tensor, sequence,
expert, context and data parallelism are those of the run; pipeline parallelism is refused, see :func:`require_layout`.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch
from megatron.bridge import AutoBridge
from megatron.bridge.training.checkpointing import _load_model_weights_from_checkpoint
from megatron.bridge.training.config import ConfigContainer
from megatron.bridge.training.gpt_step import forward_step, get_batch
from megatron.bridge.training.state import GlobalState
from megatron.bridge.training.utils.checkpoint_utils import get_checkpoint_run_config_filename, read_run_config
from megatron.bridge.training.utils.pg_utils import get_pg_collection
from megatron.core.transformer import MegatronModule
from megatron.core.transformer.enums import CudaGraphScope
from torch import Tensor

from nemo_rmt.adapters.weighted import weighted_token_loss
from nemo_rmt.errors import UserError

ARCHITECTURE = ("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "num_query_groups")
"""What reference and model must share, found out in the first step and not when the weighting begins."""

LOGGED = {
    "remit/loss": "weighted_loss",
    **{f"remit/{name}": f"remit/{name}" for name in ("weight_mean", "share_low", "share_high", "gap_mean")},
}
"""Metrics by their names in Bridge's logs, which take single numbers only."""

OF_THE_RUN = (
    "timers",
    "finalize_model_grads_func",
    "grad_scale_func",
    "no_sync_func",
    "grad_sync_func",
    "param_sync_func",
)
"""What Bridge hangs on the model's configuration once the run is set up; it belongs to the trained model."""


def remit_config(cfg: ConfigContainer, *, stable_steps: int, anneal_steps: int) -> ConfigContainer:
    """A copy of ``cfg`` whose learning rate is flat for ``stable_steps`` after warm-up, then falls linearly to 0.

    The run ends there, after ``stable_steps + anneal_steps``. A checkpoint may come from a run with another schedule:
    its own is not restored. Everything else is as in ``cfg``.

    Raises UserError for steps below 1, a warm-up longer than ``stable_steps``, a run counted in samples or with a batch
    size that ramps up (Megatron counts its schedule in samples, so the fall would begin at another step), and for
    pipeline parallelism.
    """
    require_layout(cfg)
    for name, steps in (("stable_steps", stable_steps), ("anneal_steps", anneal_steps)):
        if steps < 1:
            raise UserError(f"{name} must be at least 1, got {steps}")
    if cfg.train.train_samples is not None:
        raise UserError(
            f"train.train_samples={cfg.train.train_samples} counts the run in samples, ReMiT's schedule is in steps: "
            "leave it and scheduler.*_samples unset"
        )
    if cfg.train.rampup_batch_size is not None:
        raise UserError(
            f"train.rampup_batch_size={cfg.train.rampup_batch_size} would move the start of the decay away from "
            f"stable_steps={stable_steps}: continue from the checkpoint after the ramp with the full batch size"
        )
    total = stable_steps + anneal_steps
    warmup = cfg.scheduler.lr_warmup_iters or (cfg.scheduler.lr_warmup_fraction or 0) * total
    if warmup > stable_steps:
        raise UserError(f"the learning rate warms up for {warmup:g} steps, more than stable_steps={stable_steps}")

    cfg = copy.copy(cfg)
    cfg.train, cfg.optimizer, cfg.scheduler = copy.copy(cfg.train), copy.copy(cfg.optimizer), copy.copy(cfg.scheduler)
    cfg.train.train_iters = total
    cfg.optimizer.min_lr = 0.0
    cfg.scheduler.lr_decay_style, cfg.scheduler.lr_wsd_decay_style = "WSD", "linear"
    cfg.scheduler.lr_decay_iters, cfg.scheduler.lr_wsd_decay_iters = total, anneal_steps
    # Megatron refuses to resume when the checkpoint's schedule is another one.
    cfg.scheduler.override_opt_param_scheduler = True
    cfg.scheduler.use_checkpoint_opt_param_scheduler = False
    return cfg


def require_layout(cfg: ConfigContainer) -> None:
    """Refuse the two ways of running in which a forward step cannot score a second model, with one UserError.

    With pipeline stages, a forward step has the activations of the trained model's earlier stages only, and Bridge's
    callbacks, which could run the reference through the pipeline before the step, do not see the data. A CUDA graph of
    the whole iteration replays the step that it captured.
    """
    stages = cfg.model.pipeline_model_parallel_size
    if stages > 1:
        raise UserError(
            f"model.pipeline_model_parallel_size={stages}: a forward step of one pipeline stage cannot score the "
            "reference; set it to 1 and split the model by tensor_model_parallel_size and context_parallel_size"
        )
    if cfg.model.cuda_graph_impl == "local" and CudaGraphScope.full_iteration in (cfg.model.cuda_graph_scope or ()):
        raise UserError(
            "model.cuda_graph_scope=full_iteration replays one captured step, so the loss could not change at "
            "stable_steps: choose another scope"
        )


class ReMiTForwardStep:
    """The forward step of ``pretrain``: Bridge's own until ``stable_steps`` are done, then with ReMiT's weights.

    reference: the frozen RL model, of the trained model's architecture: a Bridge or Megatron-LM checkpoint (torch_dist;
        the folder of all iterations, of which the latest is taken, or of one) or a Hugging Face folder. It is loaded at
        the first weighted step, next to the trained model, split and in the precision like it, and needs as much memory
        as its weights: it has no gradients and is in no checkpoint.
    stable_steps: as in :func:`remit_config`; counted, like ``train_iters``, from the run's first step and not its last
        restart.
    epsilon, scale: as :func:`nemo_rmt.objectives.remit_weights` has them.

    The gap is centred within each document where the batch's position ids start again at 0 (``reset_position_ids``,
    packed sequences), within the row otherwise. Validation is never weighted.

    Logged beside Bridge's ``lm loss``, which stays the unweighted one: ``remit/loss``, ``remit/weight_mean``,
    ``remit/share_low``, ``remit/share_high`` (the share of tokens at each clip bound) and ``remit/gap_mean``, nats.

    Raises UserError for a reference that is neither or has another architecture, settings out of range, and what
    :func:`require_layout` refuses.
    """

    def __init__(self, reference: str | Path, *, stable_steps: int, epsilon: float = 0.2, scale: float = 1.0) -> None:
        if not 0 < epsilon <= 1:
            raise UserError(f"epsilon must be above 0 and at most 1, got {epsilon}")
        if not scale > 0:
            raise UserError(f"scale must be above 0, got {scale}")
        self.reference, self.is_hugging_face = _find_reference(Path(reference))
        self.stable_steps, self.epsilon, self.scale = stable_steps, epsilon, scale
        self._checked = False
        self._model: MegatronModule | None = None

    def __call__(
        self, state: GlobalState, data_iterator: Iterator, model: MegatronModule, return_schedule_plan: bool = False
    ) -> tuple[Tensor, partial]:
        """Same contract as ``megatron.bridge.training.gpt_step.forward_step``."""
        if not self._checked:
            require_layout(state.cfg)
            self._require_architecture(state.cfg.model)
            self._checked = True
        if state.train_state.step < self.stable_steps or not model.training:
            return forward_step(state, data_iterator, model, return_schedule_plan)

        batch, groups = next(data_iterator), get_pg_collection(model)
        if self._model is None:
            self._model = self._load(state.cfg.model, model)
        # The reference first: its logits are gone before the model's, kept for backward, are there.
        with torch.no_grad():
            reference_losses, _ = forward_step(state, iter([batch]), self._model)
        documents = _documents(batch, state.cfg, groups)
        output, own_loss = forward_step(state, iter([batch]), model, return_schedule_plan)
        weigh = partial(
            weighted_token_loss,
            reference_logprobs=-reference_losses,
            segment_ids=documents,
            epsilon=self.epsilon,
            scale=self.scale,
            context_parallel_group=groups.cp,
        )
        return output, partial(_weighted_loss, own_loss, weigh)

    def _require_architecture(self, config) -> None:
        """Compare what the reference says of itself with the trained model's configuration."""
        if self.is_hugging_face:
            found = vars(AutoBridge.from_hf_pretrained(self.reference).to_megatron_provider(load_weights=False))
        else:
            path = get_checkpoint_run_config_filename(str(self.reference))
            # Megatron-LM writes none; its checkpoint is then refused by name or shape, when it is loaded.
            found = read_run_config(path)["model"] if Path(path).is_file() else {}
        for name in ARCHITECTURE:
            wanted, got = getattr(config, name), found.get(name)
            if got is not None and got != wanted:
                raise UserError(
                    f"the reference {self.reference} has {name}={got} and the trained model {wanted}: ReMiT compares "
                    "two models of one architecture"
                )

    def _load(self, config, model: MegatronModule) -> MegatronModule:
        """Build the reference like the trained model and read its weights; collective over all ranks."""
        config = copy.copy(config)
        for name in OF_THE_RUN:
            setattr(config, name, None)
        config._pre_wrap_hooks, config._post_wrap_hooks = [], []  # adapters, or the trained model's first weights
        config.perform_initialization = False
        config.init_model_with_meta_device = False
        config.cuda_graph_impl = "none"
        devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
        # Building draws random numbers; a run must be the same whether it was resumed after this step or not.
        with torch.random.fork_rng(devices):
            built = config.provide_distributed_model(
                wrap_with_ddp=False,
                use_cpu_initialization=config.use_cpu_initialization,
                pg_collection=get_pg_collection(model),
            )
        if self.is_hugging_face:
            AutoBridge.from_hf_pretrained(self.reference).load_hf_weights(built)
        else:
            # The public loaders build the model too, from the checkpoint's own configuration and layout.
            _load_model_weights_from_checkpoint(str(self.reference), built)
        (reference,) = built
        return reference.eval().requires_grad_(False)


def _find_reference(path: Path) -> tuple[Path, bool]:
    """The folder to load from, and whether it is Hugging Face's. Raises UserError when it is neither kind."""
    if (path / "config.json").is_file():
        return path, True
    tracker = path / "latest_checkpointed_iteration.txt"
    if tracker.is_file():
        latest = tracker.read_text().strip()
        path = path / (f"iter_{int(latest):07d}" if latest.isdigit() else latest)
    if (path / "metadata.json").is_file():
        return path, False
    raise UserError(
        f"reference={path} is no checkpoint: give a Megatron-Bridge or Megatron-LM torch_dist checkpoint, or a Hugging "
        "Face folder with a config.json"
    )


def _documents(batch: dict, cfg: ConfigContainer, groups) -> Tensor | None:
    """``[batch, sequence]`` document numbers within each row, this rank's part; None without position ids."""
    positions = batch.get("position_ids")
    if positions is None:
        return None
    numbered = {**batch, "labels": (positions == 0).cumsum(-1)}
    # Bridge's own split for context parallelism, which differs for packed sequences.
    return get_batch(iter([numbered]), cfg, pg_collection=groups)[1]


def _weighted_loss(own_loss: partial, weigh: partial, token_losses: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """(Σ w·nll over the mask, the mask's token count, metrics).

    own_loss: ``masked_next_token_loss`` with the loss mask bound. It counts the tokens, reports the unweighted loss and
        checks it for NaN and spikes.
    weigh: what makes a LossOutput of ``[batch, sequence]`` token losses and the mask.
    """
    (mask,) = own_loss.args
    _, num_tokens, metrics = own_loss(token_losses.detach())
    output = weigh(token_losses=token_losses, loss_mask=mask)
    metrics.update({name: torch.stack(output.metrics[key]) for name, key in LOGGED.items()})
    return output.loss_sum, num_tokens, metrics
