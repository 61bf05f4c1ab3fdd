"""The whole: everything one flywheel depends on, and the checks across sections."""

from __future__ import annotations

from typing import Literal

from pydantic import NonNegativeInt, PositiveInt, model_validator

from nemo_rmt.config.data import Data, Tokenizer
from nemo_rmt.config.layout import Cluster, Model, Parallel
from nemo_rmt.config.rmt import RMT
from nemo_rmt.config.rollout import Rollout
from nemo_rmt.config.section import Section
from nemo_rmt.config.stages import EARLIER_MODELS, RL, SFT, Anneal, Evaluate, Pretrain, Stage


class Flywheel(Section):
    """How iterations are chained."""

    start_from: Literal["stable", "previous"] = "stable"
    """Each iteration anneals the pre-training checkpoint afresh, or continues from the last base."""
    ends_with: Literal["anneal", "rmt", "sft", "rl"] = "rl"
    """What the last iteration ends with; earlier ones have every stage, for the next one's reference."""
    keep_checkpoints: PositiveInt = 1
    """Complete checkpoints kept per stage."""
    async_save: bool = False
    """Write checkpoints in the background (pays on clusters, not for small models)."""
    restarts: NonNegativeInt = 0
    """Times in a row that a stage whose ranks died, hung or crashed is started again from its last checkpoint without
    having saved a new one. Needs no one to watch; the large recipes have 3."""


class Tracking(Section):
    """Where metrics go besides metrics.jsonl."""

    tensorboard: bool = True
    """Write TensorBoard event files."""
    wandb_project: str | None = None
    """Weights & Biases project (needs the extra nemo-rmt[wandb]; WANDB_MODE=offline works)."""
    log_interval: PositiveInt = 10
    """Steps between lines on a terminal that is not interactive; metrics.jsonl has every step."""
    samples: bool = False
    """Write to samples.jsonl what every step was made of; for skipped steps skipped.jsonl has it anyway."""
    profile: bool = False
    """Write to profile/ of every stage where its time goes, by part, and a trace of a few steps (what --profile sets).
    Slower on GPUs, which have to finish each part before the next is timed."""


