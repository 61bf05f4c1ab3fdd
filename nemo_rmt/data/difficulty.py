"""How hard the tokens of documents are: a model's entropies at them, kept in a folder and cut into tiers."""

from __future__ import annotations

import functools
import json
import os
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy
import torch

from nemo_rmt import config
from nemo_rmt.config import TIERS
from nemo_rmt.data.tokenizer import Tokenizer
from nemo_rmt.errors import UserError
from nemo_rmt.objectives import assign_tiers, tier_edges
from nemo_rmt.run_folder import write_json

FORMAT = 1
METADATA = "difficulty.json"


@dataclass(frozen=True, eq=False)
class ScoredCorpus:
    """Documents of one corpus, or pieces of long ones, with the entropy of the prediction of every token.

    Raises ValueError when fields disagree.
    """

    name: str
    """The corpus's name in data.corpora."""
    pieces: numpy.ndarray
    """int64 ``[pieces, 3]``: the document's index in the dataset, the piece's first token in it, its length. Pieces of
    one document follow each other."""
    tokens: numpy.ndarray
    """int32 ``[total]``, piece after piece."""
    entropy: numpy.ndarray
    """float32 ``[total]``, nats, of the distribution that predicts this token from its piece's tokens before it; NaN
    for a piece's first."""

    def __post_init__(self) -> None:
        total = int(self.pieces[:, 2].sum()) if self.pieces.ndim == 2 and self.pieces.shape[1] == 3 else None
        if not (self.tokens.shape == self.entropy.shape == (total,)):
            shapes = f"{self.pieces.shape} of {total} tokens, {self.tokens.shape}, {self.entropy.shape}"
            raise ValueError(f"pieces, tokens and entropy of corpus {self.name} disagree: {shapes}")

    def __len__(self) -> int:
        """Pieces."""
        return len(self.pieces)

    @functools.cached_property
    def starts(self) -> numpy.ndarray:
        """int64 ``[pieces + 1]``: where each piece begins in ``tokens``, and where the last one ends."""
        return numpy.concatenate([[0], numpy.cumsum(self.pieces[:, 2])])

    def document(self, index: int) -> list[int]:
        """The tokens of one piece."""
        return self.tokens[self.starts[index] : self.starts[index + 1]].tolist()


@dataclass(frozen=True, eq=False)
class Tiers:
    """The tier of every token of some corpora, in their order."""

    tiers: list[numpy.ndarray]
    """int8 ``[total]`` for each corpus: 0 easy, 1 medium, 2 hard, -1 never asked for."""
    edges: dict[str, tuple[float, ...]]
    """By corpus, nats: where medium and hard begin, and the ceiling where there is one. Quantiles of a corpus without
    any token to ask for do not exist: it is not in here."""

    @property
    def counts(self) -> list[int]:
        """Tokens of each tier, all corpora together."""
        return [sum(int((tiers == tier).sum()) for tiers in self.tiers) for tier in range(len(TIERS))]


def askable(corpus: ScoredCorpus, tokenizer: Tokenizer, first_position: int) -> numpy.ndarray:
    """Which tokens may be asked for; boolean ``[total]``.

    Not the first ``first_position`` tokens of a piece, special tokens, what stands in a document's own thoughts (its
    reasoning is no text to reason about, and one left open hides the rest), or tokens without a finite entropy.
    """
    offsets = numpy.arange(len(corpus.tokens)) - numpy.repeat(corpus.starts[:-1], corpus.pieces[:, 2])
    special = {tokenizer.eod, tokenizer.pad, tokenizer.think, tokenizer.end_think} - {None}
    allowed = (offsets >= first_position) & numpy.isfinite(corpus.entropy)
    return allowed & ~numpy.isin(corpus.tokens, list(special)) & ~_in_thought(corpus, tokenizer)


def _in_thought(corpus: ScoredCorpus, tokenizer: Tokenizer) -> numpy.ndarray:
    """Tokens after a document's ``<think>`` and before its ``</think>``, also where a piece begins between the two."""
    if tokenizer.think is None:
        return numpy.zeros(len(corpus.tokens), dtype=bool)
    document, _, size = corpus.pieces.T
    continued = numpy.zeros(len(corpus), dtype=bool)
    continued[1:] = document[1:] == document[:-1]
    begins = numpy.maximum.accumulate(numpy.where(continued, 0, corpus.starts[:-1]))
    tags = numpy.isin(corpus.tokens, [tag for tag in (tokenizer.think, tokenizer.end_think) if tag is not None])
    last_tag = numpy.maximum.accumulate(numpy.where(tags, numpy.arange(len(tags)), -1))
    return (last_tag >= numpy.repeat(begins, size)) & (corpus.tokens[last_tag] == tokenizer.think)


def cut_tiers(corpora: Sequence[ScoredCorpus], askables: Sequence[numpy.ndarray], settings: config.Difficulty) -> Tiers:
    """The tier of every token. Quantiles are those of the tokens that may be asked for (``askables``, one per corpus),
    of each corpus by itself or of all together; at the ceiling and above a token is never asked for."""
    measured = [torch.from_numpy(corpus.entropy[allowed]) for corpus, allowed in zip(corpora, askables, strict=True)]
    names = [corpus.name for corpus in corpora]
    cuts = settings.edges if settings.quantiles is None else settings.quantiles
    cuts = cuts if settings.ceiling is None else (*cuts, settings.ceiling)
    if settings.quantiles is None:
        edges = dict.fromkeys(names, cuts)
    elif settings.per_domain:
        edges = {name: tier_edges(values, cuts) for name, values in zip(names, measured, strict=True) if len(values)}
    else:
        everything = torch.cat(measured)
        edges = dict.fromkeys(names, tier_edges(everything, cuts)) if len(everything) else {}
    tiers = []
    for name, allowed, values in zip(names, askables, measured, strict=True):
        tiers.append(numpy.full(len(allowed), -1, dtype=numpy.int8))
        if len(values):
            found = assign_tiers(values, edges[name]).numpy()
            tiers[-1][allowed] = numpy.where(found < len(TIERS), found, -1)
    return Tiers(tiers, edges)


