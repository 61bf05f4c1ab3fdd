"""What the report says of RMT, on finished, partial and baseline run folders."""

from __future__ import annotations

import base64
import html
import json
import math
import re
import shutil
from statistics import fmean

import matplotlib
import pytest
import yaml

from nemo_rmt.report import figures, write_report
from nemo_rmt.report.drawing import STYLE
from nemo_rmt.report.findings import all_findings
from nemo_rmt.report.reasoning import before_and_after
from nemo_rmt.report.rmt import accuracy_card, section
from nemo_rmt.report.run import Run

RMT = {"steps": 100, "document_length": 128}
MODELS = ("annealed", "after RMT", "after SFT", "after RL")


def written(run):
    """The page, and RMT's findings by iteration."""
    page = html.unescape(write_report(run).read_text())
    summary = json.loads((run / "report" / "summary.json").read_text())
    return page, {found["iteration"]: found for found in summary["findings"] if found["topic"] == "RMT"}


def told(run):
    """RMT's findings by iteration, without the page, whose figures take a second."""
    return {found.iteration: found for found in all_findings(Run.load(run)) if found.topic == "RMT"}


def figure(page, title):
    """The SVG under a title, None without it."""
    match = re.search(rf'<h3>{re.escape(title)}</h3>\s*<img src="data:image/svg\+xml;base64,([^"]*)"', page)
    return base64.b64decode(match[1]).decode() if match else None


def cells(page, row, nth=0):
    """The cells of the nth table row with this name."""
    rows = re.findall(rf'<th scope="row">{re.escape(row)}</th>(.*?)</tr>', page)
    return re.findall("<td>(.*?)</td>", rows[nth])


def change_state(run, iteration, **statuses):
    state = json.loads((run / "state.json").read_text())
    for stage, status in statuses.items():
        state["iterations"][iteration][stage]["status"] = status
    (run / "state.json").write_text(json.dumps(state))


def test_the_finding_gives_the_difference_with_its_interval_and_the_length_against_the_budget(finished_run):
    page, findings = written(finished_run)
    # 0.12 before and 0.46 after, both ± 0.03
    half = 100 * math.hypot(0.03, 0.03)
    expected = (
        "12.0 % [9.0, 15.0] were right after a sampled thought before and 46.0 % [43.0, 49.0] after: +34.0 points"
    )
    assert f"{expected} [+{34 - half:.1f}, +{34 + half:.1f}]" in findings[0]["text"]
    records = [json.loads(line) for line in (finished_run / "iteration_000/rmt/metrics.jsonl").open()]
    end, budget = fmean(record["rmt/think_length"] for record in records[-10:]), records[-1]["rmt/budget"]
    assert f"thoughts took {end:.1f} tokens" in findings[0]["text"]
    assert f"{100 * end / budget:.0f} % of the final budget of {budget}." in findings[0]["text"]
    assert "took 1.4600 nats per token before and 1.4630 after (+0.0030)" in findings[0]["text"]
    assert "Thinking before predicting them is now better than predicting them directly: +30.0 points" in page


def test_the_table_has_every_model_on_every_tier(finished_run):
    page, _ = written(finished_run)
    for tier in ("hard", "medium", "easy"):
        assert all(cells(page, f"{tier}: {model}") for model in MODELS)
    assert cells(page, "hard: annealed")[:3] == ["15.0 % [12.0, 18.0]", "12.0 % [9.0, 15.0]", "13.0 % [10.0, 16.0]"]
    assert cells(page, "hard: after RMT")[2:] == ["50.0 % [47.0, 53.0]", "16.0", "98.0 %"]
    assert "400 hard, 300 medium, 300 easy positions" in page


def test_iterations_stand_side_by_side_in_the_figures(finished_run):
    page, _ = written(finished_run)
    for title, panel in (
        ("RMT over its steps", "Groups with a match"),
        ("Held-out tokens predicted directly and after a thought", "hard tokens"),
    ):
        drawn = figure(page, title)
        assert all(f">{panel}: iteration {iteration}<" in drawn for iteration in (0, 1))


