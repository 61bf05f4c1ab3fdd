"""Documents from files: JSON lines, folders of text or code, and this Python's own standard library."""

from __future__ import annotations

import ast
import json
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from pydantic import PositiveInt

from nemo_rmt.config import Section
from nemo_rmt.data.records import RecordOptions, check_columns
from nemo_rmt.errors import UserError

NOT_LIBRARY = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
"""Folders under the standard library's that are tests, or not of it."""


class JsonlOptions(RecordOptions):
    """Options of the corpus kind ``jsonl``; a column is a key of each line's object."""


class FolderOptions(Section):
    """Options of the corpus kind ``folder``."""

    max_document_characters: PositiveInt | None = None
    """Cut longer documents at line boundaries; null: leave them whole."""
    suffixes: list[str] | None = None
    """Read only files whose names end so, such as [".md", ".py"]; null: all text files."""


class StdlibOptions(Section):
    """Options of the corpus kind ``stdlib``."""

    part: Literal["code", "docstrings", "all"] = "all"
    """code: sources without their docstrings; docstrings: only these (English about code); all: whole sources."""
    max_document_characters: PositiveInt | None = 4096
    """Cut longer documents at line boundaries; null: leave them whole."""


def files_of(path: Path, suffix: str, key: str) -> list[Path]:
    """The file itself, or the files of a folder and its subfolders that end in ``suffix``, in name order.

    key: the recipe key that gave the path. Raises UserError when the folder has none.
    """
    if not path.is_dir():
        return [path]
    files = sorted(path.rglob(f"*{suffix}"))
    if not files:
        raise UserError(f"{key}={str(path)!r}: no *{suffix} files in this folder")
    return files


def jsonl_texts(path: Path, options: JsonlOptions, key: str) -> Iterator[str]:
    """The document of each line of a file, or of each ``*.jsonl`` of a folder in name order.

    key: the corpus's recipe key, for messages. Raises UserError naming path and line of a malformed record.
    """
    for file in files_of(path, ".jsonl", f"{key}.path"):
        for record, where in jsonl_records(file):
            if not isinstance(record, dict):
                example = ", ".join(f'"{name}": "..."' for name in options.columns)
                raise UserError(f"{where}: each line must be an object, as in {{{example}}}")
            check_columns(options.columns, list(record), where, f"{key}.options")
            text = options.document(record, where)
            try:
                text.encode()
            except UnicodeEncodeError:
                raise UserError(f"{where}: the text holds a lone surrogate, which is not valid Unicode") from None
            yield text


def jsonl_records(file: Path) -> Iterator[tuple[object, str]]:
    """Each line's JSON value with its ``path:line``; blank lines are skipped. Raises UserError for a malformed one."""
    with file.open("rb") as stream:
        for number, line in enumerate(stream, start=1):
            if line.strip():
                yield parse_record(line, f"{file}:{number}"), f"{file}:{number}"


def parse_record(line: bytes, where: str) -> object:
    """One line's JSON value. Raises UserError naming ``where`` when it is not UTF-8 JSON."""
    try:
        return json.loads(line.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: not a line of UTF-8 JSON: {error}") from None


def folder_texts(folder: Path, suffixes: list[str] | None) -> Iterator[str]:
    """The UTF-8 text files under a folder in name order. Binary files and names starting with a dot are skipped."""
    for file in sorted(folder.rglob("*")):
        hidden = any(part.startswith(".") for part in file.relative_to(folder).parts)
        if not hidden and file.is_file() and (suffixes is None or file.name.endswith(tuple(suffixes))):
            text = read_text(file)
            if text is not None:
                yield text


def read_text(file: Path) -> str | None:
    """A file's text with Unix line ends, or None when it is not UTF-8 text."""
    content = file.read_bytes()
    if b"\0" in content:
        return None
    try:
        return content.decode("utf-8-sig").replace("\r\n", "\n")
    except UnicodeDecodeError:
        return None


def stdlib_texts(part: str) -> Iterator[str]:
    """The sources of this Python's standard library, in name order, whole or by part (see ``StdlibOptions``)."""
    root = Path(sysconfig.get_paths()["stdlib"])
    for file in sorted(root.rglob("*.py")):
        if NOT_LIBRARY.isdisjoint(file.relative_to(root).parts):
            source = read_text(file)
            if source is not None:
                yield source if part == "all" else _part(source, part)


def _part(source: str, part: str) -> str:
    """A source's docstrings, joined by blank lines, or the source without them. Empty when it does not parse."""
    try:
        tree = ast.parse(source)
    except SyntaxError:  # templates such as lib2to3's that are not this Python
        return ""
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    owners = [node for node in ast.walk(tree) if isinstance(node, kinds) and ast.get_docstring(node)]
    if part == "docstrings":
        owners.sort(key=lambda node: node.body[0].lineno)
        return "\n\n".join(ast.get_docstring(node) for node in owners)
    lines = source.split("\n")
    for node in owners:
        first, last = node.body[0].lineno - 1, node.body[0].end_lineno
        indent = lines[first][: node.body[0].col_offset]
        if indent.strip() or lines[last - 1][node.body[0].end_col_offset :].strip():
            continue  # shares a line with code
        lines[first:last] = [None] * (last - first)
        if len(node.body) == 1 and not isinstance(node, ast.Module):
            lines[first] = f"{indent}..."
    return "\n".join(line for line in lines if line is not None)


def cut(text: str, max_characters: int | None) -> Iterator[str]:
    """A text in documents of at most ``max_characters``, cut after line ends, or within a line longer than that."""
    if max_characters is None or len(text) <= max_characters:
        yield text
        return
    begin = 0
    while begin < len(text):
        end = begin + max_characters
        if end < len(text):
            line_end = text.rfind("\n", begin, end) + 1
            end = line_end if line_end > begin else end
        yield text[begin:end]
        begin = end
