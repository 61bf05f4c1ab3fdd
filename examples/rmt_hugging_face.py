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

from nemo_rmt.cli import main as nemo_rmt
from nemo_rmt.recipe_io import load_recipe, resolved_yaml

ONE_PROCESS = ["cluster.nodes=1", "cluster.gpus_per_node=1", "parallel.tensor=1", "parallel.sequence=false"]


def main() -> int:
    if len(sys.argv) < 4:
        sys.exit(__doc__)
    source, texts, run_dir, *overrides = sys.argv[1:]
    from nemo_rmt.megatron.hugging_face import model_from_config  # loads torch

    model = model_from_config(Path(source))
    checkpoint = Path(run_dir) / "imported"
    if not checkpoint.exists() and (status := nemo_rmt(["import", f"source={source}", f"target={checkpoint}"])):
        return status
    recipe = load_recipe("qwen3_14b", [], ONE_PROCESS)
    recipe.name, recipe.run_dir, recipe.model = "rmt_hugging_face", run_dir, model
    recipe.pretrain.checkpoint, recipe.tokenizer.path = str(checkpoint), str(checkpoint / "tokenizer")
    corpus = {"name": "texts", "kind": "jsonl", "path": texts}
    recipe = recipe.model_validate({**recipe.model_dump(), "data": {"corpora": [corpus]}})
    saved = Path(run_dir) / "recipe.yaml"
    saved.write_text(resolved_yaml(recipe, comments=True), encoding="utf-8")
    words = ["--yaml", str(saved), *overrides]
    return nemo_rmt(["plan", *words]) or nemo_rmt(["flywheel", *words])


if __name__ == "__main__":
    sys.exit(main())