def test_the_papers_figures_are_marked_as_its_own_and_ours_come_from_the_run(finished_run):
    page, _ = written(finished_run)
    assert "Beside the paper's own figures, which are not comparable in scale" in page
    change = cells(page, "right after a thought, relative change")
    assert change == [
        *[f"{100 * (0.46 / 0.12 - 1):+.1f} % (12.0 to 46.0 %)"] * 2,
        "up to +64.91 %",
    ]
    records = [json.loads(line) for line in (finished_run / "iteration_001/rmt/metrics.jsonl").open()]
    lengths = [record["rmt/think_length"] for record in records]
    ratio = f"{100 * fmean(lengths[-10:]) / fmean(lengths[:10]):.0f} % of the start's"
    assert cells(page, "length of thoughts")[1:] == [ratio, "21 % of the state of the art's"]


NO_CHANGE = {"hard": (0.16, 0.13, 0.14)}
WORSE = {"hard": (0.16, 0.03, 0.03)}
SHARPER = ({"hard": (0.15, 0.30, 0.60)}, {"hard": (0.15, 0.58, 0.61)})
BEFORE, AFTER = {"hard": (0.15, 0.12, 0.13)}, {"hard": (0.45, 0.46, 0.47)}


@pytest.mark.parametrize(
    ("before", "after", "verdict", "said"),
    [
        (BEFORE, NO_CHANGE, "no change", "RMT made no difference to predictions after a thought that these positions"),
        (BEFORE, WORSE, "worse", "RMT made predictions after a thought worse on held-out hard tokens"),
        (*SHARPER, "sharpening", "RMT made existing skill more reliable and did not teach new skill"),
        ({"hard": (0.45, 0.12, 0.13)}, AFTER, "caught up", "not beyond what the annealed model predicts directly"),
    ],
)
def test_negative_outcomes_are_said(make_a_run, before, after, verdict, said):
    finding = told(make_a_run(before=before, after=after))[0]
    assert finding.verdict == verdict and said in finding.conclusion
    assert "raised accuracy" not in finding.text or verdict == "caught up"


@pytest.mark.parametrize(
    ("direct", "said"),
    [
        (0.60, "Thinking before predicting them is still worse than predicting them directly: -14.0 points"),
        (0.48, "is below, though not measurably worse than, predicting them directly: -2.0 points"),
        (0.44, "is not measurably better than predicting them directly: +2.0 points"),
    ],
)
def test_thinking_that_does_not_beat_predicting_directly_is_said(make_a_run, direct, said):
    assert said in told(make_a_run(after={"hard": (direct, 0.46, 0.50)}))[0].conclusion


def test_a_tier_without_positions_is_not_mentioned(make_a_run):
    shares = {"easy": (0.96, 0.55, 0.62), "medium": (0.60, 0.33, 0.37)}
    page, findings = written(make_a_run(before=shares, after={**shares, "medium": (0.60, 0.72, 0.75)}))
    assert "held-out medium tokens" in findings[0]["text"] and "hard" not in findings[0]["text"]
    assert ">hard: " not in page and "hard tokens" not in figure(
        page, "Held-out tokens predicted directly and after a thought"
    )
    assert cells(page, "right after a thought, relative change")[:2] == ["–", "–"]


def test_without_any_positions_only_the_length_and_the_text_are_told(make_a_run):
    run = make_a_run(before={}, after={})
    finding = told(run)[0]
    assert finding.verdict == "not evaluated" and "of the final budget of 16" in finding.text
    assert [card.title for card in section(Run.load(run)).cards] == [
        "Beside the paper's own figures, which are not comparable in scale"
    ]


def test_an_annealed_model_that_is_never_right_has_no_relative_change(make_a_run):
    paper = section(Run.load(make_a_run(before={"hard": (0.15, 0.0, 0.0)}))).cards[-1]
    assert paper.table.rows[0][1] == "0.0 to 46.0 %"


def test_without_a_budget_none_is_told(make_a_run):
    settings = RMT | {
        "budget": {"schedule": "none", "initial": 24},
        "prompt": {"instruction": ""},
        "reward": {"length_weight": 0.0},
    }
    page, findings = written(make_a_run(changes={"rmt": settings}))
    assert "there was no budget" in findings[0]["text"] and "final budget" not in findings[0]["text"]
    assert ">budget<" not in figure(page, "RMT over its steps")


