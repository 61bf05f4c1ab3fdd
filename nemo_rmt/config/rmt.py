"""RMT's settings: reinforcement mid-training on unlabelled text (arXiv 2509.24375)."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from nemo_rmt.config.section import Section
from nemo_rmt.config.stages import GRPO, Stage

INSTRUCTION_ROOM = 64
"""Tokens left for the instruction where the length of documents follows from that of rows."""
TIERS = ("easy", "medium", "hard")
"""Names of the difficulty tiers, in the order of their numbers."""


class Budget(Section):
    """RMT's dynamic token budget: B_t = max(minimum, initial · decay^(step / steps)), see objectives.token_budget."""

    schedule: Literal["decay", "none"] = "decay"
    """decay: B_t falls over the stage and is asked for and rewarded; none: neither, and a thought may take up to
    2 × initial tokens throughout (RPT, and RMT without its budget)."""
    initial: PositiveInt = 800
    """B_0, tokens inside <think></think>; 800 is the paper's."""
    minimum: PositiveInt = 1
    """B_min, tokens; 1 is the paper's."""
    decay: float = Field(0.2, gt=0, lt=1)
    """γ: what is left of the budget at the end of the stage; 0.2 is the paper's."""

    @model_validator(mode="after")
    def _minimum(self) -> Budget:
        if self.minimum > self.initial:
            raise ValueError(f"initial {self.initial} is under minimum {self.minimum}: raise initial or lower minimum")
        return self


class Difficulty(Section):
    """How hard each token is: the entropy of a scoring model at its position, cut into easy, medium and hard."""

    scorer: str = "start"
    """start: the checkpoint the stage starts from; or a checkpoint folder."""
    scores: str | None = None
    """Folder of scores an earlier stage wrote (DATA/difficulty/...); null: score the corpora, once."""
    edges: tuple[float, float] | None = (0.5, 1.5)
    """Entropies in nats between the tiers; the paper publishes none, 0.5 and 1.5 are among RPT's. null: quantiles."""
    quantiles: tuple[float, float] | None = None
    """Shares of the tokens below medium and below hard, instead of edges (then set edges=null)."""
    ceiling: PositiveFloat | None = None
    """Tokens at or above this are never asked for: nats with edges, a share of the tokens with quantiles. The very
    highest entropies are mostly text that no reasoning predicts."""
    per_domain: bool = True
    """Quantiles of each corpus by itself; false: of all tokens together."""
    first_position: PositiveInt = 1
    """Tokens of a document before the first that may be asked for."""
    max_tokens: PositiveInt | None = None
    """Tokens to score and draw from, shared by the corpora after their weights; null: all of every corpus."""

    @model_validator(mode="after")
    def _cuts(self) -> Difficulty:
        if (self.edges is None) == (self.quantiles is None):
            raise ValueError("set exactly one of edges and quantiles, and the other to null")
        name, cuts = ("edges", self.edges) if self.quantiles is None else ("quantiles", self.quantiles)
        if not 0 < cuts[0] < cuts[1] or (name == "quantiles" and cuts[1] >= 1):
            within = "above 0" if name == "edges" else "between 0 and 1"
            raise ValueError(f"{name} must be two ascending values {within}, got {cuts}")
        if self.ceiling is not None and (self.ceiling <= cuts[1] or (name == "quantiles" and self.ceiling > 1)):
            raise ValueError(f"ceiling {self.ceiling} must be above the last of {name} {cuts} and of the same unit")
        return self


Probabilities = tuple[NonNegativeFloat, NonNegativeFloat, NonNegativeFloat]


class Curriculum(Section):
    """From which tier the reasoned tokens are drawn, see objectives.tier_probabilities."""

    early: Probabilities = (0.6, 0.3, 0.1)
    """Probabilities of easy, medium and hard before the transition. (The paper publishes none.)"""
    late: Probabilities = (0.1, 0.3, 0.6)
    """And after it; equal to early: no curriculum."""
    transition: tuple[float, float] = (0.3, 0.7)
    """Shares of the stage between which the probabilities move; the paper's."""
    positions_per_document: PositiveInt = 4
    """Most positions asked for in one document of a step: they share its computation."""

    @model_validator(mode="after")
    def _schedule(self) -> Curriculum:
        for name, values in (("early", self.early), ("late", self.late)):
            if abs(sum(values) - 1) > 1e-5:
                raise ValueError(f"{name} must sum to 1, got {values}, which sums to {sum(values):g}")
        if not 0 <= self.transition[0] < self.transition[1] <= 1:
            raise ValueError(f"transition must be two ascending shares in [0, 1], got {self.transition}")
        return self


