"""Reading and writing recipes: factory, then YAML files, then ``key=value`` overrides; and comparing two.

Everything happens on plain dictionaries whose keys are checked against the typed recipe as they are
written, so that a misspelt key is refused with the nearest known one; the values are validated once, at
the end.
"""

from __future__ import annotations

import difflib
import json
import re
import types
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from nemo_rmt.config import Recipe, Section, Stage
from nemo_rmt.errors import UserError

_OVERRIDE = re.compile(r"(?P<key>[A-Za-z_]\w*(?:\.\w+)*)(?P<operator>[*+]?)=(?P<value>.*)", re.DOTALL)

_SHORT = {"lr", "min_lr", "schedule", "warmup_steps", "weight_decay", "clip_grad"}
"""Keys of a stage's optimizer that an override may name without ``optim``: none that another section of it has too."""


class _Loader(yaml.SafeLoader):
    """SafeLoader that reads 3e-4 as a number: YAML 1.1 asks for a dot and would make it text."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


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
        _merge(values, read_yaml(path), Recipe, ())
    for override in overrides:
        _override(values, override)
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
    return f"{key}: {_short(old)} -> {_short(new)}"


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


def known_keys(kind: type[Section] = Recipe, prefix: str = "") -> list[str]:
    """Every dotted key of the recipe; list items appear with index 0."""
    keys = []
    for name, field in kind.model_fields.items():
        keys.append(prefix + name)
        if section := _section(field.annotation):
            keys += known_keys(section, f"{prefix}{name}.")
        elif item := _item_section(field.annotation):
            keys += known_keys(item, f"{prefix}{name}.0.")
    return keys


def _section(annotation: Any) -> type[Section] | None:
    """The section that a key holds, always or as one of several alternatives."""
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        return next(filter(None, map(_section, typing.get_args(annotation))), None)
    return annotation if isinstance(annotation, type) and issubclass(annotation, Section) else None


def _item_section(annotation: Any) -> type[Section] | None:
    return _section(typing.get_args(annotation)[0]) if typing.get_origin(annotation) is list else None


def _accepts(annotation: Any, kind: type) -> bool:
    """Whether a key of this annotation takes values of ``kind``, alone or among others."""
    origin = typing.get_origin(annotation)
    if origin in (typing.Union, types.UnionType, typing.Annotated):
        return any(_accepts(each, kind) for each in typing.get_args(annotation))
    return annotation is kind or origin is kind or annotation is Any


def _unknown(path: tuple[str, ...]) -> UserError:
    key = ".".join(path)
    shape = ".".join("0" if part.isdigit() else part for part in path)
    known = known_keys()
    near = difflib.get_close_matches(shape, known, n=1, cutoff=0.7)
    near = near or [each for each in known if each.endswith("." + shape)]
    near = near or difflib.get_close_matches(shape, known, n=1, cutoff=0.3)
    return UserError(f"unknown key {key!r}" + (f": did you mean {near[0]!r}?" if near else ""))


def read_yaml(path: Path) -> dict[str, Any]:
    """A file's mapping. Raises UserError when it cannot be read, or holds something else."""
    try:
        values = yaml.load(Path(path).read_text(encoding="utf-8"), _Loader)
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {path}: {error}") from error
    except yaml.YAMLError as error:
        raise UserError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from error
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise UserError(f"{path} must be a mapping of keys, got {_short(values)}")
    return values


def _merge(target: dict[str, Any], changes: dict[str, Any], kind: type[Section], path: tuple[str, ...]) -> None:
    """Write ``changes`` of a section of type ``kind`` at ``path`` into ``target``, refusing unknown keys."""
    for name, value in changes.items():
        key = (*path, str(name))
        if name not in kind.model_fields:
            raise _unknown(key)
        target[name] = _converted(target.get(name), value, kind.model_fields[name].annotation, key)


def _converted(current: Any, value: Any, annotation: Any, path: tuple[str, ...]) -> Any:
    """The value a key gets: mappings merged into what is there, keys inside lists checked, the rest as given."""
    section = _section(annotation)
    if section and isinstance(value, dict):
        merged = current if isinstance(current, dict) else {}  # it was another alternative, such as text
        _merge(merged, value, section, path)
        return merged
    if section is annotation:
        raise UserError(f"{'.'.join(path)}={_short(value)}: expected a mapping of keys")
    if item := _item_section(annotation):
        for index, entry in enumerate(value if isinstance(value, list) else []):
            if isinstance(entry, dict):
                _merge(dict(entry), entry, item, (*path, str(index)))
        return value
    if isinstance(value, bool) and not _accepts(annotation, bool):
        # pydantic would read true as 1
        raise UserError(f"{'.'.join(path)}={_short(value)}: expected {_expected(annotation)}")
    if isinstance(value, dict) and isinstance(current, dict):
        return {**current, **value} if value else {}  # an empty mapping is the only way to take keys away
    return value


