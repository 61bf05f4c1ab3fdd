"""Results of an experiment: comparisons, files and the page, from a handful of measurements made up here."""

from __future__ import annotations

import base64
import csv
import html
import io
import json
import math
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import pytest

from nemo_rmt.experiment.comparison import Results, steps_to_reach
from nemo_rmt.experiment.config import Experiment
from nemo_rmt.experiment.measured import Measured, curve_name
from nemo_rmt.experiment.page import metric_table, overview_table, sentence
from nemo_rmt.experiment.results import write_results
from nemo_rmt.objectives.statistics import paired_bootstrap

PASS, NLL = "iteration_1/anneal/tasks/chains/pass@1", "iteration_1/lm/all/nll"
SEEDS = [1, 2, 3, 4, 5]
UNIFORM = {1: 0.40, 2: 0.50, 3: 0.45, 4: 0.55, 5: 0.42}
GAINS = {1: 0.02, 2: 0.06, 3: 0.01, 4: 0.04, 5: 0.03}
EXPERIMENT = Experiment.model_validate(
    {
        "about": "Does <b>weighting</b> help?",
        "recipe": "tiny",
        "seeds": SEEDS,
        "control": "uniform",
        "arms": {
            "remit": {"about": "weights & gaps"},
            "uniform": {"about": "plain | next token"},
            "longer": {"about": "more steps", "equal_flops": "remit"},
        },
        "metrics": [
            {"name": PASS, "label": "pass@1 <chains>", "higher_is_better": True, "curve": True},
            {"name": NLL, "label": "nats per token", "higher_is_better": False},
        ],
    }
)


def measured(arm, seed, score, nll, flops=1e12):
    """One arm of one seed; its pass@1 rises in a straight line from half its score at step 100 to it at step 300."""
    curve = {100: score / 2, 200: 0.75 * score, 300: score}
    folder = Path("weighting") / arm / f"seed_{seed}"
    return Measured(arm, seed, {PASS: score, NLL: nll}, 2e6, flops, {curve_name(PASS): curve}, folder)


@pytest.fixture(scope="module")
def whole():
    """remit gains in both metrics, longer in none; remit costs half as much again."""
    found = [measured("uniform", seed, UNIFORM[seed], 2.0) for seed in SEEDS]
    found += [measured("remit", seed, UNIFORM[seed] + GAINS[seed], 1.9, 1.5e12) for seed in SEEDS]
    found += [measured("longer", seed, UNIFORM[seed] + (-1) ** seed * 0.01, 2.0, 1.5e12) for seed in SEEDS]
    return found


@pytest.fixture(scope="module")
def folder(whole, tmp_path_factory):
    """What is written of the whole experiment."""
    return written(tmp_path_factory.mktemp("whole"), whole)


def comparison(results, arm, metric=PASS):
    return next(each for each in results.comparisons[metric] if each.arm == arm)


def written(tmp_path, found):
    out = tmp_path / "weighting"
    write_results(EXPERIMENT, [replace(each, folder=tmp_path / each.folder) for each in found], out)
    return out


def test_differences_are_paired_by_seed_and_not_by_order(whole):
    remit = comparison(Results(EXPERIMENT, whole[::-1]), "remit")
    assert remit.differences == pytest.approx(GAINS)
    assert remit.interval == paired_bootstrap([remit.differences[seed] for seed in SEEDS])
    assert remit.interval.mean == pytest.approx(0.032) and remit.p == 1 / 16


@pytest.mark.parametrize(
    ("arm", "metric", "verdict"),
    [
        ("remit", PASS, "better"),
        ("remit", NLL, "better"),
        ("longer", PASS, "not distinguishable"),
        ("longer", NLL, "not distinguishable"),
        ("uniform", PASS, None),
    ],
)
def test_the_verdict_follows_the_interval_and_the_direction(whole, arm, metric, verdict):
    assert comparison(Results(EXPERIMENT, whole), arm, metric).verdict == verdict