def test_the_baseline_of_next_token_prediction_is_named_as_such(make_a_run):
    settings = RMT | {"objective": "ntp", "budget": {"initial": 24}}
    page, findings = written(make_a_run(changes={"rmt": settings}, after=NO_CHANGE))
    assert figure(page, "RMT over its steps") is None and "64.91" not in page
    assert findings[0]["text"].startswith("Next-token prediction in RMT's place made no difference")
    assert "rmt (next-token prediction)" in page and cells(page, "hard: after next-token prediction")


def test_the_baseline_without_held_out_positions_has_no_section(make_a_run):
    settings = RMT | {"objective": "ntp", "budget": {"initial": 24}}
    run = Run.load(make_a_run(changes={"rmt": settings}, before={}, after={}))
    assert section(run) is None and figures.losses(run) is not None


def test_a_run_without_rmt_does_not_wait_for_it(make_a_run):
    run = make_a_run(changes={"rmt": {"enabled": False}})
    page, findings = written(run)
    summary = json.loads((run / "report" / "summary.json").read_text())
    assert summary["status"] == "done" and "rmt" not in summary["iterations"][0]["stages"]
    assert findings == {} and "<h2>RMT</h2>" not in page


def test_a_run_of_rmt_alone_compares_it_with_the_model_it_started_from(make_a_run):
    left_out = {name: {"enabled": False} for name in ("anneal", "sft", "rl")}
    folder = make_a_run(changes={**left_out, "iterations": 1})
    run = Run.load(folder)
    assert [stage.name for stage in run.stages if stage.iteration == 0] == ["data", "pretrain", "rmt", "evaluate"]
    before, after = before_and_after(run, 0)["hard"]
    assert (before.thought.value, after.thought.value) == (0.12, 0.46)
    names = [row[0] for row in accuracy_card(run, 0).table.rows]
    assert names == [f"{tier}: {name}" for tier in ("hard", "medium", "easy") for name in ("pre-trained", "after RMT")]
    assert "after RL" not in write_report(folder).read_text()


def test_a_recipe_from_before_rmt_has_none(make_a_run):
    run = make_a_run(changes={"rmt": {"enabled": False}})
    recipe = yaml.safe_load((run / "flywheel.yaml").read_text())
    del recipe["rmt"]
    (run / "flywheel.yaml").write_text(yaml.safe_dump(recipe))
    assert Run.load(run).status == "done"


def test_while_rmt_runs_its_curves_are_drawn_and_nothing_is_concluded(finished_run):
    shutil.rmtree(finished_run / "iteration_001")
    change_state(finished_run, 0, rmt="running", sft="pending", rl="pending", evaluate="pending")
    path = finished_run / "iteration_000/rmt/metrics.jsonl"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:30]) + '{"step": 31, "rmt/thi')
    page, findings = written(finished_run)
    assert findings == {} and "64.91" not in page
    assert "Groups with a match" in figure(page, "RMT over its steps")


def test_the_first_step_alone_is_enough_for_a_figure(finished_run):
    path = finished_run / "iteration_000/rmt/metrics.jsonl"
    path.write_text('{"step": 1, "time": 0.0, "rmt/match_rate": 0.5, "rmt/think_length": null}\n')
    assert "RMT over its steps" in [drawn.title for drawn in section(Run.load(finished_run)).figures]


def test_a_finished_stage_that_was_not_evaluated_tells_its_length_only(finished_run):
    change_state(finished_run, 1, evaluate="pending")
    finding = told(finished_run)[1]
    assert finding.verdict == "not evaluated" and "final budget" in finding.text
    titles = " ".join(card.title for card in section(Run.load(finished_run)).cards)
    assert "Iteration 0: next-token accuracy" in titles and "Iteration 1: next-token accuracy" not in titles


@pytest.mark.parametrize(("name", "is_drawn"), [("ntp/loss", True), ("rl/loss", True), ("train/loss", False)])
def test_rmts_terms_are_drawn_and_not_their_weighted_sum(finished_run, name, is_drawn):
    path = finished_run / "iteration_000/rmt/metrics.jsonl"
    records = [json.loads(line) | {name: 7777.0} for line in path.open()]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    with matplotlib.rc_context(STYLE):
        image = figures.losses(Run.load(finished_run)).image
    # an axis reaches as far as what is drawn on it
    assert bool(re.search(b">[1-9]000<", base64.b64decode(image.split(",")[1]))) == is_drawn
