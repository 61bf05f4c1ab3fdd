"""A model's log-probability of every token of some datasets: 2 bytes a token, in a folder. No torch.

A number is -log p in units of 1/1024 nat, unsigned 16-bit little-endian: 0 to 64 nats, larger ones clamped, 65535 for a
token without a score (a document's first). It is off by at most 1/2048 nat = 0.0005, and a ReMiT weight 2σ(gap) by half
of that, wherever the token. float16 takes as much room and is off by up to 0.004 nats at log p = -10, 0.002 in the
weight, since its steps grow with the number.

    plan.json        what the numbers are of, from the first start on: data, tokenizer, model, how they were computed
    manifest.json    the same, with the sizes of all blocks: the cache is complete
    CORPUS/block_00000.u16, ...

With top_k, for distillation, also the K tokens that the model held likeliest in the place of each, the likeliest first:

    CORPUS/block_00000.top_tokens.u16, ...      ``[tokens, K]``; .u32 of a vocabulary of more than 65,536 tokens
    CORPUS/block_00000.top_logprobs.u16, ...    ``[tokens, K]``, numbers as above

A block is some 4 M tokens, whole documents, in the order of the indexed dataset: the number of its token i stands at i
of all blocks end to end. Which documents a block has follows from the dataset alone, so that any number of ranks may
write the blocks and any sequence length, blend, batch or layout may read them. The rank that scores a block holds it in
memory: 8 MiB, and with top_k 16 or 24 MiB times K.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy

from nemo_rmt.data.cache_blocks import LOGPROBS, NUMBERS, UNSCORED, Kind, kinds_of
from nemo_rmt.errors import UserError
from nemo_rmt.run_folder import sync, write_json

FORMAT = 1
UNITS_PER_NAT = 1024
PLAN, MANIFEST = "plan.json", "manifest.json"
FACTS = ("corpora", "tokenizer", "model", "precision", "sequence_length")
"""Keys that plan.json must have, in which two starts must agree."""


def encode(logprobs: numpy.ndarray) -> numpy.ndarray:
    """The numbers of log-probabilities in nats."""
    return numpy.clip(numpy.rint(logprobs * -float(UNITS_PER_NAT)), 0, UNSCORED - 1).astype(NUMBERS)


def decode(numbers: numpy.ndarray) -> numpy.ndarray:
    """float32 log-probabilities in nats; NaN for a token without a score."""
    logprobs = numbers.astype(numpy.float32) * numpy.float32(-1 / UNITS_PER_NAT)
    logprobs[numbers == UNSCORED] = numpy.nan
    return logprobs


def block_path(folder: Path, corpus: str, block: int, kind: Kind = LOGPROBS) -> Path:
    """One of a block's files."""
    return folder / corpus / f"block_{block:05d}.{kind.suffix}"