def test_an_arm_that_loses_is_called_worse(whole):
    worse = [measured("longer", seed, UNIFORM[seed] - GAINS[seed], 2.1) for seed in SEEDS]
    results = Results(EXPERIMENT, [each for each in whole if each.arm != "longer"] + worse)
    assert {comparison(results, "longer", metric).verdict for metric in (PASS, NLL)} == {"worse"}
    assert sentence(comparison(results, "longer")).startswith("longer is worse than uniform with 5 seeds: -0.0320 [-0.")


def test_the_sentence_names_seeds_interval_and_how_low_p_can_be(whole):
    results = Results(EXPERIMENT, whole)
    low, high = comparison(results, "remit").interval[1:]
    told = f"+0.0320 [{low:+.4f}, {high:+.4f}], p = 0.0625, the lowest that so few can give."
    assert sentence(comparison(results, "remit")) == f"remit is better than uniform with 5 seeds: {told}"
    assert "longer is not distinguishable from uniform with 5 seeds" in sentence(comparison(results, "longer"))
    assert sentence(comparison(results, "uniform")) is None


def test_four_seeds_that_agree_are_too_few(whole):
    remit = comparison(Results(EXPERIMENT, [each for each in whole if each.seed != 2]), "remit")
    assert remit.verdict == "too few seeds" and remit.interval.low > 0 and remit.p == 1 / 8
    assert sentence(remit).startswith("remit: 4 seeds tell too little about chance (+0.0")


def test_an_interval_that_one_seed_pulls_over_to_the_other_side_is_not_enough(whole):
    scores = {seed: UNIFORM[seed] + (0.05 if seed != 2 else -0.01) for seed in SEEDS}
    found = [each for each in whole if each.arm != "longer"] + [measured("longer", s, scores[s], 2.0) for s in SEEDS]
    longer = comparison(Results(EXPERIMENT, found), "longer")
    assert longer.interval.low > 0 and longer.p > 0.1 and longer.verdict == "not distinguishable"


def test_one_seed_has_a_difference_and_no_verdict(whole, tmp_path):
    found = [each for each in whole if each.seed == 2]
    remit = comparison(Results(EXPERIMENT, found), "remit")
    assert remit.verdict == "too few seeds" and remit.p == 1.0
    assert sentence(remit) == "remit: one seed tells too little about chance (+0.0600 to uniform)."
    stored = json.loads((written(tmp_path, found) / "results.json").read_text())["metrics"][PASS]["arms"]["remit"]
    assert stored["difference"] == pytest.approx(0.06) and stored["low"] is None and stored["high"] is None


def test_only_seeds_that_both_have_are_compared(whole):
    found = [each for each in whole if (each.arm, each.seed) not in {("uniform", 1), ("remit", 5)}]
    results = Results(EXPERIMENT, found)
    remit = comparison(results, "remit")
    assert sorted(remit.values) == [1, 2, 3, 4] and sorted(remit.differences) == [2, 3, 4]
    assert remit.mean == pytest.approx(sum(UNIFORM[seed] + GAINS[seed] for seed in (1, 2, 3, 4)) / 4)


def test_a_value_that_is_missing_or_not_finite_counts_as_not_measured(whole):
    torn = measured("remit", 1, math.nan, 1.9)
    results = Results(EXPERIMENT, [torn, *(each for each in whole if (each.arm, each.seed) != ("remit", 1))])
    assert sorted(comparison(results, "remit").values) == [2, 3, 4, 5]
    assert sorted(comparison(results, "remit", NLL).values) == SEEDS


@pytest.mark.parametrize(
    "extra", [("remit", 1), ("other", 1), ("remit", 9)], ids=["twice", "unknown arm", "unknown seed"]
)
def test_what_is_not_of_the_experiment_is_refused(whole, extra):
    with pytest.raises(ValueError, match="twice, or not in the experiment"):
        Results(EXPERIMENT, [*whole, measured(*extra, 0.5, 2.0)])


