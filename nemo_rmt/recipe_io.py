"""Reading and writing recipes: factory, then YAML files, then ``key=value`` overrides; and comparing two.

Everything happens on plain dictionaries, see ``nemo_rmt.recipe_changes``; the values are validated once, at the end.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from nemo_rmt.config import Recipe, Section
from nemo_rmt.errors import UserError
from nemo_rmt.recipe_changes import YamlLoader, merge, override, section_of, shortened, unknown_key


def load_recipe(name: str | None, yaml_files: list[Path], overrides: list[str]) -> Recipe:
    """The recipe called ``name`` (None: every key's default), changed by YAML files and then by overrides.

    YAML files are partial recipes; later ones win, mappings merge, lists replace. Overrides are
    ``key=value`` with dotted keys (list items by index: ``data.corpora.0.weight=2``) and YAML values, or
    ``key*=factor`` and ``key+=n`` for numbers. Raises UserError for an unknown recipe, file or key, a
    value of the wrong type and any combination the recipe refuses.
    """
    if name is None:
        values = Recipe().model_dump()
    else:
        from nemo_rmt import recipes  # here: the recipes import the configuration

        values = recipes.build(name).model_dump()
    for path in yaml_files:
        merge(values, read_yaml(path))
    for text in overrides:
        override(values, text)
    return validate(Recipe, values)


def validate(kind: type[Section], values: Any) -> Any:
    """Build a Section of type ``kind``; pydantic's errors become one UserError that names keys and values."""
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        raise UserError("; ".join(map(_describe, _meant(error.errors(), kind, values)))) from None


def recipe_differences(a: Recipe, b: Recipe) -> list[str]:
    """One line ``key: value in a -> value in b`` for each key that differs."""
    return [describe_change(*change) for change in changed_keys(a, b)]


def describe_change(key: str, old: Any, new: Any) -> str:
    """One entry of changed_keys, for people."""
    return f"{key}: {shortened(old)} -> {shortened(new)}"


def changed_keys(a: Recipe, b: Recipe) -> list[tuple[str, Any, Any]]:
    """(dotted key, value in a, value in b) for each key that differs; a list of another length counts as one key."""

    def walk(key: str, old: Any, new: Any) -> Iterator[tuple[str, Any, Any]]:
        if isinstance(old, dict) and isinstance(new, dict):
            for name in [*old, *(each for each in new if each not in old)]:
                yield from walk(f"{key}.{name}" if key else str(name), old.get(name), new.get(name))
        elif isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
            for index, (x, y) in enumerate(zip(old, new, strict=True)):
                yield from walk(f"{key}.{index}", x, y)
        elif old != new:
            yield key, old, new

    return list(walk("", a.model_dump(mode="json"), b.model_dump(mode="json")))


def resolved_yaml(recipe: Recipe, comments: bool) -> str:
    """The whole recipe as YAML that loads again unchanged; ``comments`` puts each key's meaning above it."""
    return "\n".join(_lines(recipe, 0, comments)) + "\n"


def read_yaml(path: Path) -> dict[str, Any]:
    """A file's mapping. Raises UserError when it cannot be read, or holds something else."""
    try:
        values = yaml.load(Path(path).read_text(encoding="utf-8"), YamlLoader)
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {path}: {error}") from error
    except yaml.YAMLError as error:
        raise UserError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from error
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise UserError(f"{path} must be a mapping of keys, got {shortened(values)}")
    return values


def _meant(errors: list[Any], kind: type[Section], values: Any) -> Iterator[dict[str, Any]]:
    """pydantic's errors at their keys. Where a key takes text or a section, pydantic tells what is wrong with the value
    as either, with the alternative's name in the key: a mapping is meant as a section, all else as text."""
    for error in errors:
        annotation, value, key = kind, values, []
        for part in error["loc"]:
            section = section_of(annotation)
            if section not in (None, annotation):
                annotation = section if isinstance(value, dict) else str
                if part != annotation.__name__:
                    break
                continue
            key.append(part)
            annotation = section.model_fields[part].annotation if section and part in section.model_fields else None
            value = value.get(part) if isinstance(value, dict) else None
        else:
            yield {**error, "loc": tuple(key)}


def _describe(error: Any) -> str:
    """One pydantic error as ``key=value: what was expected``, or ``section: message`` from our validators."""
    key = ".".join(str(part) for part in error["loc"])
    if error["type"] == "value_error":
        message = str(error["ctx"]["error"])
        return f"{key}: {message}" if key else message
    if error["type"] == "extra_forbidden":
        return str(unknown_key(tuple(str(part) for part in error["loc"])))
    if error["type"] == "missing":
        return f"{key} is required"
    return f"{key}={shortened(error['input'])}: {error['msg'].replace('Input should be', 'expected', 1)}"


def _lines(section: Section, indent: int, comments: bool) -> list[str]:
    """A section as YAML lines; nested sections and lists of sections are indented by two."""
    pad, lines = " " * indent, []
    for name, field in type(section).model_fields.items():
        value = getattr(section, name)
        if comments and field.description:
            lines += [f"{pad}# {line}" for line in field.description.splitlines()]
        if isinstance(value, Section):
            lines += [f"{pad}{name}:", *_lines(value, indent + 2, comments)]
        elif isinstance(value, list) and value and isinstance(value[0], Section):
            lines.append(f"{pad}{name}:")
            for entry in value:
                lines += [f"{pad}-", *_lines(entry, indent + 2, comments)]
        else:
            plain = list(value) if isinstance(value, tuple) else value
            # PyYAML writes U+0085 as it is and reads it as a line break: escape what does not print
            readable = json.dumps(plain, ensure_ascii=False).isprintable()
            dumped = yaml.safe_dump({name: plain}, sort_keys=False, allow_unicode=readable, width=10**6)
            lines += [pad + line for line in dumped.removesuffix("\n").split("\n")]
    return lines
