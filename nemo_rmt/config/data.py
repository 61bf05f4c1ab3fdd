"""The tokenizer, the training mix and the tasks."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, NonNegativeFloat, PositiveInt, model_validator

from nemo_rmt.config.section import Section

TOGETHER = "all"
"""What metrics call all domains, or all tasks, together."""


class Tokenizer(Section):
    """A tokenizer folder, or one trained on the run's own training corpora."""

    path: str | None = None
    """Folder with tokenizer.json (Hugging Face); null: train a byte-level BPE."""
    vocab_size: PositiveInt = 512
    """Size of the trained vocabulary, special tokens included."""
    training_characters: PositiveInt = 4_000_000
    """Characters of the training corpora read to train it."""
    chat_template: str | None = (
        "{% for message in messages %}{% if message.role == 'user' %}Q:{{ message.content }}\nA:"
        "{% else %}{{ message.content }}{{ eos_token }}{% endif %}{% endfor %}"
    )
    """Jinja template of a conversation; null: the one in the tokenizer's folder."""


class Corpus(Section):
    """One domain of the training mix."""

    name: str = Field(pattern=r"^[a-z][a-z0-9_]*$")
    """Domain name, as it appears in metrics (lm/<name>/nll)."""
    kind: Literal["jsonl", "parquet", "arrow", "hub", "folder", "stdlib", "chains", "solutions"]
    """jsonl: {"text": ...} lines; parquet, arrow: tables with a text column; hub: a dataset of the Hugging Face hub,
    which nemo-rmt data build downloads; folder: text or code files; stdlib: this Python's own sources; chains:
    documents about modular-arithmetic chains; solutions: worked problems of a task."""
    path: str | None = None
    """File or folder, for jsonl, parquet, arrow and folder; for hub the dataset's name, as in owner/name."""
    weight: NonNegativeFloat = 1.0
    """Share of the training tokens, relative to the other corpora."""
    num_documents: PositiveInt | None = None
    """Documents to generate (chains, solutions), or an upper bound on those read."""
    held_out: Annotated[float, Field(gt=0, lt=0.5)] | PositiveInt = 0.02
    """Documents kept for evaluation: a fraction, chosen by a hash of their text, or (1 and more, for files) how many,
    chosen by that hash and the run's seed."""
    options: dict[str, Any] = {}
    """Settings of the generator: see the corpus kind's docstring in nemo_rmt.data."""

    @model_validator(mode="after")
    def _path(self) -> Corpus:
        if self.kind not in ("stdlib", "chains", "solutions") and self.path is None:
            raise ValueError(f"path is required for kind {self.kind}")
        if self.kind in ("chains", "solutions") and self.held_out >= 1:
            raise ValueError(f"held_out must be a fraction for kind {self.kind}, got {self.held_out}")
        return self


class Task(Section):
    """A family of problems with a verifier, for RL and evaluation."""

    name: str = Field(pattern=r"^[a-z][a-z0-9_]*$")
    """Name in metrics (tasks/<name>/pass@1)."""
    family: str = "chains"
    """chains; questions, with known answers from a file; or reasoning_gym:<dataset> (the extra nemo-rmt[reasoning])."""
    options: dict[str, Any] = {}
    """Settings of the problems trained on and held out."""
    longer: dict[str, Any] | None = None
    """Settings of problems harder than any trained on; evaluated only."""


class Data(Section):
    """The training mix and the tasks."""

    corpora: list[Corpus] = []
    """Domains of pre-training and annealing."""
    tasks: list[Task] = []
    """Problem families with verifiers."""
    sft_path: str | None = None
    """JSON lines or a .parquet file of {"messages": [...]} for SFT; null: solved problems of the tasks."""
    sft_options: dict[str, Any] = {}
    """Settings of the generated SFT solutions, when sft_path is null."""
    document_attention: bool = True
    """Tokens attend within their own document only, where documents share a row."""

    @model_validator(mode="after")
    def _names(self) -> Data:
        for kind, entries in (("corpora", self.corpora), ("tasks", self.tasks)):
            names = [entry.name for entry in entries]
            if len(set(names)) != len(names):
                raise ValueError(f"{kind} must have distinct names, got {names}")
            if TOGETHER in names:
                raise ValueError(f"{kind}: {TOGETHER!r} is what metrics call all of them together: choose another name")
        if self.corpora and not sum(corpus.weight for corpus in self.corpora):
            raise ValueError("at least one corpus must have a weight above 0")
        return self