@pytest.mark.parametrize(
    ("curve", "score", "higher", "steps"),
    [
        ({100: 0.2, 200: 0.4, 300: 0.6}, 0.5, True, 250.0),
        ({100: 0.2, 200: 0.4, 300: 0.6}, 0.4, True, 200.0),
        ({300: 0.6, 100: 0.2, 200: 0.4}, 0.3, True, 150.0),
        ({100: 0.2, 200: 0.4}, 0.5, True, None),
        ({100: 0.5, 200: 0.4, 300: 0.6}, 0.45, True, 100.0),
        ({100: 3.0, 200: 2.0}, 2.25, False, 175.0),
        ({100: 2.0, 200: 3.0}, 1.9, False, None),
        ({100: 0.2, 200: math.nan, 300: 0.6}, 0.4, True, 200.0),
        ({}, 0.5, True, None),
    ],
)
def test_steps_to_reach_a_score(curve, score, higher, steps):
    found = steps_to_reach(curve, score, higher_is_better=higher)
    assert found == steps or found == pytest.approx(steps)


def test_steps_are_to_the_same_seeds_control_at_its_end(whole):
    results = Results(EXPERIMENT, whole)
    for seed, steps in comparison(results, "remit").steps.items():
        final = UNIFORM[seed] + GAINS[seed]
        # its line is final * (step / 400 + 1 / 4)
        assert steps == pytest.approx(400 * (UNIFORM[seed] / final - 0.25))
    assert set(comparison(results, "uniform").steps.values()) == {300.0}
    # a hundredth better with the even seeds, worse with the odd ones
    assert [seed for seed, steps in comparison(results, "longer").steps.items() if steps is None] == [1, 3, 5]
    assert comparison(results, "longer").median_steps is None
    assert comparison(results, "remit", NLL).steps == {}


def test_results_csv_has_a_row_of_each_arm_seed_and_metric(folder):
    rows = list(csv.DictReader(io.StringIO((folder / "results.csv").read_text())))
    assert len(rows) == 2 * 3 * 5
    row = next(row for row in rows if (row["arm"], row["seed"], row["metric"]) == ("longer", "2", PASS))
    assert float(row["value"]) == pytest.approx(0.51) and float(row["difference"]) == pytest.approx(0.01)
    assert (row["equal_flops"], float(row["tokens"]), float(row["flops"])) == ("remit", 2e6, 1.5e12)
    assert float(row["steps_to_control"]) == pytest.approx(400 * (0.50 / 0.51 - 0.25))
    control = [row for row in rows if row["arm"] == "uniform"]
    assert {row["difference"] for row in control} == {""} and {row["equal_flops"] for row in control} == {""}


def test_results_json_has_everything(folder):
    stored = json.loads((folder / "results.json").read_text())
    assert stored["arms"]["remit"]["flops_relative_to_control"] == pytest.approx(1.5)
    assert stored["arms"]["remit"]["seeds"]["3"] == {
        "folder": "remit/seed_3",
        "tokens": 2e6,
        "flops": 1.5e12,
        "metrics": {PASS: pytest.approx(0.46), NLL: 1.9},
        "curves": {"tasks/chains/pass@1": {"100": pytest.approx(0.23), "200": pytest.approx(0.345), "300": 0.46}},
    }
    remit = stored["metrics"][NLL]["arms"]["remit"]
    assert (remit["verdict"], remit["seeds"], remit["p"]) == ("better", 5, 1 / 16)
    assert (remit["difference"], remit["low"], remit["high"]) == pytest.approx((-0.1, -0.1, -0.1))


def test_the_same_measurements_in_any_order_give_the_same_bytes(whole, folder, tmp_path):
    def contents(out):
        return {str(path.relative_to(out)): path.read_bytes() for path in out.rglob("*") if path.is_file()}

    first = contents(folder)
    assert set(first) == {
        "index.html",
        "results.csv",
        "results.json",
        "results.md",
        "plots/nats_per_token_arms_and_seeds.svg",
        "plots/pass_1_chains_arms_and_seeds.svg",
        "plots/pass_1_chains_over_the_anneal.svg",
    }
    again = contents(written(tmp_path, whole[::-1]))
    assert {name for name in first if again[name] != first[name]} == set()


