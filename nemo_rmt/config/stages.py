"""The stages, their objectives and their sampling."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from nemo_rmt.config.evaluation import LMEval
from nemo_rmt.config.section import Section


class Optim(Section):
    """Adam and its learning-rate schedule."""

    lr: PositiveFloat = 3e-3
    """Peak learning rate."""
    min_lr: NonNegativeFloat = 0.0
    """Learning rate at the end of a decay."""
    schedule: Literal["constant", "linear", "cosine", "one_minus_sqrt"] = "constant"
    """After warm-up: stay (the stable phase), or decay to min_lr at the stage's last step."""
    warmup_steps: NonNegativeInt = 0
    """Steps of linear warm-up from 0."""
    weight_decay: NonNegativeFloat = 0.0
    """Decoupled weight decay."""
    clip_grad: NonNegativeFloat = 1.0
    """Clip the global gradient norm to this; 0: off."""
    beta1: float = Field(0.9, ge=0, lt=1)
    """Adam's first decay rate."""
    beta2: float = Field(0.95, ge=0, lt=1)
    """Adam's second decay rate."""
    epsilon: PositiveFloat = 1e-8
    """Adam's epsilon."""
    skip_spikes: PositiveFloat | None = None
    """Skip steps whose loss or gradient norm is this many standard deviations above the mean of the last 128 steps; 6
    is OLMo-core's. null: skip only what is not finite. Small batches have such steps all the time, and need them."""
    max_skipped: PositiveInt = 5
    """Stop the stage after this many skipped steps in a row."""

    @model_validator(mode="after")
    def _decay(self) -> Optim:
        if self.min_lr > self.lr:
            raise ValueError(f"min_lr {self.min_lr} is above lr {self.lr}: lower min_lr")
        return self


class Stage(Section):
    """What every stage has."""

    steps: PositiveInt = 100
    """Optimizer steps."""
    micro_batch_size: PositiveInt = 8
    """Sequences per forward of one data-parallel rank."""
    global_batch_size: PositiveInt = 8
    """Sequences per optimizer step over all ranks."""
    sequence_length: PositiveInt = 128
    """Tokens per row; in RL the limit of prompt plus response."""
    optim: Optim = Optim()
    """Optimizer and schedule."""
    checkpoint_interval: PositiveInt = 100
    """Steps between checkpoints; the last step is always saved."""


class Pretrain(Stage):
    """Next-token prediction at a stable learning rate."""

    checkpoint: str | None = None
    """Start the flywheel from this checkpoint instead of pre-training."""


class CachedReference(Section):
    """The RL model's log-probabilities, computed before by ``nemo-rmt data score``: no reference model is loaded."""

    cache: str
    """Folder that data score wrote."""
    checkpoint: str | None = None
    """Refuse a cache of another model than this checkpoint; null: take the cache's word for what it is of."""


EARLIER_MODELS = {"previous": "rl", "previous_sft": "sft"}
"""Words for a reference from the iteration before, and the stage that made it."""


class Guided(Section):
    """What every objective has that a second model guides."""

    reference: str | CachedReference | None = "previous"
    """previous: the RL model of the iteration before; previous_sft: its SFT model; a checkpoint; or {cache: FOLDER},
    made by nemo-rmt data score."""
    offload: bool = False
    """Keep frozen models in host memory while the policy trains: their GPU memory for the time of two copies a step."""


class ReMiT(Guided):
    """Token weights from the gap between an RL-tuned reference and the model (arXiv 2602.03075)."""

    epsilon: float = Field(0.2, gt=0, le=1)
    """Weights stay in [1 - epsilon, 1 + epsilon]; 0.2 is the paper's."""
    scale: PositiveFloat = 1.0
    """Factor on the centred gap before the sigmoid; 1 is the paper's."""
    centring: Literal["document", "row", "none"] = "document"
    """Over what the mean is taken that the gap is centred by: each document (without data.document_attention the whole
    row), the row, or nothing. The paper centres within the sequence."""
    gap_model: Literal["current", "frozen"] = "current"
    """The gap is against the model in training, or against the stage's frozen starting point."""


class Rho1(Guided):
    """Training on the tokens with the largest excess loss over the reference alone (arXiv 2404.07965)."""

    keep: float = Field(0.6, gt=0, le=1)
    """Share of each row's tokens that are trained on; 0.6 is what the paper chose for its 1B model."""


class Distill(Guided):
    """The reference's whole distribution as the target: of its cached likeliest tokens, or exactly."""

    coefficient: float = Field(1.0, gt=0, le=1)
    """Share of the KL divergence in the loss; next-token prediction has the rest."""


