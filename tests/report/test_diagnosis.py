"""What the report shows of how a reference guided the anneals: weighed tokens, the gap, agreement, domains."""

from __future__ import annotations

import base64
import json
import re

import pytest

from nemo_rmt.report import write_report
from nemo_rmt.report.diagnosis import domain_costs, section
from nemo_rmt.report.findings.remit import is_uniform
from nemo_rmt.report.run import Run
from nemo_rmt.report.tables import stage_rows
from nemo_rmt.report.weights import MAX_TOKENS, weighed_text

ANNEAL = "iteration_001/anneal"
ROW = {
    "documents": ["stdlib:12", "solutions:<7>"],
    "tokens": ["if", " x", " <", "\n", "b>", '"', "\x00", "<eod>"],
    "weights": [1.2, 1.0, 0.8, 1.1, 0.95, 1.0, 1.04, None],
    "gaps": [0.9, 0.0, -1.1, 0.41, -0.12, 0.01, 0.1, None],
}


def with_weights(run, *rows, stage=ANNEAL):
    """Write rows, (step, changes of ROW) each, as the anneal does."""
    lines = [json.dumps({"step": step, **ROW, **changes}) + "\n" for step, changes in rows]
    (run / stage / "weights.jsonl").write_text("".join(lines))


def with_gaps(run, iterations=(1,), **extra):
    """A gap around 0 that closes: bin 9 fills up from a twentieth of the tokens to all of them."""
    for iteration in iterations:
        path = run / f"iteration_{iteration:03}/anneal/metrics.jsonl"
        records = [json.loads(line) for line in path.open()]
        for place, record in enumerate(records):
            closed = place / (len(records) - 1)
            shares = [(1 - closed) / 20 + (closed if number == 9 else 0) for number in range(20)]
            record |= {f"remit/gap_hist_{number:02}": share for number, share in enumerate(shares)}
            record |= {"remit/gap_mean": -0.2, "remit/gap_abs": 0.6 - 0.3 * closed, **extra}
        path.write_text("".join(json.dumps(record) + "\n" for record in records))


def shown(run):
    """What is shown of iteration 1's weights."""
    loaded = Run.load(run)
    return weighed_text(loaded, loaded.stage(1, "anneal"))


def titles(run):
    found = section(Run.load(run))
    return [figure.title for figure in found.figures]


def test_a_run_without_any_of_it_has_domains_alone(finished_run):
    found = section(Run.load(finished_run))
    assert found.texts == [] and found.figures == [] and found.costs is not None


def test_tokens_are_coloured_by_how_far_their_weight_is_from_one(finished_run):
    with_weights(finished_run, (1, {}))
    (title, [row]), *_ = shown(finished_run).steps
    levels = [token.level for token in row.tokens]
    # 0.2 is the farthest from 1, a quarter of it a shade
    assert levels == ["high4", "", "low4", "high2", "low1", "", "high1", "none"]
    assert row.tokens[2].hint == "weight 0.800, gap -1.100 nats" and row.tokens[-1].hint == "does not count"
    assert title == "Before step 1: 1 of the 1 rows written down"
    assert dict(shown(finished_run).legend)["low4"] == "0.8" and dict(shown(finished_run).legend)["high2"] == "1.1"


def test_the_page_escapes_keeps_line_ends_and_stays_light(finished_run):
    many = {"tokens": ["token"] * 1000, "weights": [1.1] * 1000, "gaps": [0.1] * 1000}
    half_a_character = {"tokens": ["\ud83d", *ROW["tokens"][1:]]}
    with_weights(finished_run, (1, {}), (1, half_a_character), *[(step, many) for step in (1, 120) for _ in range(6)])
    with_gaps(finished_run, **{"remit/agreement": 0.9})
    page = write_report(finished_run).read_text()
    assert '<span class="low4" title="weight 0.800, gap -1.100 nats"> &lt;</span>' in page
    assert ">⏎\n</span>" in page and "\x00" not in page and page.count(">\N{REPLACEMENT CHARACTER}<") == 3
    assert "stdlib:12, solutions:&lt;7&gt;" in page and "&lt;eod&gt;" in page and "<eod>" not in page
    assert all(title in page for title in ("Agreement with the RL model", "What each domain pays"))
    assert not re.search(r"<script|<link|url\(|https?://", page) and len(page) < 1_000_000


def test_a_selection_is_shown_as_one(finished_run):
    with_weights(finished_run, (1, {"weights": [1, 0, 0, 1, 1, 0, 1, None]}))
    text = shown(finished_run)
    kept, left = text.steps[0][1][0].tokens[:2]
    assert (dict(text.legend)[kept.level], dict(text.legend)[left.level]) == ("trained on", "left out")


