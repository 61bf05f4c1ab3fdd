"""Changes of a recipe's dictionary: partial recipes merged into it, and ``key=value`` words.

Keys are checked against the typed recipe as they are written, so that a misspelt one is refused with the nearest known
one; the values are validated later, once, when all changes are made.
"""

from __future__ import annotations

import difflib
import json
import re
import types
import typing
from typing import Any

import yaml

from nemo_rmt.config import Recipe, Section, Stage
from nemo_rmt.errors import UserError

_OVERRIDE = re.compile(r"(?P<key>[A-Za-z_]\w*(?:\.\w+)*)(?P<operator>[*+]?)=(?P<value>.*)", re.DOTALL)

_SHORT = {"lr", "min_lr", "schedule", "warmup_steps", "weight_decay", "clip_grad"}
"""Keys of a stage's optimizer that an override may name without ``optim``: none that another section of it has too."""


class YamlLoader(yaml.SafeLoader):
    """SafeLoader that reads 3e-4 as a number: YAML 1.1 asks for a dot and would make it text."""


YamlLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


def merge(
    target: dict[str, Any], changes: dict[str, Any], kind: type[Section] = Recipe, path: tuple[str, ...] = ()
) -> None:
    """Write ``changes`` of a recipe, or of its section of type ``kind`` at ``path``, into ``target``.

    Raises UserError for unknown keys, and for what is no mapping where a section belongs.
    """
    for name, value in changes.items():
        key = (*path, str(name))
        if name not in kind.model_fields:
            raise unknown_key(key)
        target[name] = _converted(target.get(name), value, kind.model_fields[name].annotation, key)


def _converted(current: Any, value: Any, annotation: Any, path: tuple[str, ...]) -> Any:
    """The value a key gets: mappings merged into what is there, keys inside lists checked, the rest as given."""
    section = section_of(annotation)
    if section and isinstance(value, dict):
        merged = current if isinstance(current, dict) else {}  # it was another alternative, such as text
        merge(merged, value, section, path)
        return merged
    if section is annotation:
        raise UserError(f"{'.'.join(path)}={shortened(value)}: expected a mapping of keys")
    if item := _item_section(annotation):
        for index, entry in enumerate(value if isinstance(value, list) else []):
            if isinstance(entry, dict):
                merge(dict(entry), entry, item, (*path, str(index)))
        return value
    if isinstance(value, bool) and not _accepts(annotation, bool):
        # pydantic would read true as 1
        raise UserError(f"{'.'.join(path)}={shortened(value)}: expected {_expected(annotation)}")
    if isinstance(value, dict) and isinstance(current, dict):
        return {**current, **value} if value else {}  # an empty mapping is the only way to take keys away
    return value


def _expected(annotation: Any) -> str:
    for kind, words in ((int, "an integer"), (float, "a number"), (str, "text"), (list, "a list"), (tuple, "a list")):
        if _accepts(annotation, kind):
            return words
    return "one of " + ", ".join(map(str, typing.get_args(annotation)))


def override(values: dict[str, Any], text: str) -> None:
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
    stage = section_of(Recipe.model_fields[path[0]].annotation) if path[0] in Recipe.model_fields else None
    if len(path) == 2 and path[1] in _SHORT and stage is not None and issubclass(stage, Stage):
        return path[0], "optim", path[1]
    return path


def _locate(values: dict[str, Any], path: tuple[str, ...]) -> tuple[Any, Any, Any]:
    """(container, key or index in it, annotation of what is there) for a dotted key."""
    container, annotation = values, Recipe
    for depth, part in enumerate(path):
        if section := section_of(annotation):
            if part not in section.model_fields:
                raise unknown_key(path)
            name, inner = part, section.model_fields[part].annotation
        elif typing.get_origin(annotation) in (list, tuple):
            name, inner = _index(path, depth, len(container)), typing.get_args(annotation)[0]
        elif _accepts(annotation, dict):
            name, inner = part, Any
        else:
            raise unknown_key(path)
        if depth == len(path) - 1:
            return container, name, inner
        below = container.get(name) if isinstance(container, dict) else container[name]
        if below is None or (isinstance(below, str) and section_of(inner)):
            container[name] = {}  # options below a key that was null, or the name of something
        container, annotation = container[name], inner
        if isinstance(container, tuple):
            raise UserError(
                f"{'.'.join(path)}: give the whole list, as {'.'.join(path[: depth + 1])}={shortened(container)}"
            )
        if annotation is Any and not isinstance(container, dict):
            raise UserError(f"{'.'.join(path)}: {'.'.join(path[: depth + 1])} is {shortened(container)}, not a mapping")
    raise unknown_key(path)


