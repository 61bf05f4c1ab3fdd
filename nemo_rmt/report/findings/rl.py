"""What RL did to a task."""

from __future__ import annotations

from nemo_rmt.report.estimates import Skill, difference, judge
from nemo_rmt.report.findings.finding import Finding
from nemo_rmt.report.run import Run
from nemo_rmt.report.tables import MODEL_NAMES, Table, prefix, share


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
            [f"{name}, {MODEL_NAMES[model]}", skill.pass_at_1.as_share(), share(skill.greedy), share(skill.pass_at_k)]
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
