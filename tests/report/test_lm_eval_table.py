"""The page's table of lm-eval's figures beside our own."""

from __future__ import annotations

import html
import json

from nemo_rmt.report import write_report
from nemo_rmt.report.run import Run
from nemo_rmt.report.tables import lm_eval_table

FIGURES = {
    "chains/pass@1": (0.969, 0.005),
    "chains_greedy/pass@1": (0.995, 0.004),
    "chains_longer/pass@4": (0.20, 0.02),
    "digits_lm/acc,strict": (0.5, 0.01),
    "digits_lm/perplexity": (12.5, 0.5),
}


def add_figures(run) -> None:
    """Write lm-eval's figures to the result of the last iteration."""
    path = run / "iteration_001" / "evaluate" / "result.json"
    result = json.loads(path.read_text())
    for key, (value, error) in FIGURES.items():
        result["metrics"] |= {f"lm_eval/{key}": value, f"lm_eval/{key}_stderr": error}
    path.write_text(json.dumps(result))


def test_figures_stand_beside_our_own_of_the_same_problems(finished_run):
    add_figures(finished_run)
    table = lm_eval_table(Run.load(finished_run))
    assert table.rows == [
        ["iteration 1, chains: pass@1", "97.2 % [94.2, 100.0]", "96.9 % [95.9, 97.9]"],
        ["iteration 1, chains_greedy: pass@1", "99.5 % [98.5, 100.0]", "99.5 % [98.7, 100.0]"],
        ["iteration 1, chains_longer: pass@4", "19.0 % [16.0, 22.0]", "20.0 % [16.1, 23.9]"],
        ["iteration 1, digits_lm: acc,strict", "–", "50.0 % [48.0, 52.0]"],
        ["iteration 1, digits_lm: perplexity", "–", "12.5 [11.52, 13.48]"],
    ]
    assert table.sources == ["iteration_001/evaluate/result.json"]


def test_our_figures_are_those_of_the_final_model_where_that_is_not_rls(make_a_run):
    run = make_a_run(changes={"rl": {"enabled": False}, "anneal": {"steps": 120, "objective": "uniform"}})
    add_figures(run)
    (first, *_) = lm_eval_table(Run.load(run)).rows
    assert first[1] == "55.0 % [52.0, 58.0]"


def test_the_page_has_it_only_where_lm_eval_measured(finished_run):
    title = "The final models by lm-eval"
    assert title not in html.unescape(write_report(finished_run).read_text())
    add_figures(finished_run)
    page = html.unescape(write_report(finished_run).read_text())
    assert title in page and "96.9 % [95.9, 97.9]" in page
