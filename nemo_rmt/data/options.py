"""Free-form ``options`` of a recipe, read into typed ones with errors that name the key."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any, TypeVar

from pydantic import ValidationError

from nemo_rmt.config import Section
from nemo_rmt.errors import UserError

Options = TypeVar("Options", bound=Section)


def nearest(name: str, known: Iterable[str]) -> str:
    """A hint for a misspelt name: the nearest known ones, or all of them when none is near."""
    known = sorted(known)
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    if near:
        return f"did you mean {' or '.join(near)}?"
    return f"known: {', '.join(known)}" if known else "it takes none"


def read_options(kind: type[Options], options: dict[str, Any], key: str) -> Options:
    """Validate ``options`` as ``kind``.

    key: where they stand in the recipe, such as ``data.corpora[chains].options``, for the message.
    Raises UserError naming the first wrong key, its value and what would be right.
    """
    for name in options:
        if name not in kind.model_fields:
            raise UserError(f"{key}.{name}: unknown option; {nearest(str(name), kind.model_fields)}")
    try:
        return kind.model_validate(options)
    except ValidationError as error:
        first = error.errors()[0]
        path = ".".join([key, *(str(part) for part in first["loc"] if part != "[key]")])
        raise UserError(f"{path}={first['input']!r}: {first['msg']}") from None
