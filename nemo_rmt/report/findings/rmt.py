"""What RMT did to predictions after a thought."""

from __future__ import annotations

from nemo_rmt.report.estimates import difference
from nemo_rmt.report.findings.finding import Finding
from nemo_rmt.report.reasoning import (
    Reasoning,
    ReasoningVerdict,
    ThoughtLength,
    before_and_after,
    judge_reasoning,
)
from nemo_rmt.report.run import Run, StageRecord, domains


def mid_training(run: Run, iteration: int) -> Finding | None:
    """RMT's model against the annealed one on the hardest tier measured, and how long it thinks; None without either.

    The baseline, next-token prediction in RMT's place, is judged in the same way and named as what it is.
    """
    stage, evaluate = run.stage(iteration, "rmt"), run.stage(iteration, "evaluate")
    subject = "Next-token prediction in RMT's place" if stage.is_rmt_baseline else "RMT"
    title = f"Iteration {iteration}: {subject} against the annealed model"
    training = [*_length(stage), *_nll(evaluate)]
    pairs = before_and_after(run, iteration)
    if not pairs:
        conclusion = "Accuracy after a thought was not evaluated before and after it."
        return Finding("RMT", iteration, title, "not evaluated", conclusion, " ".join(training)) if training else None
    tier = list(pairs)[-1]
    before, after = pairs[tier]
    verdict = judge_reasoning(before, after)
    conclusion = f"{_conclusion(verdict, subject, tier, after.positions)} {_thinking(after)}"
    others = [
        f"{name} tokens {difference(old.thought, new.thought).as_change()}"
        for name, (old, new) in reversed(pairs.items())
        if name != tier
    ]
    sentences = _changes(tier, before, after)
    if others:
        sentences.append(f"After a sampled thought, on {' and on '.join(others)}.")
    return Finding("RMT", iteration, title, verdict, conclusion, " ".join([*sentences, *training]))


def _conclusion(verdict: ReasoningVerdict, subject: str, tier: str, positions: int) -> str:
    """The sentence a verdict of judge_reasoning stands for."""
    if verdict == "worse":
        return f"{subject} made predictions after a thought worse on held-out {tier} tokens."
    if verdict == "no change":
        return (
            f"{subject} made no difference to predictions after a thought that these positions can show "
            f"({positions:,} held-out {tier} tokens)."
        )
    if verdict == "undecided":
        return (
            f"{subject} raised accuracy after a thought on held-out {tier} tokens. These figures do not tell new skill "
            "from existing skill used more reliably: greedy accuracy was not measured."
        )
    if verdict == "sharpening":
        return (
            f"{subject} made existing skill more reliable and did not teach new skill: what the model now predicts "
            f"after a thought on held-out {tier} tokens, greedy thoughts already led to before."
        )
    if verdict == "caught up":
        return (
            f"{subject} raised accuracy after a thought on held-out {tier} tokens, but not beyond what the annealed "
            "model predicts directly."
        )
    return (
        f"{subject} raised accuracy after a thought on held-out {tier} tokens, beyond what the annealed model "
        "predicts directly or after a greedy thought."
    )


def _thinking(after: Reasoning) -> str:
    """Whether thinking first is better than predicting directly, for the model after RMT."""
    change = difference(after.direct, after.thought)
    if change.is_above_zero:
        outcome = "is now better than"
    elif change.is_below_zero:
        outcome = "is still worse than"
    elif change.value < 0:
        outcome = "is below, though not measurably worse than,"
    else:
        outcome = "is not measurably better than"
    return f"Thinking before predicting them {outcome} predicting them directly: {change.as_change()}."


def _changes(tier: str, before: Reasoning, after: Reasoning) -> list[str]:
    """The tier's figures before and after, in sentences."""
    change = difference(before.thought, after.thought)
    sentences = [
        f"Of {after.positions:,} held-out {tier} tokens {before.thought.as_share()} were right after a sampled thought "
        f"before and {after.thought.as_share()} after: {change.as_change()}."
    ]
    if before.greedy and after.greedy:
        sentences.append(f"After a greedy thought: {before.greedy.as_share()}, then {after.greedy.as_share()}.")
    sentences.append(f"Directly: {before.direct.as_share()}, then {after.direct.as_share()}.")
    if before.format_rate is not None and after.format_rate is not None:
        sentences.append(
            f"{100 * before.format_rate:.1f} % of the responses closed their thought before and "
            f"{100 * after.format_rate:.1f} % after; one that does not is wrong."
        )
    if before.right_when_formed is not None and after.right_when_formed is not None:
        sentences.append(
            f"Of those that did, {100 * before.right_when_formed:.1f} % and then "
            f"{100 * after.right_when_formed:.1f} % were right."
        )
    return sentences


def _length(stage: StageRecord) -> list[str]:
    """How long the thoughts were at the end of training, against the budget."""
    length = ThoughtLength.read(stage)
    if length is None:
        return []
    shape = (
        f"In the last tenth of the steps thoughts took {length.end:.1f} tokens on average, {length.start:.1f} in the "
        "first"
    )
    if length.budget is None:
        return [f"{shape}; there was no budget."]
    return [f"{shape}: {100 * length.end / length.budget:.0f} % of the final budget of {length.budget:.0f}."]


def _nll(evaluate: StageRecord) -> list[str]:
    """How the held-out text's nats per token changed."""
    metrics = evaluate.metrics
    for domain in reversed(domains(metrics)):
        before, after = metrics.get(f"anneal/lm/{domain}/nll"), metrics.get(f"rmt/lm/{domain}/nll")
        if before is not None and after is not None:
            where = "text" if domain == "all" else f"text of {domain}"
            change = f"{after - before:+.4f}"
            return [f"Held-out {where} took {before:.4f} nats per token before and {after:.4f} after ({change})."]
    return []
