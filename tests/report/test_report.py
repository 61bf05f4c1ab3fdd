"""write_report on finished, partial and broken run folders."""

from __future__ import annotations

import base64
import html
import json
import re
import shutil
import subprocess
import sys
from xml.etree import ElementTree

import pytest

from nemo_rmt.errors import UserError
from nemo_rmt.report import write_report

SKILLS = {
    (0, "sft"): ((0.10, 0.12, 0.30), (0.08, 0.09, 0.25)),
    (0, "rl"): ((0.90, 0.92, 0.95), (0.70, 0.75, 0.85)),
}


def page_and_summary(run):
    page = write_report(run)
    return html.unescape(page.read_text()), json.loads((run / "report" / "summary.json").read_text())


def verdicts(summary):
    return [(finding["topic"], finding["iteration"], finding["verdict"]) for finding in summary["findings"]]


def change_state(run, iteration, stage, **entries):
    state = json.loads((run / "state.json").read_text())
    state["iterations"][iteration][stage].update(entries)
    (run / "state.json").write_text(json.dumps(state))


def test_summary_holds_every_stage_result(finished_run):
    assert write_report(finished_run) == finished_run / "report" / "index.html"
    _, summary = page_and_summary(finished_run)
    assert summary["recipe"] == "tiny" and summary["status"] == "done"
    assert [entry["iteration"] for entry in summary["iterations"]] == [0, 1]
    assert list(summary["iterations"][0]["stages"]) == ["data", "pretrain", "anneal", "rmt", "sft", "rl", "evaluate"]
    assert list(summary["iterations"][1]["stages"]) == ["anneal", "rmt", "sft", "rl", "evaluate"]
    for number, entry in enumerate(summary["iterations"]):
        for name, stage in entry["stages"].items():
            assert stage == json.loads((finished_run / f"iteration_{number:03d}/{name}/result.json").read_text())


def test_findings_follow_the_numbers(finished_run):
    page, summary = page_and_summary(finished_run)
    assert verdicts(summary) == [
        ("pre-training", 0, "beats unigram"),
        ("RMT", 0, "better"),
        ("RL", 0, "sharpening"),
        ("ReMiT", 1, "higher"),
        ("RMT", 1, "better"),
        ("RL", 1, "sharpening"),
    ]
    assert "RL sharpened existing skill and did not teach new skill" in page
    assert "longer problems did not move" in page
    assert "49.0 % [46.0, 52.0] after SFT to 96.8 % [93.8, 99.8] after RL: +47.8 points [+43.6, +52.0]" in page
    assert "the same checkpoint and rows" in page and "+9.4 points [+5.2, +13.6]" in page


def test_new_skill_is_said_where_the_numbers_show_it(make_a_run):
    page, summary = page_and_summary(make_a_run(skills=SKILLS))
    assert ("RL", 0, "new skill") in verdicts(summary)
    assert "RL taught new skill" in page and "sharpened existing skill" not in page


def test_the_same_checkpoint_and_rows_are_claimed_only_when_every_iteration_starts_from_the_stable_one(make_a_run):
    page, _ = page_and_summary(make_a_run(changes={"flywheel": {"start_from": "previous"}}))
    assert "same checkpoint and rows" not in page and "not a controlled comparison" in page


def test_no_uniform_anneal_is_claimed_when_iteration_0_used_a_reference_too(make_a_run):
    run = make_a_run(changes={"anneal": {"steps": 120, "remit": {"reference": "/models/rl"}}})
    page, summary = page_and_summary(run)
    assert ("ReMiT", 1, "no comparison") in verdicts(summary)
    assert "same checkpoint and rows" not in page


def test_pretraining_worse_than_unigram_is_said(finished_run):
    path = finished_run / "iteration_000/evaluate/result.json"
    result = json.loads(path.read_text())
    result["metrics"]["pretrain/lm/all/nll"] = 5.0
    path.write_text(json.dumps(result))
    page, summary = page_and_summary(finished_run)
    assert verdicts(summary)[0] == ("pre-training", 0, "not better than unigram")
    assert "Pre-training has not learned more" in page


def test_the_page_needs_no_other_file(finished_run):
    page = write_report(finished_run).read_text()
    assert not re.search(r"<script|<link|url\(|https?://", page)
    sources = re.findall(r'<img src="([^"]*)"', page)
    assert len(sources) == 7 and all(source.startswith("data:image/svg+xml;base64,") for source in sources)
    for source in sources:
        assert ElementTree.fromstring(base64.b64decode(source.split(",")[1])).tag.endswith("svg")


def test_every_source_named_on_the_page_is_a_file_of_the_run(finished_run):
    page, _ = page_and_summary(finished_run)
    named = set(re.findall(r"<code>(iteration_[^<]*\.json[^<]*)</code>", page))
    assert len(named) >= 8
    assert all((finished_run / name).is_file() for name in named)


def test_tier_accuracy_is_in_the_page(finished_run):
    page, _ = page_and_summary(finished_run)
    assert "easy (< 0.5 nats)" in page and "22.0 % of 17 % of tokens" in page


def test_how_far_the_sampler_was_from_the_trainer_is_drawn_where_it_was_measured(finished_run):
    write_report(finished_run)
    page = (finished_run / "report" / "index.html").read_text()
    assert "The sampler against the trainer" in page
    for steps in finished_run.glob("iteration_*/r*/metrics.jsonl"):
        steps.write_text(steps.read_text().replace("rollout/", "other/"))
    write_report(finished_run)
    assert "The sampler against the trainer" not in (finished_run / "report" / "index.html").read_text()


