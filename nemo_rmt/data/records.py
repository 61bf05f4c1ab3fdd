"""What document a record becomes: one of its columns, or a template filled from several.

The same for every format that has records: lines of JSON, and rows of Parquet, Arrow and hub datasets.
"""

from __future__ import annotations

import re
from typing import Any

from pydantic import PositiveInt, model_validator

from nemo_rmt.config import Section
from nemo_rmt.errors import UserError

PLACEHOLDER = re.compile(r"\{([^{}]+)\}")


class RecordOptions(Section):
    """Options of every corpus kind made of records."""

    column: str = "text"
    """The column that holds the document."""
    template: str | None = None
    """A document written from several columns instead, such as "Problem:\\n{problem}\\n\\nSolution:\\n{solution}";
    each {name} is a column, empty braces and backslashes stay as they are."""
    max_document_characters: PositiveInt | None = None
    """Cut longer documents at line boundaries; null: leave them whole."""

    @model_validator(mode="after")
    def _one_of_them(self) -> RecordOptions:
        if self.template is not None and "column" in self.model_fields_set:
            raise ValueError("column and template exclude each other: leave out one of them")
        if self.template is not None and not PLACEHOLDER.search(self.template):
            raise ValueError("template must name at least one column, as in {problem}")
        return self

    @property
    def columns(self) -> list[str]:
        """The columns a document is made of."""
        return [self.column] if self.template is None else list(dict.fromkeys(PLACEHOLDER.findall(self.template)))

    def document(self, record: dict[str, Any], where: str) -> str:
        """The document of a record that has ``columns``. Raises UserError naming ``where`` for one without text."""
        for name in self.columns:
            if not isinstance(record[name], str):
                raise UserError(f"{where}: column {name!r} holds {short(record[name])}, which is not text")
        if self.template is None:
            return record[self.column]
        return PLACEHOLDER.sub(lambda match: record[match.group(1)], self.template)


def check_columns(wanted: list[str], found: list[str], where: str, key: str) -> None:
    """Raise UserError naming ``where``, the first missing column, the key that asks for it, and what there is."""
    for name in wanted:
        if name not in found:
            known = ", ".join(map(str, found)) or "none"
            raise UserError(f"{where}: no column {name!r}, which {key} asks for; its columns: {known}")


def short(value: Any, limit: int = 60) -> str:
    """A value as it would be typed, cut for a message."""
    text = repr(value)
    return text if len(text) <= limit else text[: limit - 3] + "..."
