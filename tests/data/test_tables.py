"""Corpora from Parquet, Arrow and the Hugging Face hub: the documents of the rows, and errors that name them."""

from __future__ import annotations

import json
import random
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nemo_rmt.config import Corpus, Data
from nemo_rmt.data import tables
from nemo_rmt.data.corpora import check_corpus, documents
from nemo_rmt.errors import UserError

datasets = pytest.importorskip("datasets", reason="needs datasets: pip install nemo-rmt[data]")
pa = pytest.importorskip("pyarrow", reason="needs pyarrow: pip install nemo-rmt[data]")
pq = pytest.importorskip("pyarrow.parquet")

MATHS = {"problem": ["1+1?", "2+2?", "3+3?"], "solution": ["2", "4", "6"], "level": [1, 2, 3]}
TEMPLATE = {"template": "Problem:\n{problem}\n\nSolution:\n{solution}"}


def read(*, download=False, **settings):
    """All documents, of both sides; half of them are held out."""
    corpus = Corpus(name="c", **{"held_out": 1, **settings})
    sides = [
        list(documents(corpus, Data(), split, 0, run_seed=0, download=download)) for split in ("train", "held_out")
    ]
    assert len(sides[1]) == 1 and not set(sides[0]) & set(sides[1])
    return sorted(sides[0] + sides[1])


def check(*, download=False, **settings):
    check_corpus(Corpus(name="c", **settings), Data(), download=download)


def write(path, table, kind="parquet"):
    """A table as Parquet, as Arrow's file format or as Arrow's stream, which ``datasets`` writes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    table = table if isinstance(table, pa.Table) else pa.table(table)
    if kind == "parquet":
        pq.write_table(table, path, row_group_size=2)
        return str(path)
    writer = {"file": pa.ipc.new_file, "stream": pa.ipc.new_stream}[kind]
    with writer(str(path), table.schema) as sink:
        sink.write_table(table, max_chunksize=2)
    return str(path)


FORMATS = [("parquet", "parquet"), ("arrow", "file"), ("arrow", "stream")]


@pytest.mark.parametrize("kind, form", FORMATS)
def test_every_row_is_a_document_whatever_the_format(tmp_path, kind, form):
    path = write(tmp_path / "maths.bin", MATHS, form)
    assert read(kind=kind, path=path, options={"column": "problem"}) == MATHS["problem"]
    written = read(kind=kind, path=path, options=TEMPLATE)
    assert written[1] == "Problem:\n2+2?\n\nSolution:\n4" and len(written) == 3
    check(kind=kind, path=path, options=TEMPLATE)


@given(st.lists(st.text(min_size=1).filter(lambda text: not text.isspace()), min_size=2, max_size=20, unique=True))
def test_all_text_comes_back_from_every_format(tmp_path_factory, texts):
    folder = tmp_path_factory.mktemp("corpus")
    for kind, form in FORMATS:
        assert read(kind=kind, path=write(folder / form, {"text": texts}, form)) == sorted(texts)


@pytest.mark.parametrize("kind, form", FORMATS)
def test_batches_larger_than_those_read_at_once_lose_nothing(tmp_path, kind, form, monkeypatch):
    monkeypatch.setattr(tables, "ROWS_AT_ONCE", 3)
    texts = [f"document {index:03}" for index in range(100)]
    table = pa.table({"text": pa.array(texts).dictionary_encode(), "other": list(range(100))})
    path = tmp_path / "a"
    pq.write_table(table, path) if form == "parquet" else None
    if form != "parquet":
        with {"file": pa.ipc.new_file, "stream": pa.ipc.new_stream}[form](str(path), table.schema) as sink:
            sink.write_table(table)
    assert read(kind=kind, path=str(path)) == texts


@pytest.mark.parametrize("kind, form", FORMATS)
def test_a_folder_is_read_in_name_order_with_its_subfolders(tmp_path, kind, form):
    for name in ("b", "a/z", "c"):
        write(tmp_path / f"{name}.{kind}", {"text": [f"{name} 0", f"{name} 1"]}, form)
    write(tmp_path / "cache-0.txt", {"text": ["not a table's name"]}, form)
    texts = list(tables.table_texts(tmp_path, kind, tables.TableOptions(), "key"))
    assert texts == ["a/z 0", "a/z 1", "b 0", "b 1", "c 0", "c 1"]


def test_what_datasets_saved_is_read_without_its_caches(tmp_path):
    dataset = datasets.Dataset.from_dict(MATHS)
    dataset.save_to_disk(tmp_path / "saved", num_shards=2)
    again = datasets.load_from_disk(tmp_path / "saved")
    again.map(lambda row: {"problem": row["problem"] + "!"}, cache_file_name=str(tmp_path / "saved" / "cache-1.arrow"))
    path = tmp_path / "saved"
    assert {file.name[:6] for file in path.glob("*.arrow")} == {"data-0", "cache-"}
    assert read(kind="arrow", path=str(path), options={"column": "problem"}) == MATHS["problem"]


def test_long_documents_are_cut_and_blank_ones_left_out(tmp_path):
    path = write(tmp_path / "x.parquet", {"text": ["one\ntwo\n", " \n", ""]})
    assert read(kind="parquet", path=path, options={"max_document_characters": 5}) == ["one\n", "two\n"]


def test_a_row_group_is_never_in_memory_whole(tmp_path):
    """Arrow's peak memory in a process of its own, which reads 40 MB of text that does not compress."""
    rng = random.Random(0)
    texts = pa.table({"text": [rng.randbytes(2000).hex() for _ in range(10_000)]})
    pq.write_table(texts, tmp_path / "x.parquet", use_dictionary=False)
    program = (
        "import sys, pyarrow; from pathlib import Path; from nemo_rmt.data import tables\n"
        "texts = tables.table_texts(Path(sys.argv[1]), 'parquet', tables.TableOptions(), 'key')\n"
        "print(sum(map(len, texts)), pyarrow.default_memory_pool().max_memory())\n"
    )
    command = [sys.executable, "-c", program, str(tmp_path / "x.parquet")]
    read, peak = map(int, subprocess.run(command, check=True, capture_output=True).stdout.split())
    assert read == 40_000_000 and peak < 20_000_000