def write_block(path: Path, numbers: numpy.ndarray, kind: Kind = LOGPROBS) -> None:
    """Write one of a block's files: one of this name is whole, whenever the process or the machine stops."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_suffix(".tmp")
    with open(draft, "wb") as file:
        file.write(numpy.ascontiguousarray(numbers, kind.dtype).data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(draft, path)
    sync(path.parent)


def is_written(path: Path, tokens: int, kind: Kind = LOGPROBS) -> bool:
    """Whether the file of a block of so many tokens is there."""
    return path.is_file() and path.stat().st_size == tokens * kind.token_bytes


def begin(folder: Path, plan: dict[str, Any]) -> None:
    """Make a folder the cache that ``plan`` describes, or see that it is.

    plan: FORMAT as ``format``, and FACTS: ``corpora`` (by name, the fingerprint of each as ``dataset``), ``tokenizer``
    (fingerprint), ``model`` (``digest`` and, as a hint, ``path``), ``precision``, ``sequence_length``. With ``top_k``
    also ``vocab_size``.

    Raises UserError when it has begun as another one, or holds something else.
    """
    remedy = "give another folder, cache=FOLDER"
    if not (folder / PLAN).exists():
        if folder.is_dir() and (held := sorted(path.name for path in folder.glob("[!.]*"))):
            raise UserError(f"cache={folder} is no cache of log-probabilities (it holds {held[0]}): {remedy}")
        write_json(folder / PLAN, plan)
        return
    found = read_plan(folder)
    if differing := [name for name in (*FACTS, "top_k") if _identity(found, name) != _identity(plan, name)]:
        told = "; ".join(f"{name} {_short(found, name)} there, {_short(plan, name)} now" for name in differing)
        if differing == ["top_k"]:
            remedy += f", or top_k={found['top_k']}" if found.get("top_k") else ", or no top_k"
        raise UserError(f"cache={folder} was begun as another one: {told}; {remedy}")


def read_plan(folder: Path) -> dict[str, Any]:
    """What a cache that has begun is to be. Raises UserError when it has not."""
    return _read(folder / PLAN, f"cache={folder}", "start nemo-rmt data score with another cache=FOLDER")


def complete(folder: Path, blocks: dict[str, list[int]]) -> None:
    """Write the manifest. blocks: the tokens of each block, by corpus."""
    plan = read_plan(folder)
    sizes = {name: {"tokens": sum(blocks[name]), "blocks": blocks[name]} for name in plan["corpora"]}
    write_json(
        folder / MANIFEST, {**plan, "corpora": {name: {**plan["corpora"][name], **sizes[name]} for name in sizes}}
    )


@dataclass(frozen=True)
class Stretches:
    """Tokens of one dataset, stretch after stretch."""

    prefix: Path
    """Of the dataset: FOLDER/CORPUS/train."""
    documents: numpy.ndarray
    """int64 ``[stretches]``: the document that each is of, in the dataset."""
    first: numpy.ndarray
    """int64 ``[stretches]``: the first token of each, in the dataset."""
    sizes: numpy.ndarray
    """int64 ``[stretches]``: tokens of each."""


class LogprobCache:
    """A complete cache, for reading. Raises UserError when it is not complete, of another format, or a block is
    missing or truncated.

    reference: the recipe's key whose cache it is, for messages.
    """

    def __init__(self, folder: Path, reference: str = "anneal.remit.reference"):
        self.folder, self.reference, self.named = Path(folder), reference, f"{reference}.cache={folder}"
        again = "run nemo-rmt data score again with this cache= to finish it"
        if not (self.folder / MANIFEST).is_file():
            begun = (self.folder / PLAN).is_file()
            what = "is not finished" if begun else "is no cache of log-probabilities"
            remedy = again if begun else f"make it with nemo-rmt data score RECIPE checkpoint=... cache={folder}"
            raise UserError(f"{self.named} {what} (it has no {MANIFEST}): {remedy}")
        self.manifest = _read(self.folder / MANIFEST, self.named, again)
        try:
            self.sizes: dict[str, list[int]] = {name: each["blocks"] for name, each in self.manifest["corpora"].items()}
            self.starts = {name: numpy.cumsum([0, *sizes]) for name, sizes in self.sizes.items()}
            self.top_k: int = self.manifest.get("top_k", 0)
            self._kinds = kinds_of(self.manifest)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise UserError(f"{self.named}: {MANIFEST} is damaged ({error!r}): {again}") from None
        self._blocks: dict[tuple[str, int, Kind], numpy.ndarray] = {}
        files = [
            (block_path(self.folder, corpus, block, kind), tokens, kind)
            for corpus, sizes in self.sizes.items()
            for block, tokens in enumerate(sizes)
            for kind in self._kinds
        ]
        for path, tokens, kind in files:
            if not is_written(path, tokens, kind):
                found = f"has {path.stat().st_size} bytes" if path.is_file() else "is missing"
                raise UserError(
                    f"{self.named} is truncated: {path.relative_to(self.folder)} {found} instead of "
                    f"{tokens * kind.token_bytes} bytes: {again}"
                )

    def require(self, data: dict[str, str], tokenizer: str, model: str | None) -> None:
        """Raise UserError unless this is of these datasets, this tokenizer's tokens and this model.

        data: fingerprints of the datasets to be read, by corpus. model: its digest; None: any.
        """
        remedy = "score this run's data: nemo-rmt data score RECIPE checkpoint=... cache=FOLDER"
        corpora = self.manifest["corpora"]
        if self.manifest["tokenizer"] != tokenizer:
            raise UserError(
                f"{self.named}: log-probabilities of another tokenizer's tokens (fingerprint "
                f"{self.manifest['tokenizer'][:12]}, the run's is {tokenizer[:12]}): {remedy}"
            )
        if missing := [name for name in data if name not in corpora]:
            raise UserError(
                f"{self.named} has no data.corpora[{missing[0]}], only {', '.join(corpora)}: {remedy}, or give that "
                "corpus weight 0"
            )
        if other := [name for name in data if corpora[name]["dataset"] != data[name]]:
            raise UserError(
                f"{self.named}: the documents of data.corpora[{other[0]}] are not those that were scored (fingerprint "
                f"{corpora[other[0]]['dataset'][:12]}, the run's is {data[other[0]][:12]}): {remedy}"
            )
        if model is not None and self.manifest["model"]["digest"] != model:
            raise UserError(
                f"{self.named} is of another model (made from {self.manifest['model']['path']}) than "
                f"{self.reference}.checkpoint: {remedy}, or set that to null"
            )

    def logprobs(self, rows: Sequence[Stretches]) -> numpy.ndarray:
        """Log-probabilities of every token of rows of the same number of tokens; float32 ``[rows, tokens]``.

        NaN for documents' first tokens.
        """
        return decode(self._rows(rows, LOGPROBS)[..., 0])

    def top(self, rows: Sequence[Stretches]) -> tuple[numpy.ndarray, numpy.ndarray]:
        """The likeliest tokens in the place of every token of such rows, int64, and their log-probabilities, float32;
        ``[rows, tokens, K]``, the likeliest first.

        Of documents' first tokens 0 and NaN. Raises ValueError for a cache without them.
        """
        if not self.top_k:
            raise ValueError(f"{self.named} has log-probabilities only: its top_k is 0")
        tokens, logprobs = (self._rows(rows, kind) for kind in self._kinds[1:])
        return tokens.astype(numpy.int64), decode(logprobs)

    def _rows(self, rows: Sequence[Stretches], kind: Kind) -> numpy.ndarray:
        """``[rows, tokens, width]`` as they are stored."""
        return numpy.stack([self._row(row, kind) for row in rows])

    def _row(self, row: Stretches, kind: Kind) -> numpy.ndarray:
        corpus = row.prefix.parent.name
        starts = self.starts[corpus]
        blocks = numpy.searchsorted(starts, row.first, "right") - 1  # whole documents: a stretch is in one block
        begins = row.first - starts[blocks]
        ends = begins + row.sizes
        places = zip(blocks.tolist(), begins.tolist(), ends.tolist(), strict=True)
        return numpy.concatenate([self._block(corpus, block, kind)[begin:end] for block, begin, end in places])

    def _block(self, corpus: str, block: int, kind: Kind) -> numpy.ndarray:
        """A block's numbers, mapped into memory when they are first read."""
        if (corpus, block, kind) not in self._blocks:
            mapped = numpy.memmap(block_path(self.folder, corpus, block, kind), dtype=kind.dtype, mode="r")
            # As an array: slices of a memmap cost ten times as much.
            self._blocks[corpus, block, kind] = numpy.asarray(mapped).reshape(-1, kind.width)
        return self._blocks[corpus, block, kind]


