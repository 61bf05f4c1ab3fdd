"""Documents of each corpus kind, split into training and held-out ones that never overlap.

Kinds that are read (jsonl, parquet, arrow, hub, folder, stdlib) split by a hash of each document's text. Generated
kinds (chains, solutions) write training documents about training problems and held-out ones about held-out problems.
The options of each kind are the ``*Options`` classes here, in ``text_files`` and in ``tables``.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal

from pydantic import Field, NonNegativeFloat, PositiveInt, model_validator

from nemo_rmt import pulse
from nemo_rmt.config import Corpus, Data, Section
from nemo_rmt.data import chains, tables, text_files
from nemo_rmt.data.options import Options, nearest, read_options
from nemo_rmt.data.seeds import (
    derived_seed,
    document_is_held_out,
    document_rank,
    generator,
    last_held_out_rank,
)
from nemo_rmt.data.tasks import TaskFamily, make_task
from nemo_rmt.errors import UserError

Split = Literal["train", "held_out"]

DEFAULT_DOCUMENTS = 20_000
"""Training documents of a generated corpus without num_documents."""


class ChainCorpusOptions(Section):
    """Options of the corpus kind ``chains``."""

    styles: dict[chains.Style, NonNegativeFloat] = {"worked": 0.5, "direct": 0.1, "program": 0.3, "think": 0.3}
    """Relative frequency of each style of document."""
    lengths: list[PositiveInt] = Field([3, 4, 5], min_length=1)
    """Numbers of operations, drawn uniformly."""
    error_rate: float = Field(0.15, ge=0, lt=1)
    """Probability that a step is wrong."""
    lazy: float = Field(0.6, ge=0, le=1)
    """Probability that a think document stops thinking early."""
    instruction: str = ""
    """What stands before <think>; {budget} is about the length of the thought that follows, in characters."""
    heading: str = ""
    """What a think document begins with: it announces the thought, so that none is expected in plain programs."""
    anywhere: float = Field(0.0, ge=0, le=1)
    """Probability that a thought stands before any piece of the program, not before the digit it prints."""

    @model_validator(mode="after")
    def _some_style(self) -> ChainCorpusOptions:
        if not sum(self.styles.values()):
            raise ValueError("at least one style needs a frequency above 0")
        return self


class SolutionsOptions(Section):
    """Options of the corpus kind ``solutions``; the task's own solution options may stand beside them."""

    task: str
    """Name of an entry of data.tasks."""
    template: str = "Q:{question}\nA:{solution}"
    """A document; {question} and {solution} are filled in."""

    @model_validator(mode="after")
    def _placeholders(self) -> SolutionsOptions:
        if "{question}" not in self.template or "{solution}" not in self.template:
            raise ValueError("template must contain {question} and {solution}")
        return self


def documents(
    corpus: Corpus, data: Data, split: Split, seed: int, *, run_seed: int, download: bool = False
) -> Iterator[str]:
    """The documents of one split of a corpus, in an order set by the files or by ``seed``.

    ``num_documents`` bounds the documents read (both splits together), or is the number generated for training, with
    ``held_out`` times as many held out. An integer ``held_out`` is a number of distinct texts, chosen by a hash of text
    and ``run_seed``, which every caller of a run shares; copies of a held-out text are held out with it, and
    ``num_documents`` bounds both splits together here too: 4,251 with 200 held out leaves 4,051.
    download: a hub corpus may use the network.
    Raises UserError for wrong options, an unreadable path or record, and when the split turns out empty.
    """
    found = 0
    generated = {"chains": _chain_documents, "solutions": _solution_documents}
    if corpus.kind in generated:
        texts = generated[corpus.kind](corpus, data, split, seed)
    else:
        is_held_out = _held_out_side(corpus, run_seed, download)
        texts = (text for text in _read(corpus, download) if is_held_out(text) == (split == "held_out"))
    for text in texts:
        found += 1
        yield text
    if not found:
        raise UserError(
            f"data.corpora[{corpus.name}] has no {split.replace('_', '-')} documents: add documents"
            + (f", or raise data.corpora[{corpus.name}].held_out={corpus.held_out}" if split == "held_out" else "")
        )


