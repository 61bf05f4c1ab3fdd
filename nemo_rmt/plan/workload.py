"""What each stage does in one step: rows, passes, sampling. The rest of the plan is computed from these."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace

from nemo_rmt.chain import PlannedStage, plan_chain
from nemo_rmt.config import GRPO, Anneal, Recipe, Stage
from nemo_rmt.config.rmt import INSTRUCTION_ROOM


@dataclass(frozen=True)
class Sampling:
    """Responses of one data-parallel rank in one step."""

    responses: int
    """All of them."""
    rows: int
    """Sampled at once."""
    prompt: int
    """Tokens of a prompt; where documents are shared, of its own part."""
    limit: int
    """Most tokens of a response, at any step of the stage."""
    steps: float
    """Tokens of the longest response of a batch, averaged over the stage."""
    length: float
    """Mean tokens of a response."""
    trunks: int = 0
    """Documents whose keys and values a batch shares, at most."""
    trunk_length: int = 0
    """Their longest."""
    documents: int = 0
    """Documents of a step, each computed once."""


@dataclass(frozen=True)
class Workload:
    """One stage's step."""

    name: str
    stage: str
    steps: int
    times: int
    """How often the chain has this stage."""
    rows: int
    """Of a micro-batch."""
    sequence: int
    """Tokens of a row."""
    micro_batches: int
    """Of one data-parallel rank in an update."""
    tokens: float
    """Trained on in one update, all ranks together."""
    context: float
    """Tokens that a token attends to, on average."""
    updates: int = 1
    """Optimizer updates in a step."""
    frozen: int = 0
    """Models beside the trained one."""
    scored: int = 0
    """Forward passes without a backward, over what one update trains on."""
    entropy: bool = False
    """Whether the log-probability head computes entropies too."""
    sampling: Sampling | None = None


def workloads(recipe: Recipe) -> list[Workload]:
    """Every training stage of the chain, once; an anneal with and without a reference are two."""
    found: Counter[Workload] = Counter()
    for planned in plan_chain(recipe):
        if planned.ref.stage not in ("data", "evaluate"):
            found[_workload(recipe, planned)] += 1
    return [replace(each, times=times) for each, times in found.items()]


def _workload(recipe: Recipe, planned: PlannedStage) -> Workload:
    stage = planned.ref.stage
    if stage == "rmt":
        return _rmt(recipe)
    settings: Stage = getattr(recipe, stage)
    values = dict(
        name=stage,
        stage=stage,
        steps=settings.steps,
        times=1,
        rows=settings.micro_batch_size,
        sequence=settings.sequence_length,
        micro_batches=settings.global_batch_size // (settings.micro_batch_size * recipe.data_parallel),
        tokens=settings.global_batch_size * settings.sequence_length,
        context=settings.sequence_length / 2,
    )
    if isinstance(settings, Anneal) and planned.inputs.keys() & {"reference", "cache"}:
        against_start = settings.objective == "remit" and settings.remit.gap_model == "frozen"
        frozen = int("reference" in planned.inputs) + int(against_start)
        cached = "" if "reference" in planned.inputs else ", cached"
        values |= {"name": f"anneal ({settings.objective}{cached})", "frozen": frozen, "scored": frozen}
    elif isinstance(settings, Anneal):
        values["name"] = "anneal (uniform)"
    if stage == "rl":
        values |= _policy(recipe.rl.grpo)
        values["sampling"] = _rl_sampling(recipe)
    return Workload(**values)


def _policy(grpo: GRPO) -> dict[str, int | bool]:
    """What both stages with GRPO share."""
    reference = int(grpo.kl_coefficient > 0)
    old = int(grpo.updates_per_rollout > 1)
    return {"updates": grpo.updates_per_rollout, "frozen": reference, "scored": reference + old, "entropy": True}


def _rl_sampling(recipe: Recipe) -> Sampling:
    responses, limit = recipe.rl.global_batch_size // recipe.data_parallel, recipe.rollout.max_new_tokens
    return Sampling(
        responses=responses,
        rows=min(responses, recipe.rollout.batch_size),
        prompt=max(1, recipe.rl.sequence_length - limit),
        limit=limit,
        steps=limit,
        length=limit,
    )


def _rmt(recipe: Recipe) -> Workload:
    settings, ranks = recipe.rmt, recipe.data_parallel
    sampled = settings.objective == "rmt"
    groups, samples = settings.global_batch_size, settings.grpo.samples_per_group
    documents = -(-groups // settings.curriculum.positions_per_document)
    longest, thought = settings.longest_document, _mean_thought(recipe)
    ending = 1 + settings.reward.prediction_tokens  # </think> and the prediction
    branch = INSTRUCTION_ROOM + thought + ending
    branches = groups * samples * branch if sampled else 0
    tokens = documents * longest + branches
    # A document's tokens see half of it on average, a branch's the document up to the middle and half of their own.
    context = (documents * longest * longest / 2 + branches * (longest + branch) / 2) / tokens
    rows = -(-tokens // (ranks * settings.sequence_length))
    values = dict(
        name="rmt" if sampled else "rmt (ntp)",
        stage="rmt",
        steps=settings.steps,
        times=1,
        rows=settings.micro_batch_size,
        sequence=settings.sequence_length,
        micro_batches=int(-(-rows // settings.micro_batch_size)),
        tokens=tokens,
        context=context,
    )
    if not sampled:
        return Workload(**values)
    responses = -(-groups // ranks) * samples
    batch = min(responses, recipe.rollout.batch_size)
    opening = 0 if settings.prompt.open_think else 1
    longest_thought = thought if settings.budget.schedule == "none" else 2 * thought
    return Workload(
        **values,
        **_policy(settings.grpo),
        sampling=Sampling(
            responses=responses,
            rows=batch,
            prompt=INSTRUCTION_ROOM,
            limit=opening + settings.thought_limit + ending,
            steps=opening + longest_thought + ending,
            length=opening + thought + ending,
            trunks=-(-batch // samples),
            trunk_length=longest,
            documents=-(-documents // ranks),
        ),
    )


def _mean_thought(recipe: Recipe) -> float:
    """Tokens of a thought, averaged over the stage: the budget, or without one the most allowed."""
    budget, steps = recipe.rmt.budget, recipe.rmt.steps
    if budget.schedule == "none":
        return recipe.rmt.thought_limit
    return sum(max(budget.minimum, int(budget.initial * budget.decay ** (n / steps))) for n in range(steps)) / steps
