"""What happened, in plain sentences: every claim is chosen by the run's numbers."""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass, field

from nemo_rmt.report.estimates import Estimate, Skill, difference, judge
from nemo_rmt.report.run import Run, StageRecord
from nemo_rmt.report.tables import MODEL_NAMES, Table, prefix, unique


@dataclass(frozen=True)
class Finding:
    """One paragraph of the page.

    topic: pre-training, RL or ReMiT. iteration: the one it is about. verdict: a word or two for the margin.
    conclusion: what the numbers say, in a sentence. details: the numbers, in sentences. tables: below them.
    """

    topic: str
    iteration: int
    title: str
    verdict: str
    conclusion: str
    details: str = ""
    tables: list[Table] = field(default_factory=list)

    @property
    def text(self) -> str:
        """Conclusion and details."""
        return f"{self.conclusion} {self.details}".strip()


def all_findings(run: Run) -> list[Finding]:
    """In the order of the run; a stage without numbers has none."""
    found = [pretraining(run)]
    tasks = evaluated_tasks(run)
    for iteration in range(run.num_iterations):
        found.append(remit(run, iteration, tasks))
        found.extend(reinforcement(run, iteration, task) for task in tasks)
    return [finding for finding in found if finding is not None]


def pretraining(run: Run) -> Finding | None:
    """The pre-trained model's held-out nll against the unigram model's."""
    stage, data = run.stage(0, "evaluate"), run.stage(0, "data")
    metrics = {**data.metrics, **stage.metrics}
    rows = []
    for domain in _domains(metrics):
        nll, unigram = metrics.get(f"pretrain/lm/{domain}/nll"), metrics.get(f"lm/{domain}/unigram_nll")
        if nll is not None and unigram is not None:
            rows.append((domain, nll, unigram))
    if not rows:
        return None
    domain, nll, unigram = next((row for row in rows if row[0] == "all"), rows[-1])
    where = "held-out text" if domain == "all" else f"held-out text of {domain}"
    better = nll < unigram
    conclusion = (
        f"Pre-training learned more than how frequent tokens are: {unigram - nll:.3f} nats per token better than a "
        f"unigram model."
        if better
        else "Pre-training has not learned more than how frequent tokens are."
    )
    details = (
        f"On {where} the model needs {nll:.3f} nats per token (perplexity {math.exp(nll):.1f}); a unigram model of the "
        f"training text needs {unigram:.3f} ({math.exp(unigram):.1f})."
    )
    table = Table(
        ["domain", "pre-trained, nats per token", "unigram model", "difference"],
        [[name, f"{nll:.3f}", f"{unigram:.3f}", f"{nll - unigram:+.3f}"] for name, nll, unigram in rows],
        [f"{stage.folder}/result.json"],
    )
    verdict = "beats unigram" if better else "not better than unigram"
    return Finding("pre-training", 0, "Pre-training", verdict, conclusion, details, [table])


