"""JSON lines of benchmarks to Markdown tables and a figure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot  # noqa: E402

Line = dict[str, object]


def markdown(machine: Line, lines: Sequence[Line], about: Mapping[str, str]) -> str:
    """Every benchmark's tables below what they ran on, in the order of the lines. about: a sentence on each."""
    where = f"{machine['cores']} cores of {machine['cpu']}, {machine['memory_gib']} GiB, {machine['gpu'] or 'no GPU'}"
    parts = [f"## {machine['date']}, {where}"]
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    parts.append(f"{versions}; commit {machine['commit']}.")
    for name in dict.fromkeys(line["benchmark"] for line in lines):
        own = [line for line in lines if line["benchmark"] == name]
        parts.append(f"### {name}\n\n{about[name]}\n\n`{own[0]['command']}`")
        kinds = dict.fromkeys(tuple(line) for line in own)
        parts += [table([line for line in own if tuple(line) == kind]) for kind in kinds]
    return "\n\n".join(parts) + "\n"


def table(lines: Sequence[Line]) -> str:
    """Lines of the same keys, a row each; what all rows share stands before the table."""
    keys = [key for key in lines[0] if key not in ("benchmark", "command")]
    shared = [key for key in keys if key in ("device", "threads") or len(lines) > 1 and not _differs(lines, key)]
    columns = [key for key in keys if key not in shared]
    rows = [[cell(line[key]) for key in columns] for line in lines]
    head = [[key.replace("_", " ") for key in columns], ["---"] * len(columns)]
    caption = ", ".join(f"{key.replace('_', ' ')} {cell(lines[0][key])}" for key in shared)
    return f"{caption}:\n\n" + "\n".join(f"| {' | '.join(row)} |" for row in [*head, *rows])


def cell(value: object) -> str:
    """A value as text."""
    if isinstance(value, dict):
        return ", ".join(f"{key} {cell(each)}" for key, each in value.items())
    if isinstance(value, (list, tuple)):
        return ", ".join(map(cell, value))
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "–"}[value]
    if isinstance(value, float):
        return f"{value:,.4g}" if abs(value) < 1000 else f"{value:,.0f}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def plot_curves(lines: Sequence[Line], path: Path) -> None:
    """The cost curves' times and peaks over their places, each beside what it should be."""
    points = [line for line in lines if line["benchmark"] == "cost_curves" and "x" in line]
    names = list(dict.fromkeys(point["curve"] for point in points))
    figure, axes = pyplot.subplots(2, len(names), figsize=(3 * len(names), 5.4), layout="constrained", squeeze=False)
    kinds = (("seconds", "expected_seconds", "seconds of a step"), ("peak_mib", "plan_mib", "peak, MiB"))
    for column, name in enumerate(names):
        own = [point for point in points if point["curve"] == name]
        places = [point["x"] for point in own]
        for row, (measured, expected, label) in enumerate(kinds):
            axis = axes[row][column]
            axis.loglog(places, [point[measured] for point in own], "o-", color="#3767b0", label="measured")
            axis.loglog(places, [point[expected] for point in own], "--", color="#d1662b", label="expected")
            axis.set_xticks(places, [f"{place:,}" for place in places], fontsize=7)
            axis.minorticks_off()
            axis.spines[["top", "right"]].set_visible(False)
            if not row:
                axis.set_title(name, loc="left", fontsize=9)
            if not column:
                axis.set_ylabel(label, fontsize=9)
                axis.legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def _differs(lines: Sequence[Line], key: str) -> bool:
    return any(line[key] != lines[0][key] for line in lines)