def _read(path: Path, named: str, remedy: str) -> dict[str, Any]:
    """plan.json or manifest.json of this format, with all its keys."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        found = values["format"]
        missing = [name for name in FACTS if name not in values and found == FORMAT]
        if missing:
            raise KeyError(missing[0])
    except FileNotFoundError:
        raise UserError(f"{named} has no {path.name}: {remedy}") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{named}: {path.name} cannot be read ({error!r}): {remedy}") from None
    if found != FORMAT:
        raise UserError(f"{named} has format {found}, this version reads {FORMAT}: score again into another folder")
    return values


def _identity(plan: dict[str, Any], name: str) -> Any:
    """A fact as it is compared: where a model lies is only a hint."""
    if name == "corpora":
        return {corpus: each["dataset"] for corpus, each in plan[name].items()}
    if name == "top_k":
        return plan.get(name, 0)
    return plan[name]["digest"] if name == "model" else plan[name]


def _short(plan: dict[str, Any], name: str) -> str:
    """A fact for a message."""
    value = _identity(plan, name)
    if name == "corpora":
        return ", ".join(f"{corpus} ({fingerprint[:12]})" for corpus, fingerprint in value.items())
    return f"{plan[name]['path']} ({value[:12]})" if name == "model" else str(value)[:12]
