"""Does RMT teach a model to think before hard tokens? RMT, RPT, three ablations and plain next-token prediction.

``python benchmarks/rmt_evidence.py`` takes about an hour on two cores. For each seed it runs the recipe ``small`` up to
the annealed model once, and from that model every arm: the stage rmt with ``recipes/baselines/ARM.yaml``, then the same
held-out measurements before and after. Next-token prediction gets as much compute as RMT: a trained token counts 3, one
computed while sampling 1 (forward 1, backward 2). It leaves ``results.json`` (every seed's figures), ``table.md`` and
``rmt_evidence.png`` in ``--out``. What is done is not done again. Runs go side by side, ``--jobs`` at a time, each on
one thread.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot  # noqa: E402

from nemo_rmt.recipe_io import load_recipe  # noqa: E402
from nemo_rmt.stages.job import StageJob  # noqa: E402
from nemo_rmt.tracking import read_metrics  # noqa: E402

BASELINES = Path(__file__).parents[1] / "recipes" / "baselines"
ARMS = ("rmt", "rpt", "no_budget", "no_curriculum", "no_ntp", "ntp")
TIERS = ("easy", "medium", "hard")
T_QUANTILE = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776}
"""Two-sided 95 % quantiles of Student's t for that many seeds."""


def run(*command: str, log: Path) -> None:
    """A command on one thread; its output goes to ``log``, and to the error when it fails."""
    log.parent.mkdir(parents=True, exist_ok=True)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with open(log, "ab") as output:
        status = subprocess.run(command, stdout=output, stderr=output, env=environment, check=False).returncode
    if status:
        raise RuntimeError(f"{' '.join(command)} exited {status}:\n{log.read_text()[-2000:]}")


def overrides(run_dir: Path, seed: int) -> list[str]:
    """What every run of a seed has in common."""
    return [f"run_dir={run_dir}", f"seed={seed}", "cluster.threads=1", "tracking.tensorboard=false"]


def base(out: Path, seed: int, changes: list[str]) -> Path:
    """The annealed model all arms of a seed start from."""
    folder = out / f"seed_{seed}" / "base"
    for stage in ("data", "pretrain", "anneal"):
        if not (folder / "iteration_000" / stage / "result.json").exists():
            words = [*overrides(folder, seed), *changes]
            run(
                sys.executable, "-m", "nemo_rmt", "stage", stage, "small", *words, log=out / f"seed_{seed}" / "base.log"
            )
    print(f"seed {seed}: annealed", flush=True)
    return folder


def arm(out: Path, seed: int, name: str, changes: list[str]) -> None:
    """Train one arm and measure the model before and after it."""
    root, source = out / f"seed_{seed}" / name, out / f"seed_{seed}" / "base"
    yaml = [] if name == "rmt" else [BASELINES / f"{name}.yaml"]
    recipe = load_recipe("small", yaml, [*overrides(root, seed), *changes])
    if name == "ntp":
        recipe.rmt.steps = steps_of_equal_compute(out / f"seed_{seed}" / "rmt", recipe.rmt.steps)
    start = json.loads((source / "iteration_000/anneal/result.json").read_text())["checkpoint"]
    inputs = {"data": str((source / "iteration_000/data").resolve()), "checkpoint": str((source / start).resolve())}
    execute(root, "rmt", recipe, inputs)
    trained = json.loads((root / "rmt" / "result.json").read_text())["checkpoint"]
    measured = {"data": inputs["data"], "anneal": inputs["checkpoint"], "rmt": trained}
    execute(root, "evaluate", recipe, measured)
    print(f"seed {seed}: {name}", flush=True)


def execute(root: Path, stage: str, recipe: Any, inputs: dict[str, str]) -> None:
    """Run one stage from its stage.yaml unless it is done."""
    if (root / stage / "result.json").exists():
        return
    path = root / stage / "stage.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    StageJob(stage=stage, iteration=0, run_dir="..", inputs=inputs, recipe=recipe).save(path)
    run(sys.executable, "-m", "nemo_rmt", "stage", str(path), log=root.with_suffix(".log"))


def compute(root: Path) -> float:
    """Forward-equivalent tokens of an arm's training: 3 for one trained on, 1 for one computed while sampling."""
    trained = json.loads((root / "rmt" / "result.json").read_text())["tokens"]
    sampled = sum(step.get("rmt/rollout_tokens", 0.0) for step in read_metrics(root / "rmt" / "metrics.jsonl"))
    return 3 * trained + sampled


def steps_of_equal_compute(rmt: Path, steps: int) -> int:
    """Steps of next-token prediction, on as many documents each, that cost what RMT's cost."""
    documents = read_metrics(rmt / "rmt" / "metrics.jsonl")
    per_step = 3 * sum(step["rmt/document_tokens"] for step in documents) / len(documents)
    return max(steps, round(compute(rmt) / per_step))