def mixture(data: Data, seed: int, *, run_seed: int, download: bool = False) -> Iterator[str]:
    """Training documents of all corpora, interleaved so that characters follow the corpora's weights.

    A corpus that ends early leaves the rest to the others. The seeds and ``download`` are those of ``documents``.
    """
    streams = {
        c.name: documents(c, data, "train", seed, run_seed=run_seed, download=download)
        for c in data.corpora
        if c.weight
    }
    weights = {c.name: c.weight for c in data.corpora}
    characters = dict.fromkeys(streams, 0)
    while streams:
        name = min(streams, key=lambda name: characters[name] / weights[name])
        text = next(streams[name], None)
        if text is None:
            del streams[name]
        else:
            characters[name] += len(text)
            yield text


def check_corpus(corpus: Corpus, data: Data, *, download: bool = False) -> None:
    """Cheap pre-flight: the options are right, the path exists, and its first documents can be read.

    A hub corpus is refused without ``download``; with it, only its options are checked: nothing here uses the network.
    Raises UserError naming the key.
    """
    key = f"data.corpora[{corpus.name}]"
    if corpus.kind == "hub":
        tables.check_hub(corpus.path or "", key, download=download)
        read_options(tables.HubOptions, corpus.options, f"{key}.options")
    elif corpus.kind == "chains":
        _chain_options(corpus)
    elif corpus.kind == "solutions":
        _solutions_task(corpus, data)
    else:
        if corpus.path is not None and corpus.kind != "stdlib":
            _check_path(corpus, key)
        if not list(itertools.islice(_read(corpus), 10)):
            where = f".path={corpus.path}" if corpus.path else ""
            raise UserError(f"{key}{where}: no documents with text in it; see the options of kind {corpus.kind}")
        if corpus.held_out >= 1:
            _check_held_out(corpus)


def _check_path(corpus: Corpus, key: str) -> None:
    """Refuse a path that is not there, is empty, or is no folder where one is needed."""
    path = Path(corpus.path or "").expanduser()
    if not path.exists():
        raise UserError(f"{key}.path={corpus.path}: no such file or folder")
    if corpus.kind == "folder" and not path.is_dir():
        raise UserError(f"{key}.path={corpus.path}: not a folder; use kind: jsonl for one file of records")
    if path.is_file() and not path.stat().st_size:
        raise UserError(f"{key}.path={corpus.path}: the file is empty")
    if path.is_dir() and not any(path.iterdir()):
        raise UserError(f"{key}.path={corpus.path}: the folder is empty")


def _check_held_out(corpus: Corpus) -> None:
    """Refuse an integer held_out that leaves nothing to train on, reading only as far as is needed to know."""
    seen: set[int] = set()
    for text in _read(corpus):
        seen.add(document_rank(text, seed=0))
        if len(seen) > corpus.held_out:
            return
    raise _too_few(corpus)


def _held_out_side(corpus: Corpus, run_seed: int, download: bool) -> Callable[[str], bool]:
    """Whether a text is held out. An integer held_out takes a reading of the whole corpus to decide."""
    if corpus.held_out < 1:
        return lambda text: document_is_held_out(text, corpus.held_out)
    last = last_held_out_rank(_read(corpus, download), int(corpus.held_out), run_seed)
    if last is None:
        raise _too_few(corpus)
    return lambda text: document_rank(text, run_seed) <= last


def _too_few(corpus: Corpus) -> UserError:
    return UserError(
        f"data.corpora[{corpus.name}].held_out={corpus.held_out} leaves nothing to train on: there are no more than "
        f"{corpus.held_out} distinct documents; lower it, add documents, or raise num_documents if that is set"
    )


