"""Stands in for lm-eval where that is not installed: a package ``lm_eval`` that does as it is told."""

from __future__ import annotations

from pathlib import Path

MAIN = """
import json, os, sys, time
from pathlib import Path

import yaml

command, option, path = sys.argv[1:]
assert (command, option) == ("run", "--config")
configuration = yaml.safe_load(Path(path).read_text())
results = Path(configuration["output_path"])
written = results.parent / "seen.json.part"
written.write_text(json.dumps({"pid": os.getpid(), "environment": dict(os.environ)}))
written.replace(results.parent / "seen.json")  # whole as soon as it is there: tests wait for it
print("lm-eval is here", flush=True)
if os.environ["FAKE"] == "hang":
    time.sleep(600)
if os.environ["FAKE"] == "fail":
    sys.exit("ValueError: the model talks nonsense")
figures = {"alias": "-", "pass@1,none": 0.25, "pass@1_stderr,none": 0.1, "f1,strict": 1, "f1_stderr,strict": "N/A"}
found = {"results": {name: {**figures, "sample_len": 8} for name in configuration["tasks"]}}
results.with_name("results_2001-02-03T04-05-06.json").write_text(json.dumps(found))
"""


def install(folder: Path) -> Path:
    """Write the package to ``folder``, which is to go on PYTHONPATH; FAKE says what it does: work, fail or hang."""
    (folder / "lm_eval").mkdir()
    (folder / "lm_eval" / "__init__.py").touch()
    (folder / "lm_eval" / "__main__.py").write_text(MAIN)
    return folder