def figures(root: Path) -> dict[str, float]:
    """One arm's figures of one seed: before, after, and how the training ended."""
    result = json.loads((root / "evaluate" / "result.json").read_text())["metrics"]
    found = {}
    for tier in TIERS:
        for key in ("ntp", "ntr", "ntr_greedy", "think_length", "format_rate"):
            found[f"{tier}/{key}"] = result.get(f"tokens/{tier}/{key}")
            found[f"{tier}/{key}_before"] = result.get(f"anneal/tokens/{tier}/{key}")
    found["nll"], found["nll_before"] = result["lm/all/nll"], result["anneal/lm/all/nll"]
    steps = read_metrics(root / "rmt" / "metrics.jsonl")
    last = [step["rmt/think_length"] for step in steps[-max(1, len(steps) // 10) :] if "rmt/think_length" in step]
    found["last_think_length"] = statistics.fmean(last) if last else None
    found["last_budget"] = steps[-1].get("rmt/budget")
    found["compute"] = compute(root)
    found["train_s"] = json.loads((root / "rmt" / "result.json").read_text())["wall_s"]
    return found


def spread(values: list[float | None], scale: float = 100, digits: int = 1) -> str:
    """Mean over seeds and half the width of its 95 % interval (Student's t)."""
    if any(value is None for value in values):
        return "–"
    text = f"{scale * statistics.fmean(values):.{digits}f}"
    if len(values) in T_QUANTILE:
        half = scale * T_QUANTILE[len(values)] * statistics.stdev(values) / len(values) ** 0.5
        text += f" ± {half:.{digits}f}"
    return text


def table(results: dict[str, list[dict[str, float]]]) -> str:
    """Markdown: an arm per row, means over seeds with 95 % intervals."""
    header = ["arm", "hard: after a thought, before → after", "change", "greedy", "directly", "medium: after a thought",
              "thought, tokens", "budget", "nll change", "compute, M", "train, s"]  # fmt: skip
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    for name, seeds in results.items():
        column = lambda key: [seed[key] for seed in seeds]  # noqa: E731
        change = [a - b for a, b in zip(column("hard/ntr"), column("hard/ntr_before"), strict=True)]
        nll = [a - b for a, b in zip(column("nll"), column("nll_before"), strict=True)]
        budget = seeds[0]["last_budget"]
        cells = [
            name,
            f"{spread(column('hard/ntr_before'))} → {spread(column('hard/ntr'))}",
            spread(change),
            spread(column("hard/ntr_greedy")),
            spread(column("hard/ntp")),
            spread(column("medium/ntr")),
            spread(column("hard/think_length"), 1),
            "–" if budget is None else f"{budget:.0f}",
            spread(nll, 1, 3),
            f"{statistics.fmean(column('compute')) / 1e6:.2f}",
            f"{statistics.fmean(column('train_s')):.0f}",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def plot(out: Path, results: dict[str, list[dict[str, float]]]) -> None:
    """Accuracy on held-out hard tokens before and after each arm, every seed a dot; and the length of thoughts."""
    figure, (accuracy, length) = pyplot.subplots(1, 2, figsize=(11, 3.6), layout="constrained")
    for place, seeds in enumerate(results.values()):
        for shift, key, color in ((-0.2, "hard/ntr_before", "#8a96a3"), (0.05, "hard/ntr", "#3767b0"),
                                  (0.25, "hard/ntp", "#d1662b")):  # fmt: skip
            values = [seed[key] for seed in seeds]
            label = {"hard/ntr_before": "after a thought, before training", "hard/ntr": "after a thought",
                     "hard/ntp": "directly"}[key]  # fmt: skip
            accuracy.bar(place + shift, statistics.fmean(values), 0.2, color=color, label=label if not place else None)
            accuracy.plot([place + shift] * len(values), values, ".", color="#222b33", markersize=4)
        lengths = [seed["hard/think_length"] for seed in seeds]
        length.bar(place, statistics.fmean(lengths), 0.5, color="#3767b0")
        length.plot([place] * len(lengths), lengths, ".", color="#222b33", markersize=4)
    budget = next(iter(results.values()))[0]["last_budget"]
    length.axhline(budget, color="#d1662b", linewidth=1, label=f"final budget of RMT, {budget:.0f}")
    for axes, title in ((accuracy, "held-out hard tokens predicted right"), (length, "tokens of thought")):
        axes.set_xticks(range(len(results)), results, fontsize=8)
        axes.set_title(title, loc="left", fontsize=10)
        axes.legend(frameon=False, fontsize=8)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(out / "rmt_evidence.png", dpi=130)


def main() -> None:
    """Every seed's base, then every arm; then the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/rmt_evidence"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--arms", nargs="+", default=ARMS, choices=ARMS)
    parser.add_argument("--jobs", type=int, default=2, help="runs side by side, one thread each")
    parser.add_argument("changes", nargs="*", metavar="key=value", help="changes of the recipe for every arm")
    options = parser.parse_args()
    out = options.out.resolve()
    later = [name for name in options.arms if name == "ntp"]  # needs to know what RMT cost
    with ThreadPoolExecutor(options.jobs) as pool:
        list(pool.map(lambda seed: base(out, seed, options.changes), options.seeds))
        for names in ([name for name in options.arms if name not in later], later):
            jobs = [(seed, name) for name in names for seed in options.seeds]
            list(pool.map(lambda job: arm(out, *job, options.changes), jobs))
    results = {name: [figures(out / f"seed_{seed}" / name) for seed in options.seeds] for name in options.arms}
    (out / "results.json").write_text(json.dumps({"seeds": options.seeds, "arms": results}, indent=1) + "\n")
    (out / "table.md").write_text(table(results))
    plot(out, results)
    print(table(results), end="")


if __name__ == "__main__":
    main()