def _expected(annotation: Any) -> str:
    for kind, words in ((int, "an integer"), (float, "a number"), (str, "text"), (list, "a list"), (tuple, "a list")):
        if _accepts(annotation, kind):
            return words
    return "one of " + ", ".join(map(str, typing.get_args(annotation)))


def _override(values: dict[str, Any], text: str) -> None:
    """Apply one ``key=value``, ``key*=factor`` or ``key+=n`` to a recipe's dictionary."""
    match = _OVERRIDE.fullmatch(text)
    if match is None:
        raise UserError(f"cannot read {text!r}: expected key=value, for example anneal.steps=200")
    path = _optimizer_key(tuple(match["key"].split(".")))
    target, name, annotation = _locate(values, path)
    if match["operator"]:
        target[name] = _scaled(target[name], match["operator"], match["value"], match["key"])
    else:
        target[name] = _converted(
            target.get(name) if isinstance(target, dict) else target[name],
            _parsed(match["value"], annotation, match["key"]),
            annotation,
            path,
        )


def _optimizer_key(path: tuple[str, ...]) -> tuple[str, ...]:
    """``anneal.lr`` is short for ``anneal.optim.lr``; so for every stage."""
    stage = _section(Recipe.model_fields[path[0]].annotation) if path[0] in Recipe.model_fields else None
    if len(path) == 2 and path[1] in _SHORT and stage is not None and issubclass(stage, Stage):
        return path[0], "optim", path[1]
    return path


def _locate(values: dict[str, Any], path: tuple[str, ...]) -> tuple[Any, Any, Any]:
    """(container, key or index in it, annotation of what is there) for a dotted key."""
    container, annotation = values, Recipe
    for depth, part in enumerate(path):
        if section := _section(annotation):
            if part not in section.model_fields:
                raise _unknown(path)
            name, inner = part, section.model_fields[part].annotation
        elif typing.get_origin(annotation) in (list, tuple):
            name, inner = _index(path, depth, len(container)), typing.get_args(annotation)[0]
        elif _accepts(annotation, dict):
            name, inner = part, Any
        else:
            raise _unknown(path)
        if depth == len(path) - 1:
            return container, name, inner
        below = container.get(name) if isinstance(container, dict) else container[name]
        if below is None or (isinstance(below, str) and _section(inner)):
            container[name] = {}  # options below a key that was null, or the name of something
        container, annotation = container[name], inner
        if isinstance(container, tuple):
            raise UserError(
                f"{'.'.join(path)}: give the whole list, as {'.'.join(path[: depth + 1])}={_short(container)}"
            )
        if annotation is Any and not isinstance(container, dict):
            raise UserError(f"{'.'.join(path)}: {'.'.join(path[: depth + 1])} is {_short(container)}, not a mapping")
    raise _unknown(path)


def _index(path: tuple[str, ...], depth: int, length: int) -> int:
    if not path[depth].isdigit():
        raise _unknown(path)
    if int(path[depth]) >= length:
        raise UserError(f"{'.'.join(path)}: {'.'.join(path[:depth])} has {length} entries, counted from 0")
    return int(path[depth])


def _parsed(text: str, annotation: Any, key: str) -> Any:
    """An override's text as a YAML value; what is meant as text stays text (run_dir=2026, a Jinja template)."""
    textual = _accepts(annotation, str) and annotation is not Any
    try:
        value = yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        if textual:
            return text
        raise UserError(f"{key}={text}: not a valid YAML value: {' '.join(str(error).split())}") from error
    structured = isinstance(value, dict) and _section(annotation)
    return value if value is None or isinstance(value, str) or structured or not textual else text


def _scaled(current: Any, operator: str, text: str, key: str) -> float | int:
    """``current`` times or plus the number in ``text``; an integer stays one where the result is whole."""
    number = yaml.load(text, _Loader)
    for what, value in (("its value", current), ("the operand", number)):
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise UserError(f"{key}{operator}={text}: {what} is {_short(value)}, not a number")
    result = current * number if operator == "*" else current + number
    whole = round(result)
    return whole if isinstance(current, int) and abs(result - whole) < 1e-9 * max(1.0, abs(result)) else result


def _meant(errors: list[Any], kind: type[Section], values: Any) -> Iterator[dict[str, Any]]:
    """pydantic's errors at their keys. Where a key takes text or a section, pydantic tells what is wrong with the value
    as either, with the alternative's name in the key: a mapping is meant as a section, all else as text."""
    for error in errors:
        annotation, value, key = kind, values, []
        for part in error["loc"]:
            section = _section(annotation)
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
        return str(_unknown(tuple(str(part) for part in error["loc"])))
    if error["type"] == "missing":
        return f"{key} is required"
    return f"{key}={_short(error['input'])}: {error['msg'].replace('Input should be', 'expected', 1)}"


def _short(value: Any) -> str:
    text = json.dumps(value, default=str, ensure_ascii=False)
    return text if len(text) <= 80 else text[:77] + "..."


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