def _index(path: tuple[str, ...], depth: int, length: int) -> int:
    if not path[depth].isdigit():
        raise unknown_key(path)
    if int(path[depth]) >= length:
        raise UserError(f"{'.'.join(path)}: {'.'.join(path[:depth])} has {length} entries, counted from 0")
    return int(path[depth])


def _parsed(text: str, annotation: Any, key: str) -> Any:
    """An override's text as a YAML value; what is meant as text stays text (run_dir=2026, a Jinja template)."""
    textual = _accepts(annotation, str) and annotation is not Any
    try:
        value = yaml.load(text, YamlLoader)
    except yaml.YAMLError as error:
        if textual:
            return text
        raise UserError(f"{key}={text}: not a valid YAML value: {' '.join(str(error).split())}") from error
    structured = isinstance(value, dict) and section_of(annotation)
    return value if value is None or isinstance(value, str) or structured or not textual else text


def _scaled(current: Any, operator: str, text: str, key: str) -> float | int:
    """``current`` times or plus the number in ``text``; an integer stays one where the result is whole."""
    number = yaml.load(text, YamlLoader)
    for what, value in (("its value", current), ("the operand", number)):
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise UserError(f"{key}{operator}={text}: {what} is {shortened(value)}, not a number")
    result = current * number if operator == "*" else current + number
    whole = round(result)
    return whole if isinstance(current, int) and abs(result - whole) < 1e-9 * max(1.0, abs(result)) else result


def known_keys(kind: type[Section] = Recipe, prefix: str = "") -> list[str]:
    """Every dotted key of the recipe; list items appear with index 0."""
    keys = []
    for name, field in kind.model_fields.items():
        keys.append(prefix + name)
        if section := section_of(field.annotation):
            keys += known_keys(section, f"{prefix}{name}.")
        elif item := _item_section(field.annotation):
            keys += known_keys(item, f"{prefix}{name}.0.")
    return keys


def section_of(annotation: Any) -> type[Section] | None:
    """The section that a key holds, always or as one of several alternatives."""
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        return next(filter(None, map(section_of, typing.get_args(annotation))), None)
    return annotation if isinstance(annotation, type) and issubclass(annotation, Section) else None


def _item_section(annotation: Any) -> type[Section] | None:
    return section_of(typing.get_args(annotation)[0]) if typing.get_origin(annotation) is list else None


def _accepts(annotation: Any, kind: type) -> bool:
    """Whether a key of this annotation takes values of ``kind``, alone or among others."""
    origin = typing.get_origin(annotation)
    if origin in (typing.Union, types.UnionType, typing.Annotated):
        return any(_accepts(each, kind) for each in typing.get_args(annotation))
    return annotation is kind or origin is kind or annotation is Any


def unknown_key(path: tuple[str, ...]) -> UserError:
    """The error of a key that is none, with the nearest one that is."""
    key = ".".join(path)
    shape = ".".join("0" if part.isdigit() else part for part in path)
    known = known_keys()
    near = difflib.get_close_matches(shape, known, n=1, cutoff=0.7)
    near = near or [each for each in known if each.endswith("." + shape)]
    near = near or difflib.get_close_matches(shape, known, n=1, cutoff=0.3)
    return UserError(f"unknown key {key!r}" + (f": did you mean {near[0]!r}?" if near else ""))


def shortened(value: Any) -> str:
    """A value as JSON, for an error message."""
    text = json.dumps(value, default=str, ensure_ascii=False)
    return text if len(text) <= 80 else text[:77] + "..."
