"""Conversations for supervised fine-tuning, by index, so that a resumed run needs no replay."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from array import array
from pathlib import Path
from typing import Any

from nemo_rmt.config import Data
from nemo_rmt.data.chat import check_messages
from nemo_rmt.data.options import nearest, read_options
from nemo_rmt.data.seeds import derived_seed, generator
from nemo_rmt.data.tables import parquet_records, require_package
from nemo_rmt.data.tasks import make_task
from nemo_rmt.data.text_files import parse_record
from nemo_rmt.errors import UserError


class SFTExamples:
    """An endless sequence of conversations: ``examples[index]`` is a list of messages with role and content.

    From ``data.sft_path`` (JSONL of ``{"messages": [...]}``, or a .parquet file with a column ``messages``): each epoch
    is the whole file in an order of its own. Without a path: solved training problems of ``data.tasks`` in turn, with
    the noise of ``data.sft_options`` (for chains: error_rate, direct).

    Raises UserError for a malformed line (path:line) or row, an empty file, unknown options, or nothing to learn from.
    """

    def __init__(self, data: Data, seed: int) -> None:
        self._seed = seed
        if data.sft_path is not None:
            path = Path(data.sft_path).expanduser()
            if not path.is_file():
                raise UserError(f"data.sft_path={path}: no such file")
            source = _Table if path.suffix == ".parquet" else _Lines
            self._source: _File | _Generated = source(path, seed)
            if data.sft_options:
                raise UserError(
                    f"data.sft_options={data.sft_options} apply to generated solutions only, and data.sft_path is set: "
                    "set data.sft_options={} or data.sft_path=null"
                )
        else:
            self._source = _Generated(data, seed)

    def __getitem__(self, index: int) -> list[dict[str, Any]]:
        """The conversation at ``index`` (0 or more), the same for the same data and seed."""
        if index < 0:
            raise IndexError(f"SFT examples are numbered from 0, got {index}")
        return self._source.example(index)


class _File(ABC):
    """The conversations of a file, every epoch in an order of its own."""

    def __init__(self, path: Path, seed: int) -> None:
        self._path, self._seed, self._epoch, self._order = path, seed, -1, array("Q")
        self._size = self._open()
        if not self._size:
            raise UserError(f"data.sft_path={path}: the file is empty")

    @abstractmethod
    def _open(self) -> int:
        """Check every conversation and return how many there are."""

    @abstractmethod
    def _conversation(self, place: int) -> list[dict[str, Any]]:
        """The conversation at a place of the file."""

    def example(self, index: int) -> list[dict[str, Any]]:
        epoch, place = divmod(index, self._size)
        if epoch != self._epoch:
            order = list(range(self._size))
            generator(self._seed, "sft", epoch).shuffle(order)
            self._epoch, self._order = epoch, array("Q", order)
        return self._conversation(self._order[place])


class _Lines(_File):
    """Conversations of a JSONL file; only the places of its lines are held in memory."""

    def _open(self) -> int:
        self._offsets = array("Q")
        offset = 0
        with self._path.open("rb") as stream:
            for number, line in enumerate(stream, start=1):
                if line.strip():
                    _checked(parse_record(line, f"{self._path}:{number}"), f"{self._path}:{number}")
                    self._offsets.append(offset)
                offset += len(line)
        return len(self._offsets)

    def _conversation(self, place: int) -> list[dict[str, Any]]:
        with self._path.open("rb") as stream:
            stream.seek(self._offsets[place])
            return _checked(parse_record(stream.readline(), str(self._path)), str(self._path))


class _Table(_File):
    """Conversations of a Parquet file, whose compressed pages have no places to seek to: held in memory, as JSON."""

    def _open(self) -> int:
        require_package("pyarrow", f"data.sft_path={self._path}")
        self._messages = []
        for record, where in parquet_records(self._path, ["messages"], "data.sft_path"):
            # A key that only some messages have is null in the others, which a template may take for there.
            messages = [{k: v for k, v in message.items() if v is not None} for message in _checked(record, where)]
            self._messages.append(json.dumps(messages, ensure_ascii=False).encode())
        return len(self._messages)

    def _conversation(self, place: int) -> list[dict[str, Any]]:
        return json.loads(self._messages[place])


class _Generated:
    """Solved training problems of the recipe's tasks, each task in turn."""

    def __init__(self, data: Data, seed: int) -> None:
        if not data.tasks:
            raise UserError("SFT has nothing to learn from: set data.sft_path, or add a task to data.tasks")
        self._seed = seed
        self._tasks = [make_task(settings) for settings in data.tasks]
        known = {name for task in self._tasks for name in task.solution_options.model_fields}
        for name in data.sft_options:
            if name not in known:
                raise UserError(f"data.sft_options.{name}: no task in data.tasks takes it; {nearest(name, known)}")
        self._noise = []
        for task in self._tasks:
            kind = task.solution_options
            own = {name: value for name, value in data.sft_options.items() if name in kind.model_fields}
            self._noise.append(read_options(kind, own, "data.sft_options"))

    def example(self, index: int) -> list[dict[str, Any]]:
        turn, which = divmod(index, len(self._tasks))
        task = self._tasks[which]
        problem = task.problem("train", derived_seed(self._seed, "sft"), turn)
        solution = task.noisy_solution(problem, generator(self._seed, "sft", index), self._noise[which])
        return [{"role": "user", "content": problem.question}, {"role": "assistant", "content": solution}]


def _checked(record: object, where: str) -> list[dict[str, Any]]:
    """The messages of one record. Raises UserError naming ``where``."""
    if not isinstance(record, dict) or "messages" not in record:
        raise UserError(f'{where}: each line must be an object with "messages"')
    try:
        check_messages(record["messages"])
    except UserError as error:
        raise UserError(f"{where}: {error}") from None
    if all(message["role"] != "assistant" for message in record["messages"]):
        raise UserError(f"{where}: a conversation to train on needs at least one message of the role assistant")
    return record["messages"]