class Anneal(Stage):
    """Decay to zero, uniformly or guided by a reference."""

    enabled: bool = True
    """Whether the flywheel has this stage."""
    resume_optimizer: bool = True
    """Go on with the checkpoint's optimizer states; false: begin with fresh ones (imported weights have none)."""
    objective: Literal["uniform", "remit", "rho1", "distill"] = "remit"
    """Loss. Iteration 0 is uniform unless the objective's reference is a checkpoint or a cache."""
    remit: ReMiT = ReMiT()
    """ReMiT's settings."""
    rho1: Rho1 = Rho1()
    """Rho-1's settings."""
    distill: Distill = Distill()
    """Distillation's settings."""

    @property
    def guide(self) -> Guided | None:
        """The objective's settings when it has a reference."""
        return None if self.objective == "uniform" else getattr(self, self.objective)

    @property
    def guide_key(self) -> str:
        """What these settings are called in messages."""
        return f"anneal.{self.objective}"

    @model_validator(mode="after")
    def _reference(self) -> Anneal:
        if self.guide is not None and not self.guide.reference:
            raise ValueError(
                f"objective {self.objective} needs {self.objective}.reference: 'previous' (the iteration before), "
                "'previous_sft', a checkpoint folder or {cache: FOLDER}; or set anneal.objective=uniform"
            )
        return self


class SFT(Stage):
    """Supervised fine-tuning; loss on the assistant's tokens. global_batch_size counts conversations."""

    enabled: bool = True
    """Whether the flywheel has this stage."""
    pack: bool = True
    """Several conversations in a row, none of which sees another; micro_batch_size is then the most rows of one. false:
    one conversation in each row, padded to the longest."""


class GRPO(Section):
    """Group-relative policy optimisation (arXiv 2402.03300, 2503.14476, 2503.20783)."""

    samples_per_group: int = Field(8, ge=2)
    """Responses per prompt (G)."""
    clip_low: float = Field(0.2, gt=0, lt=1)
    """Lower clip of the probability ratio: 1 - clip_low."""
    clip_high: PositiveFloat = 0.2
    """Upper clip of the probability ratio: 1 + clip_high."""
    normalize: Literal["token", "sequence"] = "token"
    """Mean over all tokens (DAPO), or over each response first (GRPO)."""
    normalize_std: bool = True
    """Divide advantages by the group's standard deviation; false: Dr. GRPO."""
    kl_coefficient: NonNegativeFloat = 0.0
    """Weight of the k3 KL to the stage's starting model."""
    drop_zero_variance: bool = True
    """Leave groups whose rewards are all equal out of the batch and its token count."""
    updates_per_rollout: PositiveInt = 1
    """Optimizer steps on each batch of rollouts; 1 is strictly on-policy."""


class RL(Stage):
    """GRPO on the tasks' verifier rewards. global_batch_size counts responses."""

    enabled: bool = True
    """Whether the flywheel has this stage."""
    grpo: GRPO = GRPO()
    """The objective."""
    pack: bool = True
    """Responses as branches of their prompt, several prompts in a row: a prompt is computed once for its group, or once
    for each row that the group needs; micro_batch_size is then the most rows of one. false: a prompt with one response
    in each row, padded to the longest."""

    @model_validator(mode="after")
    def _groups(self) -> RL:
        if self.global_batch_size % self.grpo.samples_per_group:
            raise ValueError(
                f"global_batch_size {self.global_batch_size} must be a multiple of "
                f"grpo.samples_per_group {self.grpo.samples_per_group}: it counts responses, in whole groups"
            )
        return self


class Evaluate(Section):
    """Held-out measurements."""

    problems: PositiveInt = 200
    """Held-out problems per task and split."""
    samples: PositiveInt = 4
    """Responses per problem at temperature 1; pass@k up to k = samples."""
    max_tokens: PositiveInt = 65_536
    """Held-out tokens per domain."""
    micro_batch_size: PositiveInt = 16
    """Rows per forward."""
    sequence_length: PositiveInt = 128
    """Tokens per row."""
    positions: NonNegativeInt = 100
    """Held-out tokens of each difficulty tier that are predicted directly and after a thought, where there is RMT."""
    tier_edges: tuple[float, float] = (0.5, 1.5)
    """Entropy edges in nats between easy, medium and hard tokens."""
    along: bool = False
    """Measure the checkpoints that an anneal keeps on its way too (flywheel.keep_checkpoints), as anneal@STEP/NAME."""
    lm_eval: LMEval = LMEval()
    """The final model measured by lm-eval too."""

    @model_validator(mode="after")
    def _edges(self) -> Evaluate:
        if not 0 < self.tier_edges[0] < self.tier_edges[1]:
            raise ValueError(f"tier_edges must be ascending and above 0, got {self.tier_edges}")
        return self
