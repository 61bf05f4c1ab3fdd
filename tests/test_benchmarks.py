"""Every benchmark runs with its smallest shapes and prints what it promises; and what becomes of its lines."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
sys.path.append(str(BENCHMARKS))

import run as suite  # noqa: E402
from measuring import alternately, ratio  # noqa: E402
from tables import cell, markdown, plot_curves, table  # noqa: E402

RATIO = {"ratio", "ratio_min", "ratio_max"}
PROMISED = {
    "checkpoint": {*RATIO, "sync_seconds", "async_seconds", "step_ratio"},
    "cost_curves": {"curve"},
    "flywheel_parts": {"stage", "total_s", "seconds"},
    "grpo_trl": RATIO,
    "logprob_head": {*RATIO, "memory_ratio", "chunked_peak_mib", "full_peak_mib"},
    "packing": RATIO,
    "remit_step": RATIO,
    "rmt_step": {*RATIO, "ratio_of_tokens", "ratio_of_flops", "tree_peak_mib", "copies_peak_mib"},
    "rollout": RATIO,
    "train_step": {"tokens_per_s", "model_tflops_per_s"},
}
"""Keys of each line besides those that every line has."""
MACHINE = {"date": "2026-01-02", "cpu": "a CPU", "cores": 2, "memory_gib": 23, "gpu": None,
           "versions": {"torch": "2.9"}, "commit": "abc"}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", PROMISED)
def test_a_benchmark_prints_json_lines_with_what_it_promises(name):
    if name == "grpo_trl":
        pytest.importorskip("trl")
    lines = lines_of(name, "--quick")
    assert lines
    for line in lines:
        assert line["benchmark"] == name
        assert {"device", "threads", *PROMISED[name]} <= set(line)
        assert line.get("ratio", 1) > 0


def lines_of(name: str, *arguments: str) -> list[dict]:
    """A benchmark's lines, one thread."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TORCH_COMPILE_DISABLE": "1", "PYTHONWARNINGS": "ignore"}
    command = [sys.executable, str(BENCHMARKS / f"{name}.py"), *arguments]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_the_suite_runs_every_benchmark_that_needs_no_argument():
    assert set(suite.BENCHMARKS) == set(PROMISED)


def test_a_benchmark_that_fails_does_not_stop_the_others(tmp_path, monkeypatch, capsys):
    line = {"ratio": 2.0, "device": "cpu", "threads": 1}
    for name, status in {"bad": 3, "good": 0}.items():
        text = json.dumps({"benchmark": name, **line})
        (tmp_path / f"{name}.py").write_text(f'"""It is {name}."""\nprint({text!r})\nraise SystemExit({status})\n')
    monkeypatch.setattr(suite, "HERE", tmp_path)
    monkeypatch.setattr(suite, "BENCHMARKS", {"bad": [], "good": []})
    monkeypatch.setattr(sys, "argv", ["run.py", "--output", str(tmp_path / "out")])
    with pytest.raises(SystemExit) as left:
        suite.main()
    assert left.value.code == 1
    assert "bad exited 3" in capsys.readouterr().err
    machine, *lines = map(json.loads, (tmp_path / "out/results.jsonl").read_text().splitlines())
    assert machine["cores"] >= 1
    assert [line["benchmark"] for line in lines] == ["bad", "good"]
    assert "### good\n\nIt is good.\n\n`python benchmarks/good.py`" in (tmp_path / "out/RESULTS.md").read_text()


def test_variants_are_measured_in_turn_and_every_other_time_in_reverse():
    order = []
    seconds = alternately({name: lambda name=name: order.append(name) for name in "ab"}, pairs=3)
    assert "".join(order) == "ab" + "ab" + "ba" + "ab"
    assert [len(values) for values in seconds.values()] == [3, 3]


def test_a_ratio_is_taken_pair_by_pair():
    found = ratio({"slow": [2.0, 9.0, 8.0], "fast": [1.0, 3.0, 2.0]}, over="slow", under="fast")
    assert found == {
        "ratio": 3.0,
        "ratio_min": 2.0,
        "ratio_max": 4.0,
        "slow_seconds": 8.0,
        "fast_seconds": 2.0,
    }


def test_a_table_has_a_row_per_line_and_says_once_what_all_share():
    lines = [{"benchmark": "b", "command": "c", "shape": f"{n},1", "ratio": n / 3, "device": "cpu"} for n in (1, 2)]
    assert table(lines).splitlines() == [
        "device cpu:",
        "",
        "| shape | ratio |",
        "| --- | --- |",
        "| 1,1 | 0.3333 |",
        "| 2,1 | 0.6667 |",
    ]


@pytest.mark.parametrize(
    ("value", "text"),
    [(12345, "12,345"), (1234.5, "1,234"), (0.12345, "0.1235"), (True, "yes"), (None, "–"), ({"a": 1.5}, "a 1.5")],
)
def test_values_are_written_for_people(value, text):
    assert cell(value) == text


def test_lines_of_other_keys_are_a_table_of_their_own():
    lines = [{"benchmark": "b", "command": "python b.py", "x": 1}, {"benchmark": "b", "command": "python b.py", "y": 2}]
    page = markdown(MACHINE, lines, {"b": "What b is."})
    assert page.startswith("## 2026-01-02, 2 cores of a CPU, 23 GiB, no GPU\n")
    assert page.count("### b\n\nWhat b is.\n\n`python b.py`\n") == 1
    assert "| x |" in page and "| y |" in page


def test_the_curves_are_drawn_with_what_is_expected(tmp_path):
    point = {"benchmark": "cost_curves", "curve": "layers", "seconds": 1.0, "expected_seconds": 1.0,
             "peak_mib": 3.0, "plan_mib": 2.0}  # fmt: skip
    whole = {"benchmark": "cost_curves", "curve": "layers", "time_exponent": 1.0}
    plot_curves([{**point, "x": 1}, {**point, "x": 2}, whole], tmp_path / "curves.png")
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