def require_tiers(tiers: Tiers, curriculum: config.Curriculum) -> None:
    """Raise UserError when the curriculum draws from a tier that no token is in."""
    chances = [max(early, late) for early, late in zip(curriculum.early, curriculum.late, strict=True)]
    missing = [tier for tier, count in enumerate(tiers.counts) if chances[tier] and not count]
    if not missing:
        return
    wanted = " and ".join(f"{TIERS[tier]} tokens a probability of up to {chances[tier]:g}" for tier in missing)
    names = " and ".join(TIERS[tier] for tier in missing)
    never = sum(int((found < 0).sum()) for found in tiers.tiers)
    counts = ", ".join(f"{count} {name}" for name, count in zip(TIERS, tiers.counts, strict=True))
    edges = "; ".join(f"{name}: {', '.join(f'{edge:.4g}' for edge in cut)}" for name, cut in tiers.edges.items())
    raise UserError(
        f"rmt.curriculum gives {wanted}, but there are none: {counts} and {never} never asked for, with edges in nats "
        f"of {edges or 'no corpus'}. Change rmt.difficulty.edges or rmt.difficulty.quantiles, raise "
        f"rmt.difficulty.max_tokens, or give {names} probability 0 in rmt.curriculum.early and rmt.curriculum.late"
    )


def save_scores(folder: Path, corpora: Sequence[ScoredCorpus], identity: dict[str, Any]) -> None:
    """Write scores, unless they are there: a folder of this name is whole, whenever the process is killed.

    Of several processes that write the same scores at once, the first one's stay.

    identity: what they are scores of: ``tokenizer`` and ``model`` (fingerprints), ``corpora`` (name to the dataset's
    fingerprint), and the settings they were made with.
    """
    folder = Path(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    draft = Path(tempfile.mkdtemp(prefix=f"{folder.name}.", suffix=".tmp", dir=folder.parent))
    try:
        draft.chmod(0o755)  # others of a run's group read it
        for corpus in corpora:
            with open(draft / f"{corpus.name}.npz", "wb") as file:
                numpy.savez(file, pieces=corpus.pieces, tokens=corpus.tokens, entropy=corpus.entropy)
                file.flush()
                os.fsync(file.fileno())
        names = [corpus.name for corpus in corpora]
        write_json(draft / METADATA, {"format": FORMAT, "corpora": names, "identity": identity})
        os.replace(draft, folder)
    except OSError:
        if not folder.is_dir():  # else it is there by now, and a folder cannot replace one with files in it
            raise
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def load_scores(folder: Path) -> tuple[list[ScoredCorpus], dict[str, Any]]:
    """What ``save_scores`` wrote: corpora and identity. Raises UserError when it is missing, torn or of another
    format."""
    folder = Path(folder)
    remedy = "delete the folder to score the corpora again, or choose another rmt.difficulty.scores"
    try:
        described = json.loads((folder / METADATA).read_text())
        if described["format"] == FORMAT:
            return [_load(folder, name) for name in described["corpora"]], described["identity"]
    except (FileNotFoundError, NotADirectoryError) as error:
        raise UserError(f"{folder} holds no scores: {error.filename} is missing; {remedy}") from None
    except Exception as error:  # numpy and zipfile raise a dozen kinds for damaged files
        raise UserError(f"the scores in {folder} are damaged ({error!r}): {remedy}") from error
    raise UserError(f"the scores in {folder} have format {described['format']}, this version reads {FORMAT}: {remedy}")


def _load(folder: Path, name: str) -> ScoredCorpus:
    with numpy.load(folder / f"{name}.npz", allow_pickle=False) as arrays:
        return ScoredCorpus(name, arrays["pieces"], arrays["tokens"], arrays["entropy"])


def require_scores_of(identity: dict[str, Any], expected: dict[str, Any], folder: Path) -> None:
    """Raise UserError unless loaded scores are of the expected corpora and tokenizer; the model may be another."""
    remedy = "choose scores of this run's corpora, or set rmt.difficulty.scores=null to score them"
    if identity.get("tokenizer") != expected["tokenizer"]:
        raise UserError(
            f"rmt.difficulty.scores={folder}: scores of another tokenizer's tokens (fingerprint "
            f"{str(identity.get('tokenizer'))[:12]}, the run's is {expected['tokenizer'][:12]}): {remedy}"
        )
    found, wanted = identity.get("corpora") or {}, expected["corpora"]
    if found.keys() != wanted.keys():
        held, read = ", ".join(found) or "none", ", ".join(wanted)
        raise UserError(
            f"rmt.difficulty.scores={folder}: scores of another dataset: of corpora {held}, the stage reads {read}: "
            f"name them in rmt.corpora, {remedy}"
        )
    other = [name for name in wanted if found[name] != wanted[name]]
    if other:
        raise UserError(
            f"rmt.difficulty.scores={folder}: scores of another dataset: the documents of data.corpora"
            f"[{other[0]}] are not those that were scored: {remedy}"
        )
