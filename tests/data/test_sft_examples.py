"""SFT conversations by index."""

from __future__ import annotations

import json

import pytest

from nemo_rmt.config import Data
from nemo_rmt.data.seeds import problem_is_held_out
from nemo_rmt.data.sft import SFTExamples
from nemo_rmt.errors import UserError


def conversation(number):
    return [{"role": "user", "content": f"{number}?"}, {"role": "assistant", "content": f"{number}é"}]


@pytest.fixture
def sft_path(tmp_path):
    def write(*records):
        path = tmp_path / "sft.jsonl"
        lines = (r if isinstance(r, str) else json.dumps({"messages": r}, ensure_ascii=False) for r in records)
        path.write_text("\n".join(lines) + "\n")
        return str(path)

    return write


def test_each_epoch_has_every_conversation_in_an_order_of_its_own(sft_path):
    path = sft_path(*map(conversation, range(20)), "")
    examples = SFTExamples(Data(sft_path=path), seed=0)
    epochs = [[examples[index] for index in range(begin, begin + 20)] for begin in (0, 20)]
    for epoch in epochs:
        assert sorted(epoch, key=str) == sorted(map(conversation, range(20)), key=str)
    assert epochs[0] != epochs[1]
    assert SFTExamples(Data(sft_path=path), seed=0)[33] == epochs[1][13]  # no replay needed
    assert [SFTExamples(Data(sft_path=path), seed=1)[index] for index in range(20)] != epochs[0]


def parquet(path, *conversations):
    pyarrow = pytest.importorskip("pyarrow", reason="needs pyarrow: pip install nemo-rmt[data]")
    table = pyarrow.Table.from_pylist([{"messages": messages, "source": "x"} for messages in conversations])
    pytest.importorskip("pyarrow.parquet").write_table(table, path)
    return str(path)


def test_a_parquet_file_gives_what_the_same_lines_give(sft_path, tmp_path):
    with_name = [{"role": "user", "name": "Ada", "content": "?"}, {"role": "assistant", "content": "!"}]
    conversations = [*map(conversation, range(20)), with_name]
    lines, rows = sft_path(*conversations), parquet(tmp_path / "sft.parquet", *conversations)
    examples = [SFTExamples(Data(sft_path=path), seed=0) for path in (lines, rows)]
    for index in range(42):
        assert examples[0][index] == examples[1][index]


def test_a_malformed_row_is_named(tmp_path):
    for bad, message in (
        ([{"role": "user", "content": None}], r"sft.parquet, row 1: a message needs a text content"),
        (None, r"sft.parquet, row 1: messages must be a list"),
        ([{"role": "user", "content": "?"}], r"sft.parquet, row 1: .*role assistant"),
    ):
        with pytest.raises(UserError, match=message):
            SFTExamples(Data(sft_path=parquet(tmp_path / "sft.parquet", conversation(1), bad)), seed=0)
    with pytest.raises(UserError, match="no column 'messages', which data.sft_path asks for; its columns: none"):
        SFTExamples(Data(sft_path=parquet(tmp_path / "sft.parquet")), seed=0)


def test_generated_examples_are_training_problems_of_each_task_in_turn():
    tasks = [{"name": "short", "options": {"lengths": [2]}}, {"name": "long", "options": {"lengths": [9]}}]
    examples = SFTExamples(Data(tasks=tasks, sft_options={"direct": 1.0}), seed=0)
    for index in range(40):
        user, assistant = examples[index]
        assert len(user["content"]) == (19 if index % 2 else 5)
        assert not problem_is_held_out(user["content"])
        assert assistant["content"].startswith("#")
    assert examples[7] == SFTExamples(Data(tasks=tasks, sft_options={"direct": 1.0}), seed=0)[7]
    assert examples[7] != SFTExamples(Data(tasks=tasks, sft_options={"direct": 1.0}), seed=1)[7]


@pytest.mark.parametrize(
    "record, message",
    [
        ("{", r"sft.jsonl:2: not a line of UTF-8 JSON"),
        ('{"text": "a"}', r'sft.jsonl:2: each line must be an object with "messages"'),
        ([], r"sft.jsonl:2: messages must be a list of at least one"),
        ([{"role": "bot", "content": ""}], r"sft.jsonl:2: a message needs a role"),
        ([{"role": "user", "content": "?"}], r"sft.jsonl:2: .*role assistant"),
    ],
)
def test_a_malformed_conversation_is_named(sft_path, record, message):
    with pytest.raises(UserError, match=message):
        SFTExamples(Data(sft_path=sft_path(conversation(1), record)), seed=0)


def test_missing_sources_and_options_are_named(sft_path, tmp_path):
    task = {"name": "chains"}
    with pytest.raises(UserError, match="data.sft_path=.*no such file"):
        SFTExamples(Data(sft_path=str(tmp_path / "none")), seed=0)
    with pytest.raises(UserError, match="the file is empty"):
        SFTExamples(Data(sft_path=sft_path("")), seed=0)
    with pytest.raises(UserError, match="nothing to learn from"):
        SFTExamples(Data(), seed=0)
    with pytest.raises(UserError, match="data.sft_options.errors.*error_rate"):
        SFTExamples(Data(tasks=[task], sft_options={"errors": 0.1}), seed=0)
    with pytest.raises(UserError, match="data.sft_options.direct=3"):
        SFTExamples(Data(tasks=[task], sft_options={"direct": 3}), seed=0)
    with pytest.raises(UserError, match="generated solutions only"):
        SFTExamples(Data(sft_path=sft_path(conversation(1)), sft_options={"direct": 0.1}), seed=0)
