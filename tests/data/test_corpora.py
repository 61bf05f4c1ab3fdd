"""Corpora: no document or problem on both sides, streams that repeat, errors that name path and line."""

from __future__ import annotations

import hashlib
import itertools
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nemo_rmt.config import Corpus, Data
from nemo_rmt.data import text_files
from nemo_rmt.data.corpora import check_corpus, documents, mixture
from nemo_rmt.data.seeds import problem_is_held_out
from nemo_rmt.errors import UserError

DATA = Data(tasks=[{"name": "sums", "family": "chains"}])


def read(split="train", seed=0, run_seed=0, **settings):
    return list(documents(Corpus(name="c", **settings), DATA, split, seed, run_seed=run_seed))


def question_of(document):
    """The problem a chain document is about, whatever its style."""
    if document.startswith("Q:"):
        return document[2 : document.index("\n")]
    lines = document.split("\n")
    return lines[0][2:] + "".join(line[1:] for line in lines[1 : lines.index("print(x%10)")])


def both_sides(corpus, run_seed=0):
    """The training and held-out documents of a corpus so small that one side may be empty."""
    sides = []
    for split in ("train", "held_out"):
        try:
            sides.append(list(documents(corpus, DATA, split, 0, run_seed=run_seed)))
        except UserError:
            sides.append([])
    return sides


@pytest.fixture
def jsonl(tmp_path):
    def write(*lines, name="texts.jsonl"):
        path = tmp_path / name
        path.write_bytes(b"".join((x if isinstance(x, bytes) else json.dumps(x).encode()) + b"\n" for x in lines))
        return str(path)

    return write


# Splits.


@given(st.lists(st.text(alphabet="ab", min_size=1, max_size=4), min_size=1, max_size=60))
def test_exact_duplicates_land_on_one_side_and_nothing_is_lost(tmp_path_factory, texts):
    path = tmp_path_factory.mktemp("corpus") / "x.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    sides = both_sides(Corpus(name="c", kind="jsonl", path=str(path), held_out=0.4))
    assert not set(sides[0]) & set(sides[1])
    assert sorted(sides[0] + sides[1]) == sorted(texts)


def test_the_held_out_share_is_as_asked(jsonl):
    path = jsonl(*({"text": f"document {index}"} for index in range(4000)))
    held_out = read("held_out", kind="jsonl", path=path, held_out=0.1)
    assert len(held_out) / 4000 == pytest.approx(0.1, abs=0.015)
    assert held_out == read("held_out", seed=99, kind="jsonl", path=path, held_out=0.1)


@given(st.lists(st.text(alphabet="ab", min_size=1, max_size=4), min_size=1, max_size=60), st.integers(1, 12))
def test_an_integer_held_out_is_a_number_of_distinct_texts(tmp_path_factory, texts, count):
    path = tmp_path_factory.mktemp("corpus") / "x.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    corpus = Corpus(name="c", kind="jsonl", path=str(path), held_out=count)
    by_hash = sorted(set(texts), key=lambda text: hashlib.sha256(f"7/{text}".encode()).hexdigest())
    if len(by_hash) <= count:
        for attempt in (lambda: check_corpus(corpus, DATA), lambda: [*documents(corpus, DATA, "train", 0, run_seed=7)]):
            with pytest.raises(UserError, match=rf"data.corpora\[c\].held_out={count} leaves nothing to train on"):
                attempt()
        return
    check_corpus(corpus, DATA)
    train, held_out = both_sides(corpus, run_seed=7)
    chosen = set(by_hash[:count])
    assert held_out == [text for text in texts if text in chosen]
    assert train == [text for text in texts if text not in chosen]


def test_an_integer_held_out_depends_on_the_run_seed_alone(jsonl):
    settings = {
        "kind": "jsonl",
        "path": jsonl(*({"text": f"document {index}"} for index in range(400))),
        "held_out": 30,
    }
    held_out = read("held_out", **settings)
    assert len(held_out) == 30 and held_out == read("held_out", seed=99, **settings)
    assert set(held_out) != set(read("held_out", run_seed=99, **settings))
    tokenizer_reads = mixture(Data(corpora=[{"name": "c", **settings}]), 5, run_seed=0)
    assert set(tokenizer_reads) == {f"document {index}" for index in range(400)} - set(held_out)


def test_num_documents_bounds_both_sides_of_an_integer_held_out_together(jsonl):
    path = jsonl(*({"text": f"document {index}"} for index in range(100)))
    settings = {"kind": "jsonl", "path": path, "num_documents": 60, "held_out": 20}
    train, held_out = read(**settings), read("held_out", **settings)
    assert (len(train), len(held_out)) == (40, 20)
    assert set(train) | set(held_out) == {f"document {index}" for index in range(60)}
    with pytest.raises(UserError, match="no more than 60 distinct documents"):
        check_corpus(Corpus(name="c", **{**settings, "held_out": 60}), DATA)


