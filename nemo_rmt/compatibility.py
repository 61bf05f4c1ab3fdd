"""Whether a checkpoint fits a recipe: same architecture, vocabulary and tokenizer. Imports no torch."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from nemo_rmt.config import Model
from nemo_rmt.errors import UserError
from nemo_rmt.manifest import METADATA, CheckpointInfo, inspect_checkpoint

NOT_ARCHITECTURE = {
    "layers", "precision", "logprob_chunk", "init_std", "max_position", "fp8", "fp8_recipe", "fp8_bf16_layers",
    "vocab_size",  # compared by itself: null stands for the tokenizer's
}  # fmt: skip
"""Keys of recipe.model that say how weights are computed or begun, not what they mean."""


IMPORTED = "import"
"""The stage that checkpoints made of published weights name: they hold no optimizer state."""


def model_vocab_size(model: Model, tokenizer_size: int) -> int:
    """Tokens the model predicts over. Raises UserError when they are fewer than the tokenizer's."""
    if model.vocab_size is not None and model.vocab_size < tokenizer_size:
        raise UserError(
            f"model.vocab_size={model.vocab_size} is smaller than the tokenizer's {tokenizer_size} tokens: set it to "
            "the published model's, or to null for the tokenizer's"
        )
    return model.vocab_size or tokenizer_size


def architecture(model: dict[str, Any]) -> dict[str, Any]:
    """The keys of recipe.model that two checkpoints must share; the head size is always given."""
    full = Model(**{key: value for key, value in model.items() if key in Model.model_fields})
    head_dim = full.head_dim or full.hidden_size // full.num_attention_heads
    return {key: value for key, value in full.model_dump().items() if key not in NOT_ARCHITECTURE} | {
        "head_dim": head_dim
    }


def require_compatible(
    folder: Path, model: Model, tokenizer_size: int, tokenizer: str, key: str = "checkpoint"
) -> CheckpointInfo:
    """Raise UserError unless the checkpoint is complete and fits this architecture, vocabulary and tokenizer.

    tokenizer_size, tokenizer: number of tokens and fingerprint of the run's tokenizer. key: what the checkpoint is
    called in the message.
    """
    try:
        info = inspect_checkpoint(folder)
    except UserError as error:
        raise UserError(f"{key}: {error}") from None
    ours, theirs = architecture(model.model_dump()), architecture(info.model)
    differing = [
        f"model.{name} is {theirs[name]} in the checkpoint, {ours[name]} in the recipe"
        for name in ours
        if ours[name] != theirs[name]
    ]
    if differing:
        raise UserError(f"{key} {folder} has another architecture: {'; '.join(differing)}")
    if info.vocab_size != (vocab_size := model_vocab_size(model, tokenizer_size)):
        raise UserError(
            f"{key} {folder} has a vocabulary of {info.vocab_size} tokens, the run's model has {vocab_size} "
            f"(model.vocab_size={model.vocab_size}, the tokenizer has {tokenizer_size})"
            + (f": set model.vocab_size={info.vocab_size}" if info.vocab_size >= tokenizer_size else "")
        )
    if info.tokenizer != tokenizer:
        raise UserError(
            f"{key} {folder} was trained with another tokenizer (fingerprint {info.tokenizer[:12]}, the run's is "
            f"{tokenizer[:12]}): set tokenizer.path to the folder of the tokenizer it was trained with"
        )
    return info


def checkpoint_fingerprint(folder: Path) -> str:
    """SHA-256 of a checkpoint's manifest, which has the checksums of its files: any training changes it."""
    inspect_checkpoint(folder)
    return hashlib.sha256((folder / METADATA).read_bytes()).hexdigest()