def test_first_and_last_step_stand_apart_and_torn_lines_are_left_out(finished_run):
    with_weights(finished_run, (1, {}), (1, {}), (120, {"documents": []}))
    with (finished_run / ANNEAL / "weights.jsonl").open("a") as file:
        file.write('{"step": 120, "tokens": ["a"], "weights": []}\n{"step": 120, "tok')
    first, last = shown(finished_run).steps
    assert (first[0], len(first[1])) == ("Before step 1: 2 of the 2 rows written down", 2)
    assert (last[0], last[1][0].documents) == ("Before step 120: 1 of the 1 rows written down", "unknown document")


def test_long_rows_are_cut(finished_run):
    many = {"tokens": ["a"] * 500, "weights": [1.0] * 499 + [1.1], "gaps": [0.0] * 500}
    with_weights(finished_run, *[(1, many)] * 8)
    (title, rows), *_ = shown(finished_run).steps
    assert title == "Before step 1: 2 of the 8 rows written down"
    assert [len(row.tokens) for row in rows] == [500, MAX_TOKENS - 500 + 1] and rows[1].tokens[-1].text == " …"


def test_the_tables_have_the_last_steps_tokens_by_their_mean_weight(finished_run):
    def row(heavy):
        tokens, weights = ["then", "of", "\n", "once"], [heavy, 0.9, 1.0, 5.0]
        return {"tokens": tokens * 2, "weights": weights + [1.1, 0.7, 1.0, None], "gaps": [0.5, -0.5, 0.0, 1.0] * 2}

    with_weights(finished_run, (1, row(0.1)), (120, row(1.2)), (120, row(1.4)))
    most, least = shown(finished_run).extremes
    # "once" has weights twice only; of the three others half, rounded down, are in each table
    assert most.rows == [['"then"', "1.200", "+0.500", "4"]] and least.rows == [['"of"', "0.800", "-0.500", "4"]]
    assert most.header[0] == "weigh most" and most.sources == [f"{ANNEAL}/weights.jsonl"]


def test_the_gap_is_drawn_where_its_distribution_was_logged(finished_run):
    assert titles(finished_run) == []
    with_gaps(finished_run)
    assert titles(finished_run) == ["The gap over training, iteration 1"]
    image = section(Run.load(finished_run)).figures[0].image
    drawn = base64.b64decode(image.split(",")[1]).decode()
    assert "Distribution of the gap, nats" in drawn and "data:image/png" in drawn


def test_steps_without_a_finite_gap_are_left_out(finished_run):
    with_gaps(finished_run)
    path = finished_run / ANNEAL / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    lines[3] = re.sub(r'"remit/gap_hist_07": [^,]*', '"remit/gap_hist_07": null', lines[3])
    path.write_text("".join(lines))
    assert titles(finished_run) == ["The gap over training, iteration 1"]


@pytest.mark.parametrize(
    ("reference", "name"),
    [
        ("previous", "RL model"),
        ("previous_sft", "SFT model"),
        ("/models/rl", "reference"),
        ({"cache": "c"}, "reference"),
    ],
)
def test_agreement_is_named_after_the_reference(make_a_run, reference, name):
    run = make_a_run(changes={"anneal": {"steps": 120, "remit": {"reference": reference}}})
    with_gaps(run, **{"remit/agreement": 0.9})
    assert titles(run)[-1] == f"Agreement with the {name}"


@pytest.mark.parametrize(
    ("reference", "uniform"),
    [("previous", True), ("previous_sft", True), ("/models/rl", False), ({"cache": "c"}, False)],
)
def test_iteration_0_is_uniform_where_its_reference_is_made_by_the_run(make_a_run, reference, uniform):
    run = Run.load(make_a_run(changes={"anneal": {"steps": 120, "remit": {"reference": reference}}}))
    assert is_uniform(run, run.stage(0, "anneal")) == uniform


@pytest.mark.parametrize(("logged", "name"), [("rho1/selected", "Rho-1"), ("distill/divergence", "distillation")])
def test_an_anneal_is_called_by_its_objective(finished_run, logged, name):
    path = finished_run / "iteration_000/anneal/metrics.jsonl"
    path.write_text("".join(json.dumps(json.loads(line) | {logged: 0.5}) + "\n" for line in path.open()))
    names = [row["name"] for row in stage_rows(Run.load(finished_run)) if row["name"].startswith("anneal")]
    assert names == [f"anneal ({name})", "anneal (ReMiT)"]


def test_domains_and_tasks_stand_side_by_side_with_the_change(finished_run):
    card = domain_costs(Run.load(finished_run))
    assert card.title == "What each domain pays"
    assert card.table.header == ["held out, base model", "iteration 0", "iteration 1"]
    rows = {row[0]: row[1:] for row in card.table.rows}
    assert rows["solutions, nats per token"] == ["0.9600", "0.9610 (+0.0010)"]
    assert list(rows)[2] == "all text, nats per token"
    assert rows["chains: pass@1"] == ["47.1 % [44.1, 50.1]", "56.5 % (+9.4 points [+5.2, +13.6])"]
    assert "chains, longer problems: pass@1" in rows


def test_one_evaluated_anneal_has_nothing_to_compare(make_a_run):
    run = make_a_run(changes={"anneal": {"enabled": False}})
    assert section(Run.load(run)) is None