@pytest.mark.parametrize("kind, form", FORMATS)
@pytest.mark.parametrize(
    "table, options, message",
    [
        (MATHS, {}, r"a.bin: no column 'text', which data.corpora\[c\].options asks for.*: problem, solution, level"),
        (MATHS, {"template": "{problem} {answer}"}, r"a.bin: no column 'answer'"),
        (MATHS, {"column": "level"}, r"a.bin, row 0: column 'level' holds 1, which is not text"),
        ({"text": ["a", "b", None]}, {}, r"a.bin, row 2: column 'text' holds None, which is not text"),
        ({"text": ["a", b"b"][1:]}, {}, r"a.bin, row 0: column 'text' holds b'b', which is not text"),
        (MATHS, {"colum": "problem"}, r"data.corpora\[c\].options.colum: unknown option; did you mean column"),
        (MATHS, {"column": "problem", "template": "{level}"}, "exclude each other"),
        ({"text": ["", " "]}, {}, r"data.corpora\[c\].path=.*a.bin: no documents with text"),
    ],
)
def test_wrong_tables_name_file_row_and_column(tmp_path, kind, form, table, options, message):
    path = write(tmp_path / "a.bin", table, form)
    with pytest.raises(UserError, match=message):
        check(kind=kind, path=path, options=options)


def test_what_is_no_table_is_refused(tmp_path):
    text, torn = tmp_path / "text.bin", tmp_path / "torn.parquet"
    text.write_text("Not a table.\n" * 9)
    write(torn, {"text": [f"document {index}" for index in range(1000)]})
    content = torn.read_bytes()
    torn.write_bytes(content[:100] + b"\xff" * 400 + content[500:])
    for kind, path in (("parquet", text), ("arrow", text), ("parquet", torn)):
        with pytest.raises(UserError, match=rf"{path.name}: cannot be read as {kind.title()}: "):
            read(kind=kind, path=str(path))
    with pytest.raises(UserError, match=r"data.corpora\[c\].path=.*: no \*.arrow files in this folder"):
        check(kind="arrow", path=str(tmp_path))
    with pytest.raises(UserError, match="no such file or folder"):
        check(kind="parquet", path="/nowhere.parquet")


def test_text_that_is_not_utf_8_is_named(tmp_path):
    latin = pa.Array.from_buffers(pa.utf8(), 2, pa.array([b"fine", b"caf\xe9"]).buffers())
    path = write(tmp_path / "x.arrow", pa.table({"text": latin}), "stream")
    with pytest.raises(UserError, match="x.arrow, after row 0: text that is not UTF-8"):
        check(kind="arrow", path=path)


@pytest.mark.parametrize("kind, package", [("parquet", "pyarrow"), ("arrow", "pyarrow"), ("hub", "datasets")])
def test_a_missing_package_is_named_with_its_remedy(tmp_path, monkeypatch, kind, package):
    path = "owner/name" if kind == "hub" else write(tmp_path / "x.parquet", MATHS)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UserError, match=rf"data.corpora\[c\].kind={kind} needs {package}: pip install 'nemo-rmt\[dat"):
        check(kind=kind, path=path, download=True)