def reinforcement(run: Run, iteration: int, task: str) -> Finding | None:
    """Held-out accuracy of one task after SFT and after RL, and whether the gain is new skill."""
    stage = run.stage(iteration, "evaluate")
    sets = {"trained lengths": task, "longer problems": f"{task}_longer"}
    skills = {
        (name, model): Skill.read(stage.metrics, prefix(model), key)
        for name, key in sets.items()
        for model in ("sft", "rl")
    }
    before, after = skills["trained lengths", "sft"], skills["trained lengths", "rl"]
    if before is None or after is None:
        return None
    before_longer, after_longer = skills["longer problems", "sft"], skills["longer problems", "rl"]
    change = difference(before.pass_at_1, after.pass_at_1)
    sentences = [
        f"Held-out pass@1 of {task} went from {before.pass_at_1.as_share()} after SFT to "
        f"{after.pass_at_1.as_share()} after RL: {change.as_change()}."
    ]
    if before.greedy and after.greedy:
        sentences.append(
            f"Greedy decoding solved {before.greedy.as_share()} before RL and {after.greedy.as_share()} after."
        )
    if before_longer and after_longer:
        longer = difference(before_longer.pass_at_1, after_longer.pass_at_1)
        moved = "rose" if longer.is_above_zero else "fell" if longer.is_below_zero else "did not measurably move"
        sentences.append(
            f"On problems longer than any trained on pass@1 {moved}: {before_longer.pass_at_1.as_share()} to "
            f"{after_longer.pass_at_1.as_share()}, {longer.as_change()}."
        )
    verdict = judge(before, after, before_longer, after_longer)
    conclusion = _rl_conclusion(verdict, before, before_longer, after_longer)
    table = Table(
        ["problems, model", "pass@1", "greedy", f"pass@{before.k}" if before.k else "pass@k"],
        [
            [f"{name}, {MODEL_NAMES[model]}", skill.pass_at_1.as_share(), _share(skill.greedy), _share(skill.pass_at_k)]
            for (name, model), skill in skills.items()
            if skill is not None
        ],
        [f"{stage.folder}/result.json"],
    )
    title = f"Iteration {iteration}: what RL did to {task}"
    return Finding("RL", iteration, title, verdict, conclusion, " ".join(sentences), [table])


def _rl_conclusion(verdict: str, before: Skill, before_longer: Skill | None, after_longer: Skill | None) -> str:
    """The sentence a verdict of :func:`judge` stands for."""
    if verdict == "worse":
        return "RL made the model worse at this task."
    if verdict == "no change":
        return "RL made no difference that these problems can show."
    if verdict == "new skill":
        return (
            "RL taught new skill: the model now solves more than greedy decoding, or "
            f"{before.k} samples, solved before RL on the same problems."
        )
    if verdict == "undecided":
        unknown = "These figures do not tell new skill from sharpening: "
        if before.greedy is None:
            return unknown + "greedy accuracy was not measured."
        if before.pass_at_k is None:
            return unknown + "what several samples reached before RL was not measured."
        return unknown + (
            f"the model now solves more than greedy decoding solved before RL, not more than {before.k} samples did."
        )
    sharpened = "RL sharpened existing skill and did not teach new skill: "
    within = "what it now answers reliably, greedy decoding already solved before RL"
    if before_longer is None or after_longer is None:
        return sharpened + within + ". No longer problems were evaluated."
    longer = difference(before_longer.pass_at_1, after_longer.pass_at_1)
    if longer.is_above_zero:
        return sharpened + within + ", on the longer problems too."
    moved = "it got worse at longer problems" if longer.is_below_zero else "longer problems did not move"
    return f"{sharpened}{within}, and {moved}."


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
    """Whether a finished or started anneal ran without ReMiT, by its recipe and by what it logged."""
    remit_from_the_start = (
        run.setting("anneal", "objective") == "remit" and run.setting("anneal", "remit", "reference") != "previous"
    )
    return bool(anneal.steps) and not anneal.has_remit and not (remit_from_the_start and anneal.iteration == 0)


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
    for domain in _domains(uniform.metrics):
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
                f"After SFT and RL, iteration {iteration}'s pass@1 of {task} is {_outcome(change)} than iteration 0's: "
                f"{change.as_change()}."
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


def evaluated_tasks(run: Run) -> list[str]:
    """The tasks evaluated anywhere in the run, without the longer variants."""
    known = {str(task.get("name")) for task in run.setting("data", "tasks", default=[])}
    names = [
        key.split("/")[-2]
        for stage in run.stages
        if stage.name == "evaluate"
        for key in stage.metrics
        if "tasks/" in key and key.endswith("/pass@1")
    ]
    return unique([name for name in names if name in known or not name.endswith("_longer")])


def _domains(metrics: dict[str, float]) -> list[str]:
    """The domains with a held-out nll, "all" last."""
    names = unique([key.split("/")[-2] for key in metrics if "lm/" in key])
    return sorted(names, key=lambda name: name == "all")


def _share(estimate: Estimate | None) -> str:
    return "–" if estimate is None else estimate.as_share()