def test_chain_documents_are_about_problems_of_their_side():
    settings = {"kind": "chains", "num_documents": 500, "held_out": 0.2}
    sides = {split: read(split, **settings) for split in ("train", "held_out")}
    assert (len(sides["train"]), len(sides["held_out"])) == (500, 100)
    for split, texts in sides.items():
        assert {problem_is_held_out(question_of(text)) for text in texts} == {split == "held_out"}


def test_generated_documents_repeat_for_a_seed_and_differ_between_corpora():
    texts = read(kind="chains", num_documents=50)
    assert texts == read(kind="chains", num_documents=50) != read(seed=1, kind="chains", num_documents=50)
    assert texts != list(documents(Corpus(name="other", kind="chains", num_documents=50), DATA, "train", 0, run_seed=0))


def test_styles_have_their_frequencies():
    texts = read(kind="chains", num_documents=3000, options={"styles": {"worked": 3, "think": 1}, "lazy": 0})
    assert sum("<think>" in text for text in texts) / 3000 == pytest.approx(0.25, abs=0.03)
    assert all("=" in text for text in texts)


def test_solutions_are_of_the_task_and_its_side():
    template = "{question} {solution} {question} {other}"
    settings = {"kind": "solutions", "num_documents": 100, "options": {"task": "sums", "template": template}}
    for split in ("train", "held_out"):
        for text in read(split, **settings, held_out=0.3):
            question, solution, again, other = text.split(" ")
            assert question == again and solution.startswith(question[:3]) and other == "{other}"
            assert problem_is_held_out(question) == (split == "held_out")


def test_solutions_take_the_noise_of_their_task():
    texts = read(kind="solutions", num_documents=100, options={"task": "sums", "direct": 1.0})
    assert all("\nA:#" in text for text in texts)


# Files.


def test_folders_are_read_in_order_without_binary_and_hidden_files(tmp_path):
    for name, content in [
        ("b.txt", b"bee\r\nsting"),
        ("a/z.txt", b"\xef\xbb\xbfzed"),
        ("a/binary.txt", b"\x00\x01"),
        ("a/latin.txt", b"caf\xe9"),
        (".git/config.txt", b"hidden"),
        ("blank.txt", b" \n"),
        ("c.md", b"sea"),
    ]:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
    texts = [*text_files.folder_texts(tmp_path, None)]
    assert texts == ["zed", "bee\nsting", " \n", "sea"]
    options = {"suffixes": [".txt"], "max_document_characters": 4}
    corpus = Corpus(name="c", kind="folder", path=str(tmp_path), options=options, held_out=0.49)
    assert sorted(both_sides(corpus)[0] + both_sides(corpus)[1]) == ["bee\n", "g", "stin", "zed"]


@given(st.text(alphabet="ab\n", max_size=80), st.integers(1, 12))
def test_cutting_loses_nothing_and_prefers_line_ends(text, limit):
    pieces = list(text_files.cut(text, limit))
    assert "".join(pieces) == text
    assert all(len(piece) <= limit for piece in pieces)
    assert all(piece.endswith("\n") for piece in pieces[:-1] if "\n" in piece)


def test_a_document_is_a_column_or_a_template_filled_from_several(jsonl):
    path = jsonl({"problem": "1+{solution}?", "solution": "2"}, {"problem": "3?", "solution": "4"})

    def texts(**options):
        return [*text_files.jsonl_texts(Path(path), text_files.JsonlOptions(**options), "key")]

    assert texts(column="problem") == ["1+{solution}?", "3?"]
    template = r"P: {problem} \boxed{} \boxed{{solution}} {problem}"
    assert texts(template=template)[1] == r"P: 3? \boxed{} \boxed{4} 3?"
    assert texts(template=template)[0].startswith("P: 1+{solution}? ")


def test_num_documents_bounds_what_is_read(jsonl):
    path = jsonl(*({"text": f"document {index}"} for index in range(100)), b"{broken")
    assert len(read(kind="jsonl", path=path, num_documents=50, held_out=0.1)) <= 50


def test_the_standard_library_is_there_whole_and_by_part():
    parts = {part: list(itertools.islice(text_files.stdlib_texts(part), 40)) for part in ("all", "code", "docstrings")}
    assert all(sum(map(len, texts)) > 10_000 for texts in parts.values())
    whole, code, docstrings = (max(texts, key=len) for texts in parts.values())
    assert len(code) < len(whole)
    compile(code, "code", "exec")


def test_a_source_is_divided_into_docstrings_and_the_rest():
    function = 'def f():\n    """Only this.\n\n    More."""\n'
    source = f'"""Module."""\n\nx = "kept"\n\n{function}\nclass C:\n    "One."\n    y = 1\n'
    assert text_files._part(source, "docstrings") == "Module.\n\nOnly this.\n\nMore.\n\nOne."
    assert text_files._part(source, "code") == '\nx = "kept"\n\ndef f():\n    ...\n\nclass C:\n    y = 1\n'
    assert text_files._part("def broken(:", "code") == ""


