"""How responses are sampled in training, and by what."""

from __future__ import annotations

import ipaddress
from typing import Literal

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from nemo_rmt.config.section import Section


class VLLM(Section):
    """vLLM as the sampler (the extra nemo-rmt[vllm])."""

    placement: Literal["colocated", "server"] = "colocated"
    """colocated: on the training's own GPUs, asleep while it updates. server: on others, over HTTP."""
    tensor: PositiveInt = 1
    """Tensor-parallel size of one vLLM replica. Colocated replicas are made of neighbouring ranks."""
    data: PositiveInt = 1
    """Replicas of a server that the stage starts; it takes tensor × data GPUs after the training's on the first node.
    Colocated there are as many as ranks allow."""
    gpu_memory_utilization: float = Field(0.4, gt=0, lt=1)
    """Share of a GPU's memory for vLLM; a server that has its GPUs to itself can take 0.9."""
    kv_cache_gib: PositiveFloat | None = None
    """Memory of the KV cache; null: what gpu_memory_utilization leaves, and 1 GiB on a CPU."""
    enforce_eager: bool = False
    """No CUDA graphs and no compiler: slower, but starts at once. Always so on a CPU."""
    url: str | None = None
    """A server that runs already, as http://HOST:PORT, its key in the environment variable VLLM_API_KEY; null: the
    stage starts one and ends it."""
    host: str = "127.0.0.1"
    """Address the started server binds to: loopback, or this node's in the cluster. Whoever reaches it can use it."""
    port: int = Field(0, ge=0, lt=65536)
    """Its port; 0: a free one."""
    restarts: NonNegativeInt = 1
    """Times a started server that died is started again before the stage fails."""
    start_timeout_s: PositiveFloat = 900.0
    """Seconds a server may take until it answers; less than cluster.hang_timeout_s."""
    request_timeout_s: PositiveFloat = 600.0
    """Seconds one response may take; less than cluster.hang_timeout_s."""

    @model_validator(mode="after")
    def _server(self) -> VLLM:
        if self.url is not None:
            if self.placement != "server":
                raise ValueError("url names a server: set placement=server, or url=null")
            if not self.url.startswith(("http://", "https://")):
                raise ValueError(f"url {self.url!r} must begin with http:// or https://")
        if self.placement == "colocated" and self.data != 1:
            raise ValueError(f"data {self.data} is for placement=server: colocated replicas follow from the ranks")
        try:
            address = ipaddress.ip_address(self.host)
        except ValueError:
            return self  # a host name
        if address.is_unspecified:
            raise ValueError(f"host {self.host} would serve every network: give loopback or one address of this node")
        return self


class Rollout(Section):
    """How responses are sampled in training."""

    engine: Literal["megatron", "vllm"] = "megatron"
    """megatron: in the training processes, from the live weights. vllm: by vLLM, which gets the weights after each
    update."""
    temperature: PositiveFloat = 1.0
    """Sampling temperature; the trainer's log-probabilities use the same."""
    top_p: float = Field(1.0, gt=0, le=1)
    """Nucleus; below 1 the sampled distribution is no longer the policy's."""
    max_new_tokens: PositiveInt = 64
    """Longest response, in tokens."""
    batch_size: PositiveInt = 256
    """Sequences sampled at once: on one data-parallel rank, or by one vLLM replica."""
    lag: Literal[0, 1] = 0
    """1: the next step's responses are sampled while this step trains, from weights one step old. Needs a vLLM server,
    which has GPUs of its own."""
    max_weight_lag: NonNegativeInt = 0
    """Steps by which the weights that sampled a response may be older than those trained on it; older ones stop the
    stage. lag=1 needs 1."""
    importance_cap: PositiveFloat | None = 2.0
    """With vLLM: a token's loss is multiplied by min(trainer's probability / sampler's, this), truncated importance
    sampling; null: not corrected. In-process rollouts need none."""
    mismatch_warning: float = Field(1.05, ge=1)
    """Warn above this rollout/token_mult_prob_error: the mean factor between the trainer's and the sampler's
    probability of a token; 1 is none. 1.05 is NeMo RL's."""
    mismatch_limit: float | None = Field(2.0, ge=1)
    """Stop the stage above this; null: never. Twice the probability is no rounding: the weights or the text differ."""
    vllm: VLLM = VLLM()
    """Where vLLM runs."""

    @model_validator(mode="after")
    def _engine(self) -> Rollout:
        if self.engine == "vllm" and self.top_p < 1 and self.temperature != 1:
            raise ValueError(
                f"top_p {self.top_p} with temperature {self.temperature}: vLLM reports log-probabilities before top-p "
                "only at temperature 1: set one of the two to 1, or engine=megatron"
            )
        if self.engine == "vllm" and self.temperature < 0.01:
            raise ValueError(f"temperature {self.temperature}: vLLM takes 0.01 for any that is less: raise it")
        if self.lag and (self.engine != "vllm" or self.vllm.placement != "server"):
            raise ValueError("lag=1 samples while training: set engine=vllm and vllm.placement=server, or lag=0")
        if self.lag > self.max_weight_lag:
            raise ValueError(
                f"lag {self.lag} samples from older weights than max_weight_lag {self.max_weight_lag}: raise it"
            )
        if self.lag and self.importance_cap is None:
            raise ValueError("lag=1 samples from older weights, which importance_cap corrects: set it, 2 is usual")
        if self.mismatch_limit is not None and self.mismatch_limit < self.mismatch_warning:
            raise ValueError(f"mismatch_limit {self.mismatch_limit} is below mismatch_warning {self.mismatch_warning}")
        return self
