"""A checkpoint folder with the right outside: manifest.json and the files that it describes, no weights."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

WEIGHTS = b"w" * 1000


def write_checkpoint(folder: Path, model: dict[str, Any], **changes: object) -> Path:
    """Write the folder; ``changes`` replace entries of its metadata. ``model``: recipe.model as a mapping."""
    folder.mkdir(parents=True)
    (folder / "weights.distcp").write_bytes(WEIGHTS)
    metadata = {
        "format": 2,
        "stage": "rl",
        "iteration": 0,
        "step": 40,
        "model": model,
        "vocab_size": 512,
        "tokenizer": "f" * 64,
        "files": {"weights.distcp": {"bytes": len(WEIGHTS), "sha256": hashlib.sha256(WEIGHTS).hexdigest()}},
    }
    (folder / "manifest.json").write_text(json.dumps({**metadata, **changes}))
    return folder
