"""What annealing with ReMiT's weights did, against uniform weights."""

from __future__ import annotations

import math
import statistics

from nemo_rmt.config import EARLIER_MODELS
from nemo_rmt.report.estimates import Estimate, Skill, difference
from nemo_rmt.report.findings.finding import Finding
from nemo_rmt.report.run import Run, StageRecord, domains
from nemo_rmt.report.tables import Table


def remit(run: Run, iteration: int, tasks: list[str]) -> Finding | None:
    """The base model annealed with ReMiT against iteration 0's uniform anneal; None where one of them is missing."""
    uniform, weighted = run.stage(0, "anneal"), run.stage(iteration, "anneal")
    stages = run.stage(0, "evaluate"), run.stage(iteration, "evaluate")
    if not weighted.has_remit:
        return None
    title, weights = f"Iteration {iteration}: annealing with ReMiT's weights", _weights_in_words(weighted)
    if not is_uniform(run, uniform):
        conclusion = "This run has no uniform anneal to compare with: iteration 0 did not anneal uniformly."
        return Finding("ReMiT", iteration, title, "no comparison", conclusion, weights)
    rows, changes = _anneal_rows(*stages, tasks)
    if not rows:
        return Finding("ReMiT", iteration, title, "not evaluated", "The base models have not been evaluated.", weights)
    if run.setting("flywheel", "start_from") == "stable":
        setting = (
            f"Iteration 0 annealed the same checkpoint and rows with uniform weights, iteration {iteration} with "
            f"ReMiT's: what differs between the two base models, before any post-training, is the weights."
        )
    else:
        setting = (
            f"This is not a controlled comparison: iteration {iteration} continued from the base model of the "
            f"iteration before, so it has also trained on more tokens than iteration 0's uniform anneal."
        )
    conclusions = [
        f"Held-out pass@1 of {task} is {_outcome(change)} with ReMiT than with uniform weights: {change.as_change()}."
        for task, change in changes.items()
    ] or ["No task was evaluated on the base models; their held-out nll is below."]
    outcomes = {_outcome(change) for change in changes.values()}
    verdict = outcomes.pop() if len(outcomes) == 1 else "mixed" if outcomes else "nll only"
    table = Table(
        ["held out, base model", "uniform", "ReMiT", "difference"],
        rows,
        [f"{stage.folder}/result.json" for stage in stages],
    )
    details = " ".join([setting, *_after_post_training(*stages, iteration, tasks), weights])
    title = f"Iteration {iteration}: annealing with ReMiT against uniform weights"
    return Finding("ReMiT", iteration, title, verdict, " ".join(conclusions), details, [table])


def _outcome(change: Estimate) -> str:
    """A difference's interval as a comparative."""
    return "higher" if change.is_above_zero else "lower" if change.is_below_zero else "not measurably higher"


def is_uniform(run: Run, anneal: StageRecord) -> bool:
    """Whether a finished or started anneal ran without a reference, by its recipe and by what it logged."""
    objective = run.setting("anneal", "objective", default="uniform")
    reference = run.setting("anneal", objective, "reference")
    guided_from_the_start = objective != "uniform" and reference not in tuple(EARLIER_MODELS)
    return bool(anneal.steps) and not anneal.has_remit and not (guided_from_the_start and anneal.iteration == 0)


def _anneal_rows(
    uniform: StageRecord, weighted: StageRecord, tasks: list[str]
) -> tuple[list[list[str]], dict[str, Estimate]]:
    """The comparison's table, and per task the change in pass@1 (problems of trained lengths)."""
    rows, changes = [], {}
    for task in tasks:
        for key, name in ((task, task), (f"{task}_longer", f"{task}, longer problems")):
            old, new = Skill.read(uniform.metrics, "anneal/", key), Skill.read(weighted.metrics, "anneal/", key)
            if old is None or new is None:
                continue
            change = difference(old.pass_at_1, new.pass_at_1)
            changes.update({task: change} if key == task else {})
            rows.append([f"{name}: pass@1", old.pass_at_1.as_share(), new.pass_at_1.as_share(), change.as_change()])
            if old.greedy and new.greedy:
                greedy = difference(old.greedy, new.greedy)
                rows.append([f"{name}: greedy", old.greedy.as_share(), new.greedy.as_share(), greedy.as_change()])
    for domain in domains(uniform.metrics):
        old_nll, new_nll = (stage.metrics.get(f"anneal/lm/{domain}/nll") for stage in (uniform, weighted))
        if old_nll is not None and new_nll is not None:
            label = f"nats per token, {'all text' if domain == 'all' else domain}"
            rows.append([label, f"{old_nll:.4f}", f"{new_nll:.4f}", f"{new_nll - old_nll:+.4f}"])
    return rows, changes


def _after_post_training(first: StageRecord, later: StageRecord, iteration: int, tasks: list[str]) -> list[str]:
    """How much of the base models' difference is left after SFT and RL."""
    sentences = []
    for task in tasks:
        old, new = Skill.read(first.metrics, "", task), Skill.read(later.metrics, "", task)
        if old is not None and new is not None:
            change = difference(old.pass_at_1, new.pass_at_1)
            sentences.append(
                f"After post-training, iteration {iteration}'s pass@1 of {task} is {_outcome(change)} than iteration "
                f"0's: {change.as_change()}."
            )
    return sentences


def _weights_in_words(anneal: StageRecord) -> str:
    """Mean, spread and clipping of the weights over the whole stage."""
    average = {
        name: statistics.fmean(values)
        for name in ("weight_mean", "weight_std", "share_low", "share_high")
        if (values := anneal.series(f"remit/{name}")[1])
    }
    if average.get("weight_std") == 0:
        return "Every weight was 1: the reference and the model agreed on every token, so this was a uniform anneal."
    return (
        f"Over the stage the token weights had mean {average.get('weight_mean', math.nan):.3f} and standard deviation "
        f"{average.get('weight_std', math.nan):.3f}; {100 * average.get('share_low', math.nan):.1f} % of the tokens "
        f"were clipped at the lower bound and {100 * average.get('share_high', math.nan):.1f} % at the upper."
    )
