"""RMT on an existing Hugging Face checkpoint and your own text.

    python examples/rmt_hugging_face.py HF_FOLDER TEXTS.jsonl RUN_DIR [key=value ...]

HF_FOLDER: config.json, safetensors and tokenizer.json of a Qwen3, Qwen2, OLMo 2, SmolLM3 or Llama model that has learnt
to answer in <think></think> (Qwen3-0.6B is the smallest). TEXTS.jsonl: {"text": ...} lines, the documents to reason
about. Words at the end override the recipe: `cluster.gpus_per_node=8 parallel.tensor=2 model.precision=bf16` on a
machine with eight GPUs.

The settings are those of the recipe qwen3_14b, for one process; its plan is printed before anything starts.
"""

from __future__ import annotations

import sys
from pathlib import Path

import yaml

from nemo_rmt.cli import main as nemo_rmt


def main() -> int:
    if len(sys.argv) < 4:
        sys.exit(__doc__)
    source, texts, run_dir, *overrides = sys.argv[1:]
    from nemo_rmt.families import model_from_config  # loads torch

    checkpoint = Path(run_dir) / "imported"
    changes = {
        "name": "rmt_hugging_face",
        "run_dir": run_dir,
        "model": {**model_from_config(Path(source)).model_dump(), "precision": "bf16"},
        "parallel": {"tensor": 1, "sequence": False},
        "cluster": {"nodes": 1, "gpus_per_node": 1},
        "tokenizer": {"path": str(checkpoint / "tokenizer")},
        "data": {"corpora": [{"name": "texts", "kind": "jsonl", "path": texts}]},
        "pretrain": {"checkpoint": str(checkpoint)},
    }
    if not checkpoint.exists() and (status := nemo_rmt(["import", f"source={source}", f"target={checkpoint}"])):
        return status
    partial = Path(run_dir) / "changes.yaml"
    partial.write_text(yaml.safe_dump(changes, sort_keys=False), encoding="utf-8")
    words = ["qwen3_14b", "--yaml", str(partial), *overrides]
    return nemo_rmt(["plan", *words]) or nemo_rmt(["flywheel", *words])


if __name__ == "__main__":
    sys.exit(main())