def test_where_the_time_went_is_shown_for_the_stages_that_were_profiled(finished_run):
    title = "Where the time went"
    assert title not in page_and_summary(finished_run)[0]
    for stage, seconds in (("pretrain", {"forward_backward": 90.0, "start": 30.0}), ("rl", {"rollout": 45.0})):
        profile = finished_run / "iteration_000" / stage / "profile" / "parts.json"
        profile.parent.mkdir(exist_ok=True)
        profile.write_text(json.dumps({"seconds": seconds}))
    page, _ = page_and_summary(finished_run)
    assert title in page and page.count("profile/parts.json") == 4  # under the figure and under the table
    cells = re.search(r"iteration 0, pretrain</th>(.*?)</tr>", page)[1]
    assert re.findall(r"<td>(.*?)</td>", cells) == ["2 min 00 s", "30 s", "–", "1 min 30 s"]
    (finished_run / "iteration_000" / "rl" / "profile" / "parts.json").write_text("{torn")
    assert title in page_and_summary(finished_run)[0]


def test_a_failed_stage_shows_with_its_log_and_what_follows_is_pending(finished_run):
    change_state(finished_run, 1, "rl", status="failed")
    change_state(finished_run, 1, "evaluate", status="pending")
    page, summary = page_and_summary(finished_run)
    assert summary["status"] == "failed"
    assert summary["iterations"][1]["stages"]["rl"] == {"status": "failed"}
    assert summary["iterations"][1]["stages"]["evaluate"] == {"status": "pending"}
    assert "The stage failed after step 60" in page and "iteration_001/rl/log/rank_0.log" in page
    assert ("RL", 0, "sharpening") in verdicts(summary) and ("RL", 1, "sharpening") not in verdicts(summary)


def test_a_deleted_stage_folder_shows_as_having_no_result(finished_run):
    shutil.rmtree(finished_run / "iteration_000/sft")
    page, summary = page_and_summary(finished_run)
    assert summary["iterations"][0]["stages"]["sft"] == {"status": "no result"}
    assert "its result.json is missing or not readable" in page


def test_a_run_that_has_just_started_has_a_page(finished_run):
    for folder in finished_run.glob("iteration_*"):
        shutil.rmtree(folder)
    (finished_run / "state.json").unlink()
    page, summary = page_and_summary(finished_run)
    assert summary["status"] == "unfinished" and summary["findings"] == []
    assert len(summary["iterations"]) == 2 and "No stage has been evaluated yet" in page


def test_a_run_without_pretraining_does_not_wait_for_it(make_a_run):
    run = make_a_run(changes={"pretrain": {"checkpoint": "/models/base", "steps": 300}})
    state = json.loads((run / "state.json").read_text())
    del state["iterations"][0]["pretrain"]
    (run / "state.json").write_text(json.dumps(state))
    _, summary = page_and_summary(run)
    assert "pretrain" not in summary["iterations"][0]["stages"] and summary["status"] == "done"


def test_a_state_file_without_a_recipe_is_enough(finished_run):
    (finished_run / "flywheel.yaml").unlink()
    _, summary = page_and_summary(finished_run)
    assert summary["recipe"] == "unnamed" and ("RL", 0, "sharpening") in verdicts(summary)


def test_values_that_are_not_finite_and_torn_lines_are_survived(finished_run):
    with (finished_run / "iteration_000/rl/metrics.jsonl").open("a") as file:
        file.write('{"step": 61, "train/loss": null, "rl/reward_mean": null}\n{"step": 62, "tra')
    path = finished_run / "iteration_000/evaluate/result.json"
    path.write_text(path.read_text().replace('"tasks/chains/response_length": 21.0', '"tasks/chains/other": NaN'))
    _, summary = page_and_summary(finished_run)
    assert summary["iterations"][0]["stages"]["evaluate"]["metrics"]["tasks/chains/other"] is None


def test_names_are_escaped(make_a_run):
    page = write_report(make_a_run(changes={"name": "<b>bold</b> & co"})).read_text()
    assert "<b>bold" not in page and "&lt;b&gt;bold&lt;/b&gt; &amp; co" in page


def test_writing_again_replaces_the_report_and_leaves_nothing_behind(finished_run):
    write_report(finished_run)
    write_report(finished_run)
    assert sorted(path.name for path in (finished_run / "report").iterdir()) == ["index.html", "summary.json"]


def test_a_long_run_does_not_make_a_heavy_page(finished_run):
    with (finished_run / "iteration_000/pretrain/metrics.jsonl").open("w") as file:
        for step in range(1, 20_001):
            file.write(json.dumps({"step": step, "time": 0.0, "train/loss": 2.0, "train/lr": 1e-3}) + "\n")
    assert write_report(finished_run).stat().st_size < 1_000_000


@pytest.mark.parametrize("make", [lambda path: None, lambda path: path.mkdir()])
def test_a_folder_that_is_no_run_is_refused(tmp_path, make):
    make(tmp_path / "absent")
    with pytest.raises(UserError, match=r"run_dir=.*absent .*: give the folder of a run"):
        write_report(tmp_path / "absent")


def test_the_report_imports_neither_torch_nor_megatron():
    program = "import sys, nemo_rmt.report; sys.exit('torch' in sys.modules or 'megatron' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