def test_the_page_has_tables_sentences_and_plots_and_escapes(folder):
    page = (folder / "index.html").read_text()
    assert not re.search(r"<script|<link|url\(|https?://", page)
    assert "<b>weighting" not in page and "<chains>" not in page and "weights &amp; gaps" in page
    images = re.findall(r'<img src="data:image/svg\+xml;base64,([^"]*)"', page)
    assert [ElementTree.fromstring(base64.b64decode(image)).tag.split("}")[1] for image in images] == ["svg"] * 3
    page = html.unescape(page)
    assert "remit is better than uniform with 5 seeds" in page and "15 of 15" in page
    assert "longer (FLOPs of remit)" in page and "straight line" in page


def test_a_metric_table_has_an_arm_per_row_the_control_first(whole):
    results = Results(EXPERIMENT, whole)
    table = metric_table(results, results.comparisons[PASS])
    low, high = comparison(results, "remit").interval[1:]
    difference = f"+0.0320 [{low:+.4f}, {high:+.4f}]"
    assert [row[0] for row in table.rows] == ["uniform", "remit", "longer (FLOPs of remit)"]
    assert dict(zip(table.header, table.rows[1], strict=True)) == {
        "arm": "remit",
        "seeds": "5",
        "mean": "0.4960",
        "difference to uniform": difference,
        "p": "0.0625",
        "verdict": "better",
        "steps to control's score": f"{comparison(results, 'remit').median_steps:.0f} (5 of 5)",
        "tokens": "2.00 M",
        "FLOPs to control's": "1.50×",
    }
    assert table.rows[2][6] == "not reached (2 of 5)"
    assert "steps to control's score" not in metric_table(results, results.comparisons[NLL]).header


def test_the_overview_has_a_metric_per_row_and_says_where_an_arm_can_be_told_from_the_control(whole):
    table = overview_table(Results(EXPERIMENT, [each for each in whole if each.arm != "longer"]))
    low, high = comparison(Results(EXPERIMENT, whole), "remit").interval[1:]
    assert table.header[1:] == ["uniform", "remit", "longer (FLOPs of remit)"]
    assert table.rows == [
        ["pass@1 <chains> (↑)", "0.464", f"+0.032 [{low:+.3f}, {high:+.3f}] better", "–"],
        ["nats per token (↓)", "2.000", "-0.100 [-0.100, -0.100] better", "–"],
    ]
    one = overview_table(Results(EXPERIMENT, [each for each in whole if each.seed == 1]))
    assert one.rows[0][2:] == ["+0.020", "-0.010"]


def test_the_markdown_has_the_same_tables(folder):
    lines = (folder / "results.md").read_text().splitlines()
    assert lines[0] == "## weighting" and f"`{NLL}`, less is better" in lines
    assert "| uniform | plain \\| next token | 5 of 5 | 2.00 M | 1e+12 | 1.00× |" in lines
    assert sum(line.startswith("| remit | 5 | ") for line in lines) == 2
    assert any(line.startswith("| nats per token (↓) | 2.000 | -0.100") for line in lines)
    assert sum(line.startswith("- remit is better than uniform") for line in lines) == 2


def test_partial_results_say_how_much_is_there(whole, tmp_path):
    found = [each for each in whole if each.arm == "remit" and each.seed < 3]
    page = html.unescape((written(tmp_path, found) / "index.html").read_text())
    assert "2 of 15" in page and "unfinished" in page and "Nothing can be compared yet." in page
    assert re.search(r'<th scope="row">remit</th><td>weights & gaps</td><td>2 of 5</td>', page)
    assert re.search(r'<th scope="row">uniform</th><td>plain \| next token</td><td>0 of 5</td><td>–</td>', page)


def test_nothing_measured_yet_is_a_page_too(tmp_path):
    out = written(tmp_path, [])
    assert "0 of 15" in (out / "index.html").read_text() and not (out / "plots").exists()
    assert (out / "results.csv").read_text().count("\n") == 1


def test_importing_the_results_draws_and_computes_nothing():
    program = "import sys, nemo_rmt.experiment.results; print([m for m in ('torch', 'matplotlib') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "[]", done.stdout + done.stderr