def test_the_mixture_follows_the_weights(jsonl):
    prose = jsonl(*({"text": f"prose {index} " * 9} for index in range(900)))
    data = Data(
        corpora=[
            {"name": "chains", "kind": "chains", "num_documents": 5000, "weight": 3},
            {"name": "prose", "kind": "jsonl", "path": prose},
            {"name": "unused", "kind": "jsonl", "path": "/nowhere", "weight": 0},
        ]
    )
    texts = list(itertools.islice(mixture(data, 0, run_seed=0), 2000))
    characters = sum(len(text) for text in texts if text.startswith("prose"))
    assert characters / sum(map(len, texts)) == pytest.approx(0.25, abs=0.01)
    assert sum(1 for _ in mixture(data, 0, run_seed=0)) > 5500  # goes on when one ends


# Wrong input.


@pytest.mark.parametrize(
    "line, message",
    [
        (b'{"text": "a"', r"texts.jsonl:2: not a line of UTF-8 JSON"),
        (b"\xff\xfe", r"texts.jsonl:2: not a line of UTF-8 JSON"),
        (
            b'{"body": "a"}',
            r"texts.jsonl:2: no column 'text', which data.corpora\[c\].options asks for; its columns: body",
        ),
        (b'{"text": 3}', r"texts.jsonl:2: column 'text' holds 3, which is not text"),
        (b'["text"]', r'texts.jsonl:2: each line must be an object, as in {"text": "..."}'),
        (b'{"text": "\\ud800"}', r"texts.jsonl:2: the text holds a lone surrogate"),
    ],
)
def test_a_malformed_line_is_named(jsonl, line, message):
    path = jsonl({"text": "fine"}, line)
    for attempt in (lambda: read(kind="jsonl", path=path), lambda: check(kind="jsonl", path=path)):
        with pytest.raises(UserError, match=message):
            attempt()


def check(**settings):
    check_corpus(Corpus(name="c", **settings), DATA)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"kind": "jsonl", "path": "/nowhere.jsonl"}, r"data.corpora\[c\].path=/nowhere.jsonl: no such file"),
        ({"kind": "folder", "path": __file__}, r"data.corpora\[c\].path=.*: not a folder"),
        ({"kind": "stdlib", "options": {"part": "test"}}, r"data.corpora\[c\].options.part='test'"),
        ({"kind": "stdlib", "options": {"parts": "code"}}, r"options.parts: unknown option; did you mean part"),
        ({"kind": "jsonl", "path": __file__, "options": {"template": "{a}", "column": "b"}}, "exclude each other"),
        ({"kind": "jsonl", "path": __file__, "options": {"template": r"\boxed{}"}}, "must name at least one column"),
        ({"kind": "chains", "options": {"styles": {"poem": 1}}}, r"data.corpora\[c\].options.styles.poem"),
        ({"kind": "chains", "options": {"styles": {"worked": 0}}}, "at least one style"),
        ({"kind": "chains", "options": {"error_rate": 2}}, r"data.corpora\[c\].options.error_rate=2"),
        ({"kind": "solutions"}, r"data.corpora\[c\].options.task=None is no entry of data.tasks; known: sums"),
        ({"kind": "solutions", "options": {"task": "sum"}}, "did you mean sums"),
        ({"kind": "solutions", "options": {"task": "sums", "template": "{question}"}}, "must contain"),
        ({"kind": "solutions", "options": {"task": "sums", "errors": 1}}, "options.errors: unknown option"),
    ],
)
def test_the_pre_flight_names_the_key(settings, message):
    with pytest.raises(UserError, match=message):
        check(**settings)


def test_the_pre_flight_passes_good_corpora(jsonl):
    check(kind="jsonl", path=jsonl({"text": "a"}))
    check(kind="stdlib", options={"part": "docstrings"})
    check(kind="chains")
    check(kind="solutions", options={"task": "sums"})


def test_empty_corpora_are_refused(tmp_path, jsonl):
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="the folder is empty"):
        check(kind="folder", path=str(tmp_path / "empty"))
    with pytest.raises(UserError, match="the file is empty"):
        check(kind="jsonl", path=jsonl())
    with pytest.raises(UserError, match="no documents with text"):
        check(kind="jsonl", path=jsonl({"text": " \n"}))
    with pytest.raises(UserError, match=r"data.corpora\[c\] has no train documents"):
        read(kind="jsonl", path=jsonl({"text": ""}))
    with pytest.raises(UserError, match=r"no held-out documents.*raise data.corpora\[c\].held_out=0.02"):
        read("held_out", kind="jsonl", path=jsonl({"text": "a"}))
