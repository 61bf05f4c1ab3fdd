"""Records of Parquet and Arrow files and of datasets of the Hugging Face hub, a batch in memory at a time.

``pyarrow`` and ``datasets`` (the extra ``nemo-rmt[data]``) are imported where they are needed.
"""

from __future__ import annotations

import functools
import importlib.util
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nemo_rmt.data.records import RecordOptions, check_columns
from nemo_rmt.data.text_files import files_of
from nemo_rmt.errors import UserError

if TYPE_CHECKING:
    import datasets
    import pyarrow

ROWS_AT_ONCE = 1024
BUFFER_BYTES = 2**20
"""Read ahead of each Parquet column."""
DOWNLOAD_VARIABLE = "NEMO_RMT_DOWNLOAD"
"""Environment variable, set to 1 for the data stage that ``nemo-rmt data build`` starts: it may use the network."""
HUB_NAME = re.compile(r"\w[\w.-]*/\w[\w.-]*")

Record = tuple[dict[str, Any], str]
"""A record's values by column, and where it stands."""


class TableOptions(RecordOptions):
    """Options of the corpus kinds ``parquet`` and ``arrow``."""


class HubOptions(RecordOptions):
    """Options of the corpus kind ``hub``."""

    config: str | None = None
    """The dataset's configuration; null: its only or default one."""
    split: str = "train"
    """The dataset's split, or a part of it as in "train[:10%]"."""
    revision: str | None = None
    """A commit or tag, so that the dataset cannot change; null: what the hub has on the day."""


def table_texts(path: Path, kind: str, options: TableOptions, key: str) -> Iterator[str]:
    """The document of each row of a file, or of each ``*.parquet`` (``*.arrow``) of a folder in name order.

    kind: parquet or arrow. key: the corpus's recipe key, for messages.
    Raises UserError naming file, row and column of a value that is not text, a missing column, or an unreadable file.
    """
    require_package("pyarrow", f"{key}.kind={kind}")
    for file in files_of(path, f".{kind}", f"{key}.path"):
        if kind == "arrow" and file != path and file.name.startswith("cache-"):
            continue  # what datasets keeps of a map or filter beside the data it was computed from
        read = parquet_records if kind == "parquet" else arrow_records
        for record, where in read(file, options.columns, f"{key}.options"):
            yield options.document(record, where)


def parquet_records(file: Path, columns: list[str], key: str) -> Iterator[Record]:
    """The given columns of each row of a Parquet file.

    key: the recipe key that asks for the columns. Raises UserError for a missing column or an unreadable file.
    """
    import pyarrow.parquet

    def batches() -> Iterator[pyarrow.RecordBatch]:
        # Without a buffer, and by default, the whole of a row group is read at once: often hundreds of megabytes.
        with pyarrow.parquet.ParquetFile(file, pre_buffer=False, buffer_size=BUFFER_BYTES) as table:
            check_columns(columns, table.schema_arrow.names, str(file), key)
            yield from table.iter_batches(ROWS_AT_ONCE, columns=columns)

    return _records(batches(), columns, file, "Parquet")


def arrow_records(file: Path, columns: list[str], key: str) -> Iterator[Record]:
    """``parquet_records`` of an Arrow file, in its file format or in the stream format that ``datasets`` writes."""
    import pyarrow

    def batches() -> Iterator[pyarrow.RecordBatch]:
        with pyarrow.memory_map(str(file)) as source:
            with file.open("rb") as stream:
                is_file_format = stream.read(6) == b"ARROW1"
            reader = pyarrow.ipc.open_file(source) if is_file_format else pyarrow.ipc.open_stream(source)
            check_columns(columns, reader.schema.names, str(file), key)
            yield from (map(reader.get_batch, range(reader.num_record_batches)) if is_file_format else reader)

    return _records(batches(), columns, file, "Arrow")


def _records(batches: Iterable[pyarrow.RecordBatch], columns: list[str], file: Path, form: str) -> Iterator[Record]:
    """Each row of some record batches with its number, from 0, in the file."""
    import pyarrow

    row = 0
    try:
        for batch in batches:
            for start in range(0, batch.num_rows, ROWS_AT_ONCE):
                part = batch.slice(start, ROWS_AT_ONCE)
                for values in zip(*(part.column(name).to_pylist() for name in columns), strict=True):
                    yield dict(zip(columns, values, strict=True)), f"{file}, row {row}"
                    row += 1
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{file}: cannot be read as {form}: {error}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{file}, after row {row}: text that is not UTF-8: {error}") from None


def hub_texts(name: str, options: HubOptions, key: str) -> Iterator[str]:
    """The document of each row of a dataset of the hub, which is downloaded into the cache of ``datasets``.

    ``datasets`` prefers a folder of that name below the current one, without any network.
    key: the corpus's recipe key, for messages. Raises UserError for what ``datasets`` refuses, a missing column, and a
    value that is not text.
    """
    dataset = _load(name, options.config, options.split, options.revision, key)
    where = f"{name}, split {options.split}"
    check_columns(options.columns, dataset.column_names, where, f"{key}.options")
    row = 0
    for batch in dataset.select_columns(options.columns).iter(ROWS_AT_ONCE):
        for values in zip(*(batch[column] for column in options.columns), strict=True):
            yield options.document(dict(zip(options.columns, values, strict=True)), f"{where}, row {row}")
            row += 1


@functools.cache  # both splits and the tokenizer read one revision, also when the hub's moves on meanwhile
def _load(name: str, config: str | None, split: str, revision: str | None, key: str) -> datasets.Dataset:
    import datasets

    try:
        return datasets.load_dataset(name, config, split=split, revision=revision)
    except Exception as error:  # noqa: BLE001 - of several packages, some outside any hierarchy
        raise UserError(
            f"{key}.path={name}: datasets cannot load it with config={config} split={split} revision={revision}: "
            f"{type(error).__name__}: {' '.join(str(error).split())}"
        ) from error


def check_hub(name: str, key: str, *, download: bool) -> None:
    """Raise UserError, without touching the network, unless a hub corpus may be read: see ``check_corpus``."""
    if not HUB_NAME.fullmatch(name):
        raise UserError(
            f"{key}.path={name}: not the name of a dataset on the Hugging Face hub, as in owner/name; for files on "
            "this machine use kind: parquet, arrow or jsonl"
        )
    if not download:
        raise UserError(
            f"{key} is {name} on the Hugging Face hub, and a run does not download: nemo-rmt data build RECIPE ... "
            "builds this run's data first, where there is internet"
        )
    require_package("datasets", f"{key}.kind=hub")


def require_package(package: str, setting: str) -> None:
    """Raise UserError with the remedy unless a package of the extra ``data`` is installed."""
    if importlib.util.find_spec(package) is None:
        raise UserError(f"{setting} needs {package}: pip install 'nemo-rmt[data]'")
