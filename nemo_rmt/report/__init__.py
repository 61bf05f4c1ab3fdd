"""A run folder as one self-contained HTML page and a summary.json. Imports no torch; runs while a run is unfinished."""

from __future__ import annotations

import json
import math
import os
import time
from pathlib import Path
from typing import Any

import jinja2
import yaml

from nemo_rmt.report import figures, findings, profiles, rmt, tables
from nemo_rmt.report.run import Run

__all__ = ["write_report"]


def write_report(run_dir: Path) -> Path:
    """Write report/index.html and report/summary.json of a run, each atomically; returns the page's path.

    Reads flywheel.yaml, state.json and every stage's result.json and metrics.jsonl. What is missing or failed shows
    as such. Raises UserError when run_dir is not a run folder.
    """
    run = Run.load(Path(run_dir))
    found = findings.all_findings(run)
    page = run.folder / "report" / "index.html"
    page.parent.mkdir(exist_ok=True)
    _write(page.with_name("summary.json"), json.dumps(_finite(_summary(run, found)), indent=1) + "\n")
    _write(page, _render(run, found))
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
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    return environment.get_template("page.html.j2").render(
        run=run,
        facts=tables.facts(run),
        problems=[stage for stage in run.stages if stage.status in ("failed", "no result")],
        findings=found,
        stages=tables.stage_rows(run),
        tiers=tables.tier_table(run),
        lm_eval=tables.lm_eval_table(run),
        figures=figures.all_figures(run),
        rmt=rmt.section(run),
        profiles=profiles.section(run),
        recipe=yaml.safe_dump(run.recipe, sort_keys=False, allow_unicode=True) if run.recipe else "",
        written=time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
    )


def _finite(value: Any) -> Any:
    """The same structure with null for numbers JSON cannot hold."""
    if isinstance(value, dict):
        return {key: _finite(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [_finite(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _write(path: Path, text: str) -> None:
    """Replace the file in one step: a reader or an interrupted report never leaves half a page."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)
