"""Conversations for supervised fine-tuning, by index, so that a resumed run needs no replay."""

from __future__ import annotations

from array import array
from pathlib import Path
from typing import Any

from nemo_rmt.config import Data
from nemo_rmt.data.chat import check_messages
from nemo_rmt.data.options import nearest, read_options
from nemo_rmt.data.seeds import derived_seed, generator
from nemo_rmt.data.tasks import make_task
from nemo_rmt.data.text_files import parse_record
from nemo_rmt.errors import UserError


class SFTExamples:
    """An endless sequence of conversations: ``examples[index]`` is a list of messages with role and content.

    From ``data.sft_path`` (JSONL of ``{"messages": [...]}``): each epoch is the whole file in an order of its
    own. Without a path: solved training problems of ``data.tasks`` in turn, with the noise of
    ``data.sft_options`` (for chains: error_rate, direct).

    Raises UserError for a malformed line (path:line), an empty file, unknown options, or nothing to learn from.
    """

    def __init__(self, data: Data, seed: int) -> None:
        self._seed = seed
        if data.sft_path is not None:
            self._source: _File | _Generated = _File(Path(data.sft_path).expanduser(), seed)
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


class _File:
    """Conversations of a JSONL file; only the places of its lines are held in memory."""

    def __init__(self, path: Path, seed: int) -> None:
        if not path.is_file():
            raise UserError(f"data.sft_path={path}: no such file")
        self._path, self._seed, self._epoch, self._order = path, seed, -1, array("Q")
        self._offsets = array("Q")
        offset = 0
        with path.open("rb") as stream:
            for number, line in enumerate(stream, start=1):
                if line.strip():
                    _conversation(line, f"{path}:{number}")
                    self._offsets.append(offset)
                offset += len(line)
        if not self._offsets:
            raise UserError(f"data.sft_path={path}: the file is empty")

    def example(self, index: int) -> list[dict[str, Any]]:
        epoch, place = divmod(index, len(self._offsets))
        if epoch != self._epoch:
            order = list(range(len(self._offsets)))
            generator(self._seed, "sft", epoch).shuffle(order)
            self._epoch, self._order = epoch, array("Q", order)
        with self._path.open("rb") as stream:
            stream.seek(self._offsets[self._order[place]])
            return _conversation(stream.readline(), str(self._path))


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


def _conversation(line: bytes, where: str) -> list[dict[str, Any]]:
    """The messages of one line. Raises UserError naming ``where``."""
    record = parse_record(line, where)
    if not isinstance(record, dict) or "messages" not in record:
        raise UserError(f'{where}: each line must be an object with "messages"')
    try:
        check_messages(record["messages"])
    except UserError as error:
        raise UserError(f"{where}: {error}") from None
    if all(message["role"] != "assistant" for message in record["messages"]):
        raise UserError(f"{where}: a conversation to train on needs at least one message of the role assistant")
    return record["messages"]