def _read(corpus: Corpus, download: bool = False) -> Iterator[str]:
    """The documents of a corpus that is read, at most num_documents, without those that are only white space."""
    key = f"data.corpora[{corpus.name}]"
    path = Path(corpus.path or "").expanduser()

    def options(kind: type[Options]) -> Options:
        return read_options(kind, corpus.options, f"{key}.options")

    if corpus.kind == "jsonl":
        given = options(text_files.JsonlOptions)
        texts = text_files.jsonl_texts(path, given, key)
    elif corpus.kind in ("parquet", "arrow"):
        given = options(tables.TableOptions)
        texts = tables.table_texts(path, corpus.kind, given, key)
    elif corpus.kind == "hub":
        given = options(tables.HubOptions)
        tables.check_hub(corpus.path or "", key, download=download)
        texts = tables.hub_texts(corpus.path or "", given, key)
    elif corpus.kind == "folder":
        given = options(text_files.FolderOptions)
        texts = text_files.folder_texts(path, given.suffixes)
    else:
        given = options(text_files.StdlibOptions)
        texts = text_files.stdlib_texts(given.part)
    pieces = (piece for text in texts for piece in text_files.cut(text, given.max_document_characters))
    kept = (piece for piece in pieces if not piece.isspace() and piece)
    try:
        for document in itertools.islice(kept, corpus.num_documents):
            pulse.tick(f"reading corpus {corpus.name}")
            yield document
    except OSError as error:
        raise UserError(f"{key}.path={corpus.path}: cannot be read: {error.strerror}") from None


def _num_documents(corpus: Corpus, split: Split) -> int:
    """How many documents of a split to generate."""
    count = corpus.num_documents or DEFAULT_DOCUMENTS
    return count if split == "train" else max(1, round(count * corpus.held_out))


def _chain_options(corpus: Corpus) -> ChainCorpusOptions:
    return read_options(ChainCorpusOptions, corpus.options, f"data.corpora[{corpus.name}].options")


def _chain_documents(corpus: Corpus, data: Data, split: Split, seed: int) -> Iterator[str]:
    """Documents about modular-arithmetic chains."""
    options = _chain_options(corpus)
    styles, frequencies = list(options.styles), list(options.styles.values())
    rng = generator(seed, "corpus", corpus.name, split)
    for _ in range(_num_documents(corpus, split)):
        (style,) = rng.choices(styles, frequencies)
        question = chains.draw(rng, options.lengths, held_out=split == "held_out")
        yield chains.document(
            style, question, rng, options.error_rate, options.lazy, options.instruction, options.anywhere,
            options.heading,
        )  # fmt: skip


def _solutions_task(corpus: Corpus, data: Data) -> tuple[TaskFamily, SolutionsOptions, Section]:
    """The task a solutions corpus is about, the corpus's options, and those of the task's solutions."""
    key = f"data.corpora[{corpus.name}].options"
    tasks = {task.name: task for task in data.tasks}
    name = corpus.options.get("task")
    if name not in tasks:
        raise UserError(f"{key}.task={name!r} is no entry of data.tasks; {nearest(str(name), tasks)}")
    task = make_task(tasks[name])
    noise = {name: value for name, value in corpus.options.items() if name in task.solution_options.model_fields}
    rest = {name: value for name, value in corpus.options.items() if name not in noise}
    return task, read_options(SolutionsOptions, rest, key), read_options(task.solution_options, noise, key)


def _solution_documents(corpus: Corpus, data: Data, split: Split, seed: int) -> Iterator[str]:
    """Solved problems of a task, each once where the split is finite."""
    task, options, noise = _solutions_task(corpus, data)
    rng = generator(seed, "corpus", corpus.name, split)
    problems = task.problems(split, derived_seed(seed, "corpus", corpus.name))
    for problem in itertools.islice(problems, _num_documents(corpus, split)):
        fields = {"question": problem.question, "solution": task.noisy_solution(problem, rng, noise)}
        yield re.sub(r"\{(question|solution)\}", lambda match: fields[match.group(1)], options.template)
