"""An experiment's results as files: results.json, results.csv, results.md, index.html and its plots."""

from __future__ import annotations

import base64
import csv
import io
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nemo_rmt.experiment.comparison import Comparison, Results
from nemo_rmt.experiment.measured import Measured
from nemo_rmt.run_folder import write_json, write_text

if TYPE_CHECKING:
    from nemo_rmt.experiment.config import Experiment

COLUMNS = ("arm", "equal_flops", "seed", "metric", "value", "difference", "steps_to_control", "tokens", "flops")


def write_results(experiment: Experiment, measured: list[Measured], out: Path) -> None:
    """Write what is known of an experiment so far into its folder, each file atomically.

    results.json has everything, results.csv a row of each arm, seed and metric, results.md the tables; index.html has
    them with plots, which are in plots/ too. The same measurements in any order give the same bytes.
    """
    # Here, because it draws: the driver does without matplotlib until there is something to show.
    from nemo_rmt.experiment.page import markdown, metric_parts, page
    from nemo_rmt.report.shell import finite

    results, name = Results(experiment, measured), out.resolve().name
    parts = metric_parts(results)
    write_json(out / "results.json", finite(_as_json(results, out)))
    write_text(out / "results.csv", _as_csv(results))
    write_text(out / "results.md", markdown(results, name, parts))
    for figure in (figure for part in parts for figure in part.figures):
        image = base64.b64decode(figure.image.partition(",")[2]).decode()
        write_text(out / "plots" / f"{_file_name(figure.title)}.svg", image)
    write_text(out / "index.html", page(results, name, parts))


def _as_json(results: Results, out: Path) -> dict[str, Any]:
    experiment, arms = results.experiment, {}
    for name, seeds in results.arms.items():
        cost, arm = results.cost(name), experiment.arms[name]
        arms[name] = {
            "about": arm.about,
            "equal_flops": arm.equal_flops,
            "flops_relative_to_control": None if cost is None else cost.relative,
            "seeds": {str(seed): _measured_as_json(each, out) for seed, each in seeds.items()},
        }
    return {
        "about": experiment.about,
        "recipe": experiment.recipe,
        "control": experiment.control,
        "seeds": list(experiment.seeds),
        "arms": arms,
        "metrics": {
            metric.name: {
                "label": metric.label,
                "higher_is_better": metric.higher_is_better,
                "arms": {each.arm: _comparison_as_json(each) for each in results.comparisons[metric.name]},
            }
            for metric in experiment.metrics
        },
    }


def _measured_as_json(measured: Measured, out: Path) -> dict[str, Any]:
    curves = {name: {str(step): points[step] for step in sorted(points)} for name, points in measured.curves.items()}
    return {
        "folder": os.path.relpath(measured.folder, out),
        "tokens": measured.tokens,
        "flops": measured.flops,
        "metrics": dict(sorted(measured.metrics.items())),
        "curves": dict(sorted(curves.items())),
    }


def _comparison_as_json(comparison: Comparison) -> dict[str, Any]:
    """An interval without bounds, of a single seed, has null for them."""
    interval = comparison.interval
    return {
        "seeds": len(comparison.values),
        "mean": comparison.mean,
        "difference": None if interval is None else interval.mean,
        "low": None if interval is None else interval.low,
        "high": None if interval is None else interval.high,
        "p": comparison.p,
        "verdict": comparison.verdict,
        "steps_to_control": {str(seed): step for seed, step in comparison.steps.items()},
        "median_steps_to_control": comparison.median_steps,
    }


def _as_csv(results: Results) -> str:
    """A row of each arm, seed and metric that was measured; cells without a value are empty."""
    file = io.StringIO()
    table = csv.writer(file, lineterminator="\n")
    table.writerow(COLUMNS)
    for metric in results.experiment.metrics:
        for each in results.comparisons[metric.name]:
            equal = results.experiment.arms[each.arm].equal_flops
            for seed, value in each.values.items():
                own = results.arms[each.arm][seed]
                found = (each.differences.get(seed), each.steps.get(seed))
                table.writerow([each.arm, equal, seed, metric.name, value, *found, own.tokens, own.flops])
    return file.getvalue()


def _file_name(title: str) -> str:
    """``held_out_pass_1_over_the_anneal``."""
    return re.sub(r"\W+", "_", title.lower()).strip("_")
