"""Whether a cache of log-probabilities is of a run's data, tokenizer and model. Imports no torch: driver and stages
read it."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING

from nemo_rmt.compatibility import checkpoint_fingerprint
from nemo_rmt.config import CachedReference, Recipe
from nemo_rmt.data.fingerprint import dataset_exists, dataset_fingerprint, hash_ends
from nemo_rmt.errors import UserError
from nemo_rmt.manifest import METADATA

if TYPE_CHECKING:
    from nemo_rmt.data.logprob_cache import LogprobCache


def cached_reference(recipe: Recipe) -> CachedReference | None:
    """The recipe's cache of reference log-probabilities, None when it has none or does not use it."""
    guide = recipe.anneal.guide if recipe.anneal.enabled else None
    return guide.reference if guide is not None and isinstance(guide.reference, CachedReference) else None


def open_reference(recipe: Recipe, folder: Path) -> LogprobCache:
    """A cache for the recipe's anneal to read. Raises UserError when it cannot be used, whatever the data."""
    from nemo_rmt.data.logprob_cache import LogprobCache  # here: the driver starts without numpy

    key = f"{recipe.anneal.guide_key}.reference"
    if not recipe.data.document_attention:
        raise UserError(
            f"{key}.cache has no number for the first token of a document: set data.document_attention=true, or name a "
            f"checkpoint as {key}"
        )
    cache = LogprobCache(folder, key)
    if recipe.anneal.objective == "distill" and not cache.top_k:
        raise UserError(
            f"{key}.cache={folder} has no other tokens than the text's: make one with nemo-rmt data score top_k=32, or "
            f"name a checkpoint as {key}"
        )
    return cache


def require_fitting(cache: LogprobCache, recipe: Recipe, reference: CachedReference, data: Path) -> None:
    """Raise UserError unless the cache is of what the data stage made in ``data``, and of the model named."""
    from nemo_rmt.data.tokenizer import Tokenizer  # here: the driver starts without the tokenizers' library

    tokenizer = Tokenizer.load(data / "tokenizer").fingerprint
    model = None
    if reference.checkpoint is not None:
        model = model_digest(Path(reference.checkpoint), f"{recipe.anneal.guide_key}.reference.checkpoint")
    cache.require(training_data(recipe, data), tokenizer, model)


def training_data(recipe: Recipe, data: Path) -> dict[str, str]:
    """Fingerprints of the datasets that training reads, by corpus. Raises UserError when one is not there."""
    found = {}
    for corpus in recipe.data.corpora:
        prefix = data / corpus.name / "train"
        if corpus.weight:
            if not dataset_exists(prefix):
                raise UserError(f"dataset {prefix} is missing: run the data stage again")
            found[corpus.name] = dataset_fingerprint(prefix)
    return found


def is_published(folder: Path) -> bool:
    """Whether a folder is a Hugging Face model's, and no checkpoint of ours."""
    return (folder / "config.json").is_file() and not (folder / METADATA).exists()


def model_digest(folder: Path, key: str) -> str:
    """What identifies the weights in a folder: of a checkpoint its manifest, which has the checksums of its files; of a
    Hugging Face model its config.json and, of every file of weights, name, size and both ends.

    key: what the folder is called in messages. Raises UserError when it holds neither.
    """
    if not is_published(folder):
        try:
            return checkpoint_fingerprint(folder)
        except UserError as error:
            raise UserError(f"{key}: {error}") from None
    digest = hashlib.sha256((folder / "config.json").read_bytes())
    for file in sorted(folder.glob("*.safetensors")):
        digest.update(file.name.encode())
        hash_ends(digest, file)
    return digest.hexdigest()