# The hub. ``datasets`` prefers a folder of a dataset's name, so that its own loading is tested without a network.


@pytest.fixture
def no_network(monkeypatch):
    """Any connection fails the test, and nothing loaded before is known."""

    def refuse(*args, **kwargs):
        raise AssertionError("the network was touched")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    tables._load.cache_clear()


@pytest.fixture
def hub(tmp_path, monkeypatch, no_network):
    """The dataset ``owner/name`` with two configurations, and a cache of its own."""
    folder = tmp_path / "owner" / "name"
    write(folder / "main" / "train-0.parquet", MATHS)
    write(folder / "main" / "test-0.parquet", {**MATHS, "problem": ["7+7?", "8+8?", "9+9?"]})
    write(folder / "other" / "train-0.parquet", {"text": ["a", "b"]})
    configs = [{"config_name": name, "data_dir": name} for name in ("main", "other")]
    (folder / "README.md").write_text(f"---\nconfigs: {json.dumps(configs)}\n---\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    return {"kind": "hub", "path": "owner/name", "download": True}


def test_a_hub_dataset_is_read_by_configuration_split_and_column(hub):
    assert read(**hub, options={"config": "main", "column": "problem"}) == MATHS["problem"]
    assert read(**hub, options={"config": "main", "split": "test", **TEMPLATE})[0].startswith("Problem:\n7+7?\n")
    assert read(**hub, options={"config": "main", "split": "train[1:]", "column": "problem"}) == MATHS["problem"][1:]
    assert read(**hub, options={"config": "other"}) == ["a", "b"]


def test_every_reading_is_of_the_dataset_loaded_first(hub, tmp_path):
    settings = {**hub, "options": {"config": "other"}}
    assert read(**settings) == ["a", "b"]
    write(tmp_path / "owner" / "name" / "other" / "train-0.parquet", {"text": ["newer", "newest"]})
    assert read(**settings) == ["a", "b"]


def test_the_options_reach_datasets_and_code_is_never_trusted(monkeypatch, no_network):
    asked = []

    def load_dataset(*args, **options):
        asked.append((args, options))
        return datasets.Dataset.from_dict({"text": ["a", "b"]})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    options = {"config": "main", "split": "test", "revision": "abc123"}
    assert read(kind="hub", path="owner/name", download=True, options=options) == ["a", "b"]
    assert asked == [(("owner/name", "main"), {"split": "test", "revision": "abc123"})]


@pytest.mark.parametrize(
    "options, message",
    [
        ({"config": "none"}, r"data.corpora\[c\].path=owner/name: datasets cannot load it with config=none .*'main'"),
        ({"config": "main", "split": "tests"}, r"split=tests revision=None: ValueError: .*tests"),
        ({"config": "main"}, r"owner/name, split train: no column 'text', which .*: problem, solution, level"),
        ({"config": "main", "column": "level"}, r"owner/name, split train, row 0: column 'level' holds 1, which is n"),
    ],
)
def test_what_a_hub_dataset_does_not_have_is_named(hub, options, message):
    with pytest.raises(UserError, match=message):
        read(**hub, options=options)


def test_a_run_does_not_download(monkeypatch, no_network):
    monkeypatch.setattr(datasets, "load_dataset", lambda *a, **k: pytest.fail("a run loaded a hub dataset"))
    message = r"data.corpora\[c\] is owner/name on the Hugging Face hub, and a run does not download: nemo-rmt data bui"
    for attempt in (check, read):
        with pytest.raises(UserError, match=message):
            attempt(kind="hub", path="owner/name")


def test_the_pre_flight_of_a_download_reads_options_and_no_network(monkeypatch, no_network):
    monkeypatch.setattr(datasets, "load_dataset", lambda *a, **k: pytest.fail("the pre-flight loaded a hub dataset"))
    check(kind="hub", path="owner/name", download=True, options={"revision": "v1", **TEMPLATE}, held_out=200)
    with pytest.raises(UserError, match=r"data.corpora\[c\].options.splits: unknown option; did you mean split"):
        check(kind="hub", path="owner/name", download=True, options={"splits": "train"})
    for path in ("gsm8k", "/data/maths", "../maths", "https://huggingface.co/datasets/owner/name", str(Path.home())):
        with pytest.raises(UserError, match=rf"data.corpora\[c\].path={path}: not the name of a dataset"):
            check(kind="hub", path=path, download=True)
