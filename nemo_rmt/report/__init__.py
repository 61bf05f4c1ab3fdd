"""A run folder as one self-contained HTML page and a summary.json. Imports no torch; runs while a run is unfinished."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import yaml

from nemo_rmt.report import diagnosis, figures, findings, profiles, rmt, tables
from nemo_rmt.report.run import Run
from nemo_rmt.report.shell import finite, render
from nemo_rmt.run_folder import write_json, write_text

__all__ = ["write_report"]


def write_report(run_dir: Path) -> Path:
    """Write report/index.html and report/summary.json of a run, each atomically; returns the page's path.

    Reads flywheel.yaml, state.json and every stage's result.json, metrics.jsonl and weights.jsonl. What is missing or
    failed shows as such. Raises UserError when run_dir is not a run folder.
    """
    run = Run.load(Path(run_dir))
    found = findings.all_findings(run)
    page = run.folder / "report" / "index.html"
    write_json(page.with_name("summary.json"), finite(_summary(run, found)))
    write_text(page, _render(run, found))
    return page


def _summary(run: Run, found: list[findings.Finding]) -> dict[str, Any]:
    """Every stage's result.json (its status alone while it has none), and the findings in words."""
    iterations = [{"iteration": number, "stages": {}} for number in range(run.num_iterations)]
    for stage in run.stages:
        iterations[stage.iteration]["stages"][stage.name] = {**stage.result, "status": stage.status}
    return {
        "recipe": run.name,
        "status": run.status,
        "iterations": iterations,
        "findings": [
            {"topic": finding.topic, "iteration": finding.iteration, "verdict": finding.verdict, "text": finding.text}
            for finding in found
        ],
    }


def _render(run: Run, found: list[findings.Finding]) -> str:
    return render(
        "page.html.j2",
        run=run,
        facts=tables.facts(run),
        problems=[stage for stage in run.stages if stage.status in ("failed", "no result")],
        findings=found,
        stages=tables.stage_rows(run),
        tiers=tables.tier_table(run),
        lm_eval=tables.lm_eval_table(run),
        figures=figures.all_figures(run),
        diagnosis=diagnosis.section(run),
        rmt=rmt.section(run),
        profiles=profiles.section(run),
        recipe=yaml.safe_dump(run.recipe, sort_keys=False, allow_unicode=True) if run.recipe else "",
        written=time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
    )
