"""A checkpoint folder with the right outside: manifest.json and files of the sizes it names, no weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def write_checkpoint(folder: Path, model: dict[str, Any], **changes: object) -> Path:
    """Write the folder; ``changes`` replace entries of its metadata. ``model``: recipe.model as a mapping."""
    folder.mkdir(parents=True)
    (folder / "weights.distcp").write_bytes(b"w" * 1000)
    metadata = {
        "format": 1,
        "stage": "rl",
        "iteration": 0,
        "step": 40,
        "model": model,
        "vocab_size": 512,
        "tokenizer": "f" * 64,
        "files": {"weights.distcp": 1000},
    }
    (folder / "manifest.json").write_text(json.dumps({**metadata, **changes}))
    return folder