class Prompt(Section):
    """What follows the document's prefix before the model thinks."""

    instruction: str = "\nPlease use exactly {budget} tokens within <think></think>\n"
    """{budget} is the step's budget; the wording is the paper's. Required exactly when there is a budget."""
    open_think: bool = True
    """End the prompt with <think>; false: the model has to open its thought itself."""

    @model_validator(mode="after")
    def _something(self) -> Prompt:
        if not self.instruction and not self.open_think:
            raise ValueError("an empty instruction needs open_think=true: nothing would precede the response")
        return self


class Reward(Section):
    """The reward of a response, see objectives.combined_reward."""

    match: Literal["token", "prefix"] = "token"
    """token: the token after </think> is the corpus's. prefix: the bytes of all tokens after </think> are a prefix of
    the corpus's continuation that ends where one of its tokens does (RPT)."""
    prediction_tokens: PositiveInt = 1
    """Most tokens of a prediction; token takes 1."""
    length_weight: float = Field(0.1, ge=0, le=1)
    """Share of the length reward; 0 without a budget. The paper publishes none."""

    @model_validator(mode="after")
    def _one_token(self) -> Reward:
        if self.match == "token" and self.prediction_tokens != 1:
            raise ValueError(f"match token takes prediction_tokens=1, got {self.prediction_tokens}: use match=prefix")
        return self


class RMT(Stage):
    """Reinforcement mid-training (arXiv 2509.24375). global_batch_size counts positions, each one group of responses;
    sequence_length bounds a packed row: documents and the responses that branch off them."""

    sequence_length: PositiveInt = 4096
    """Tokens of a packed row."""
    enabled: bool = True
    """Whether the flywheel has this stage."""
    objective: Literal["rmt", "ntp"] = "rmt"
    """ntp: next-token prediction alone on the same documents, nothing sampled (the baseline)."""
    corpora: list[str] = []
    """Names of the corpora to reason about; empty: all."""
    document_length: PositiveInt | None = None
    """Longest document in tokens; null: what sequence_length leaves beside one response at the initial budget and 64
    tokens of instruction."""
    long_documents: Literal["refuse", "split"] = "refuse"
    """Longer documents are an error, or are cut into pieces."""
    ntp_coefficient: NonNegativeFloat = 0.1
    """λ, the weight of next-token prediction; 0.1 is the paper's, 0 is reinforcement alone."""
    resample_rounds: NonNegativeInt = 0
    """Rounds in which groups without variance are replaced by new positions (DAPO's dynamic sampling)."""
    budget: Budget = Budget()
    """How long to think."""
    difficulty: Difficulty = Difficulty()
    """How hard each token is."""
    curriculum: Curriculum = Curriculum()
    """Which tokens to ask for."""
    prompt: Prompt = Prompt()
    """How to ask."""
    reward: Reward = Reward()
    """What is rewarded."""
    grpo: GRPO = GRPO()
    """The objective of the sampled tokens."""

    @property
    def thought_limit(self) -> int:
        """Tokens a thought may take at the initial budget: where its length reward is 0."""
        return 2 * self.budget.initial

    @property
    def longest_document(self) -> int:
        """document_length, or what a row has room for beside one response."""
        if self.document_length is not None:
            return self.document_length
        return self.sequence_length - INSTRUCTION_ROOM - self.thought_limit - self.reward.prediction_tokens - 2

    @model_validator(mode="after")
    def _combinations(self) -> RMT:
        asks, budgeted = "{budget}" in self.prompt.instruction, self.budget.schedule != "none"
        if asks and not budgeted:
            raise ValueError("prompt.instruction mentions {budget}, but budget.schedule=none: take {budget} out of it")
        if budgeted and not asks:
            raise ValueError("prompt.instruction must contain {budget}, or set budget.schedule=none")
        if self.resample_rounds and not self.grpo.drop_zero_variance:
            raise ValueError("resample_rounds replaces groups without variance: set grpo.drop_zero_variance=true")
        if not budgeted and self.reward.length_weight:
            raise ValueError("budget.schedule=none has no length to reward: set reward.length_weight=0")
        if self.enabled and self.longest_document < 2:
            raise ValueError(
                f"sequence_length {self.sequence_length} has no room for a document beside one response of up to "
                f"2 × budget.initial = {self.thought_limit} tokens: raise sequence_length, lower budget.initial, or "
                "set rmt.enabled=false"
            )
        return self
