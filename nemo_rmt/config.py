"""The typed recipe: every value a run depends on, with its default, unit and meaning.

The docstring under a key is what ``nemo-rmt recipes show`` prints beside it. Combinations that
cannot work are refused when the recipe is built, long before a process starts. Reading YAML and
``key=value`` overrides is in ``nemo_rmt.recipe_io``.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt
from pydantic import model_validator


class Section(BaseModel):
    """A group of keys. Unknown keys are refused."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True, validate_assignment=True)


class Model(Section):
    """A dense decoder: RMSNorm, SwiGLU, rotary positions, grouped-query attention, no linear biases."""

    num_layers: PositiveInt = 4
    """Transformer layers."""
    hidden_size: PositiveInt = 128
    """Width of the residual stream."""
    num_attention_heads: PositiveInt = 4
    """Query heads."""
    num_query_groups: PositiveInt = 2
    """Key/value heads; equal to num_attention_heads for plain multi-head attention."""
    head_dim: PositiveInt | None = None
    """Size of one head; null: hidden_size / num_attention_heads."""
    ffn_hidden_size: PositiveInt = 384
    """Inner width of the SwiGLU feed-forward layer."""
    qk_norm: bool = False
    """RMSNorm on queries and keys, per head (Qwen3)."""
    qkv_bias: bool = False
    """Bias on the query, key and value projections (Qwen2)."""
    tie_embeddings: bool = True
    """Use the input embedding as the output projection."""
    rope_base: PositiveFloat = 10000.0
    """Base of the rotary frequencies."""
    norm_epsilon: PositiveFloat = 1e-6
    """Epsilon of the RMS norms."""
    init_std: PositiveFloat = 0.02
    """Standard deviation of the initial weights."""
    max_position: PositiveInt = 4096
    """Longest sequence the model may see, in tokens."""
    layers: Literal["local", "transformer_engine"] = "local"
    """Linear and norm layers: Megatron's own, or Transformer Engine's (needs a GPU)."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Parameters and activations; gradients are reduced and optimizer states kept in fp32."""
    logprob_chunk: PositiveInt | None = None
    """Tokens whose logits the log-probability head holds at once; null: as many as make 128 MiB."""

    @model_validator(mode="after")
    def _heads(self) -> "Model":
        if self.head_dim is None and self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size {self.hidden_size} is not divisible by num_attention_heads "
                f"{self.num_attention_heads}: change one of them or set head_dim"
            )
        if self.num_attention_heads % self.num_query_groups:
            raise ValueError(
                f"num_attention_heads {self.num_attention_heads} is not divisible by "
                f"num_query_groups {self.num_query_groups}"
            )
        if (self.head_dim or self.hidden_size // self.num_attention_heads) % 8:
            raise ValueError("the head size must be a multiple of 8 for rotary positions")
        return self


class Parallel(Section):
    """How one model is laid out over processes; what remains of the world size is data-parallel."""

    tensor: PositiveInt = 1
    """Tensor-parallel size."""
    pipeline: PositiveInt = 1
    """Pipeline-parallel size."""
    virtual_pipeline: PositiveInt | None = None
    """Model chunks per pipeline rank (interleaved schedule)."""
    context: PositiveInt = 1
    """Context-parallel size."""
    sequence: bool = False
    """Sequence parallelism; needs tensor > 1."""
    distributed_optimizer: bool = True
    """Shard optimizer states over data-parallel ranks."""
    overlap: bool = False
    """Overlap gradient reduction and parameter gathering with compute (GPU clusters)."""
    recompute: Literal["none", "full"] = "none"
    """Recompute activations in backward: full recomputes every layer."""

    @model_validator(mode="after")
    def _combinations(self) -> "Parallel":
        if self.context > 1:
            raise ValueError("context-parallel attention is not supported yet: set parallel.context=1")
        if self.sequence and self.tensor == 1:
            raise ValueError("sequence needs tensor > 1: set parallel.sequence=false or parallel.tensor=2")
        if self.virtual_pipeline and self.pipeline == 1:
            raise ValueError("virtual_pipeline needs pipeline > 1")
        return self


class Cluster(Section):
    """Where the stages run."""

    nodes: PositiveInt = 1
    """Machines."""
    gpus_per_node: PositiveInt = 1
    """Processes started on each machine: one per GPU, or CPU processes where there is no GPU."""
    gpu_memory_gib: PositiveFloat = 80.0
    """Memory of one GPU in GiB, for the pre-flight's estimate."""
    threads: PositiveInt | None = None
    """CPU threads per process; null: cores divided by processes."""


class Tokenizer(Section):
    """A tokenizer folder, or one trained on the run's own training corpora."""

    path: str | None = None
    """Folder with tokenizer.json (Hugging Face); null: train a byte-level BPE."""
    vocab_size: PositiveInt = 512
    """Size of the trained vocabulary, special tokens included."""
    training_characters: PositiveInt = 4_000_000
    """Characters of the training corpora read to train it."""
    chat_template: str | None = (
        "{% for message in messages %}{% if message.role == 'user' %}Q:{{ message.content }}\nA:"
        "{% else %}{{ message.content }}{{ eos_token }}{% endif %}{% endfor %}"
    )
    """Jinja template of a conversation; null: the one in the tokenizer's folder."""


class Corpus(Section):
    """One domain of the training mix."""

    name: str = Field(pattern=r"^[a-z][a-z0-9_]*$")
    """Domain name, as it appears in metrics (lm/<name>/nll)."""
    kind: Literal["jsonl", "folder", "stdlib", "chains", "solutions"]
    """jsonl: {"text": ...} lines; folder: text or code files; stdlib: this Python's own sources;
    chains: documents about modular-arithmetic chains; solutions: worked problems of a task."""
    path: str | None = None
    """File or folder, for jsonl and folder."""
    weight: NonNegativeFloat = 1.0
    """Share of the training tokens, relative to the other corpora."""
    num_documents: PositiveInt | None = None
    """Documents to generate (chains, solutions), or an upper bound on those read."""
    held_out: float = Field(0.02, gt=0, lt=0.5)
    """Fraction of documents kept for evaluation, chosen by a hash of their text."""
    options: dict[str, Any] = {}
    """Settings of the generator: see the corpus kind's docstring in nemo_rmt.data."""

    @model_validator(mode="after")
    def _path(self) -> "Corpus":
        if self.kind in ("jsonl", "folder") and self.path is None:
            raise ValueError(f"path is required for kind {self.kind}")
        return self


class Task(Section):
    """A family of problems with a verifier, for RL and evaluation."""

    name: str = Field(pattern=r"^[a-z][a-z0-9_]*$")
    """Name in metrics (tasks/<name>/pass@1)."""
    family: str = "chains"
    """chains, or reasoning_gym:<dataset> (needs the extra nemo-rmt[reasoning])."""
    options: dict[str, Any] = {}
    """Settings of the problems trained on and held out."""
    longer: dict[str, Any] | None = None
    """Settings of problems harder than any trained on; evaluated only."""


class Data(Section):
    """The training mix and the tasks."""

    corpora: list[Corpus] = []
    """Domains of pre-training and annealing."""
    tasks: list[Task] = []
    """Problem families with verifiers."""
    sft_path: str | None = None
    """JSONL of {"messages": [...]} for SFT; null: solved problems of the tasks."""
    sft_options: dict[str, Any] = {}
    """Settings of the generated SFT solutions, when sft_path is null."""
    document_attention: bool = True
    """Tokens attend within their own document only, where documents share a row."""

    @model_validator(mode="after")
    def _names(self) -> "Data":
        for kind, entries in (("corpora", self.corpora), ("tasks", self.tasks)):
            names = [entry.name for entry in entries]
            if len(set(names)) != len(names):
                raise ValueError(f"{kind} must have distinct names, got {names}")
        if self.corpora and not sum(corpus.weight for corpus in self.corpora):
            raise ValueError("at least one corpus must have a weight above 0")
        return self


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


class ReMiT(Section):
    """Token weights from the gap between an RL-tuned reference and the model (arXiv 2602.03075)."""

    epsilon: float = Field(0.2, gt=0, le=1)
    """Weights stay in [1 - epsilon, 1 + epsilon]; 0.2 is the paper's."""
    scale: PositiveFloat = 1.0
    """Factor on the centred gap before the sigmoid; 1 is the paper's."""
    gap_model: Literal["current", "frozen"] = "current"
    """The gap is against the model in training, or against the stage's frozen starting point."""
    reference: str | None = "previous"
    """previous: the RL model of the iteration before; or a checkpoint folder."""


class Anneal(Stage):
    """Decay to zero, uniformly or with ReMiT's weights."""

    objective: Literal["uniform", "remit"] = "remit"
    """Loss. Iteration 0 is uniform unless remit.reference is a checkpoint."""
    remit: ReMiT = ReMiT()
    """ReMiT's settings."""

    @model_validator(mode="after")
    def _reference(self) -> "Anneal":
        if self.objective == "remit" and not self.remit.reference:
            raise ValueError(
                "objective remit needs remit.reference: 'previous' (the iteration before) or a checkpoint "
                "folder; or set anneal.objective=uniform"
            )
        return self


class SFT(Stage):
    """Supervised fine-tuning; loss on the assistant's tokens."""


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

    grpo: GRPO = GRPO()
    """The objective."""

    @model_validator(mode="after")
    def _groups(self) -> "RL":
        if self.global_batch_size % self.grpo.samples_per_group:
            raise ValueError(
                f"global_batch_size {self.global_batch_size} must be a multiple of "
                f"grpo.samples_per_group {self.grpo.samples_per_group}: it counts responses, in whole groups"
            )
        return self


class Rollout(Section):
    """How responses are sampled in training."""

    engine: Literal["megatron"] = "megatron"
    """megatron: in the training processes, from the live weights."""
    temperature: PositiveFloat = 1.0
    """Sampling temperature; the trainer's log-probabilities use the same."""
    top_p: float = Field(1.0, gt=0, le=1)
    """Nucleus; below 1 the sampled distribution is no longer the policy's."""
    max_new_tokens: PositiveInt = 64
    """Longest response, in tokens."""
    batch_size: PositiveInt = 256
    """Sequences sampled at once on one data-parallel rank."""


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
    tier_edges: tuple[float, float] = (0.5, 1.5)
    """Entropy edges in nats between easy, medium and hard tokens."""

    @model_validator(mode="after")
    def _edges(self) -> "Evaluate":
        if not 0 < self.tier_edges[0] < self.tier_edges[1]:
            raise ValueError(f"tier_edges must be ascending and above 0, got {self.tier_edges}")
        return self


class Flywheel(Section):
    """How iterations are chained."""

    start_from: Literal["stable", "previous"] = "stable"
    """Each iteration anneals the pre-training checkpoint afresh, or continues from the last base."""
    keep_checkpoints: PositiveInt = 1
    """Complete checkpoints kept per stage."""
    async_save: bool = False
    """Write checkpoints in the background (pays on clusters, not for small models)."""


class Tracking(Section):
    """Where metrics go besides metrics.jsonl."""

    tensorboard: bool = True
    """Write TensorBoard event files."""
    wandb_project: str | None = None
    """Weights & Biases project (needs the extra nemo-rmt[wandb]; WANDB_MODE=offline works)."""
    log_interval: PositiveInt = 10
    """Steps between lines on a terminal that is not interactive; metrics.jsonl has every step."""


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

    @model_validator(mode="after")
    def _layout(self) -> "Recipe":
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
            raise ValueError(f"model.num_layers={m.num_layers} is not a multiple of parallel.pipeline × virtual_pipeline={chunks}")
        for name in ("pretrain", "anneal", "sft", "rl"):
            self._batch(name, getattr(self, name))
        return self

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
            raise ValueError(f"{name}.sequence_length={stage.sequence_length} is not a multiple of parallel.tensor={p.tensor}")
        if stage.sequence_length > self.model.max_position:
            raise ValueError(f"{name}.sequence_length={stage.sequence_length} exceeds model.max_position={self.model.max_position}")
        if isinstance(stage, RL) and (stage.global_batch_size // stage.grpo.samples_per_group) % self.data_parallel:
            raise ValueError(f"{name}: the number of groups must be a multiple of the data-parallel size {self.data_parallel}")