class Recipe(Section):
    """Everything one flywheel depends on."""

    name: str = "custom"
    """Recipe name, for people."""
    run_dir: str = "runs/custom"
    """Folder of the run; safe to copy away."""
    seed: NonNegativeInt = 1234
    """Seed of initial weights, data order and sampling."""
    iterations: PositiveInt = 2
    """Turns of the flywheel."""
    flywheel: Flywheel = Flywheel()
    """How iterations are chained."""
    model: Model = Model()
    """Architecture."""
    parallel: Parallel = Parallel()
    """Layout."""
    cluster: Cluster = Cluster()
    """Machines."""
    tokenizer: Tokenizer = Tokenizer()
    """Tokenizer."""
    data: Data = Data()
    """Corpora and tasks."""
    pretrain: Pretrain = Pretrain()
    """Pre-training."""
    anneal: Anneal = Anneal()
    """Annealing."""
    rmt: RMT = RMT()
    """Reinforcement mid-training."""
    sft: SFT = SFT()
    """Supervised fine-tuning."""
    rl: RL = RL()
    """Reinforcement learning."""
    rollout: Rollout = Rollout()
    """Sampling in training."""
    evaluate: Evaluate = Evaluate()
    """Evaluation."""
    tracking: Tracking = Tracking()
    """Metrics."""

    @property
    def data_parallel(self) -> int:
        """Data-parallel size: the world size over tensor × pipeline × context."""
        p = self.parallel
        return self.cluster.nodes * self.cluster.gpus_per_node // (p.tensor * p.pipeline * p.context)

    @property
    def stages(self) -> list[str]:
        """The training stages this recipe runs, in order."""
        first = ["pretrain"] if self.pretrain.checkpoint is None else []
        return first + [name for name in ("anneal", "rmt", "sft", "rl") if getattr(self, name).enabled]

    @model_validator(mode="after")
    def _layout(self) -> Recipe:
        p, m = self.parallel, self.model
        world, per_model = self.cluster.nodes * self.cluster.gpus_per_node, p.tensor * p.pipeline * p.context
        if world % per_model:
            raise ValueError(
                f"cluster.nodes × cluster.gpus_per_node = {world} processes is not a multiple of parallel.tensor × "
                f"pipeline × context = {per_model}"
            )
        for key in ("num_attention_heads", "num_query_groups", "ffn_hidden_size", "hidden_size"):
            if getattr(m, key) % p.tensor:
                raise ValueError(
                    f"parallel.tensor={p.tensor} does not divide model.{key}={getattr(m, key)}: "
                    f"choose a tensor-parallel size that does"
                )
        chunks = p.pipeline * (p.virtual_pipeline or 1)
        if m.num_layers % chunks:
            raise ValueError(
                f"model.num_layers={m.num_layers} is not a multiple of parallel.pipeline × virtual_pipeline={chunks}"
            )
        for name in self.stages:
            if name != "rmt":
                self._batch(name, getattr(self, name))
        if self.rmt.enabled:
            self._reasoning()
        if self.rollout.engine == "vllm":
            self._vllm(world)
        if m.fp8 is not None:
            self._fp8()
        return self

    @model_validator(mode="after")
    def _chain(self) -> Recipe:
        if self.stages in ([], ["pretrain"]):
            raise ValueError("anneal, rmt, sft and rl are all disabled: enable at least one of them")
        guide = self.anneal.guide if self.anneal.enabled and self.iterations > 1 else None
        if guide is not None and isinstance(guide.reference, str) and guide.reference in EARLIER_MODELS:
            stage = EARLIER_MODELS[guide.reference]
            if not getattr(self, stage).enabled:
                raise ValueError(
                    f"{self.anneal.guide_key}.reference={guide.reference} takes the {stage.upper()} model of the "
                    f"iteration before, and {stage}.enabled=false: name a checkpoint folder, or set "
                    "anneal.objective=uniform"
                )
        return self

    def _reasoning(self) -> None:
        """Refuse RMT settings that do not go with the rest."""
        rmt, names = self.rmt, [corpus.name for corpus in self.data.corpora]
        longest = rmt.longest_document + rmt.thought_limit + rmt.reward.prediction_tokens + 2
        if longest > self.model.max_position:
            raise ValueError(
                f"rmt: a document of {rmt.longest_document} tokens and a response of up to 2 × rmt.budget.initial = "
                f"{rmt.thought_limit} exceed model.max_position={self.model.max_position}: lower rmt.document_length, "
                "rmt.sequence_length or rmt.budget.initial, or set rmt.enabled=false"
            )
        for name in rmt.corpora:
            if name not in names:
                raise ValueError(
                    f"rmt.corpora: {name!r} is no entry of data.corpora ({', '.join(names) or 'none'}): name one of "
                    "those, or set rmt.corpora=[] for all of them"
                )

    def _vllm(self, world: int) -> None:
        """Refuse a vLLM that does not go with the model and the machines."""
        vllm = self.rollout.vllm
        if self.model.num_attention_heads % vllm.tensor:
            raise ValueError(
                f"rollout.vllm.tensor={vllm.tensor} does not divide model.num_attention_heads="
                f"{self.model.num_attention_heads}: choose one that does"
            )
        if vllm.placement == "colocated" and world % vllm.tensor:
            raise ValueError(
                f"rollout.vllm.tensor={vllm.tensor} does not divide cluster.nodes × cluster.gpus_per_node = {world}: "
                "replicas are made of whole ranks"
            )
        for key in ("request_timeout_s", "start_timeout_s"):
            if getattr(vllm, key) >= self.cluster.hang_timeout_s:
                raise ValueError(
                    f"rollout.vllm.{key}={getattr(vllm, key)} is not less than cluster.hang_timeout_s="
                    f"{self.cluster.hang_timeout_s}: the stage would count as hung first"
                )

    def _fp8(self) -> None:
        """Refuse sizes that FP8 matrix products do not take: every dimension is a multiple of 16."""
        m, tensor = self.model, self.parallel.tensor
        for key in ("hidden_size", "ffn_hidden_size"):
            if getattr(m, key) // tensor % 16:
                raise ValueError(
                    f"model.fp8={m.fp8}: model.{key}={getattr(m, key)} over parallel.tensor={tensor} is not a multiple "
                    "of 16: choose another parallel.tensor, or model.fp8=null"
                )
        if max(m.fp8_bf16_layers) > m.num_layers // self.parallel.pipeline:
            raise ValueError(
                f"model.fp8_bf16_layers={m.fp8_bf16_layers}: those at an end must be in one pipeline stage, which has "
                f"{m.num_layers // self.parallel.pipeline} layers: lower them or parallel.pipeline"
            )
        rows = {name: getattr(self, name) for name in (*self.stages, "evaluate")}
        for name, stage in rows.items():
            if stage.micro_batch_size * stage.sequence_length // (tensor if self.parallel.sequence else 1) % 16:
                raise ValueError(
                    f"model.fp8={m.fp8}: the {stage.micro_batch_size} × {stage.sequence_length} tokens of one forward "
                    f"of {name} on one rank are not a multiple of 16: change {name}.sequence_length"
                )

    def _batch(self, name: str, stage: Stage) -> None:
        """Refuse batch arithmetic that does not work out for one stage."""
        p, step = self.parallel, stage.micro_batch_size * self.data_parallel
        if stage.global_batch_size % step:
            raise ValueError(
                f"{name}.global_batch_size={stage.global_batch_size} is not a multiple of {name}.micro_batch_size × "
                f"data-parallel size = {stage.micro_batch_size} × {self.data_parallel}"
            )
        if p.virtual_pipeline and (stage.global_batch_size // step) % p.pipeline:
            raise ValueError(
                f"{name}: with parallel.virtual_pipeline the number of micro-batches "
                f"({stage.global_batch_size // step}) must be a multiple of parallel.pipeline={p.pipeline}"
            )
        if stage.sequence_length % p.tensor and p.sequence:
            raise ValueError(
                f"{name}.sequence_length={stage.sequence_length} is not a multiple of parallel.tensor={p.tensor}"
            )
        if stage.sequence_length > self.model.max_position:
            raise ValueError(
                f"{name}.sequence_length={stage.sequence_length} exceeds model.max_position={self.model.max_position}"
            )
        if isinstance(stage, RL) and (stage.global_batch_size // stage.grpo.samples_per_group) % self.data_parallel:
            raise ValueError(
                f"{name}: the number of groups must be a multiple of the data-parallel size {self.data_parallel}"
            )
