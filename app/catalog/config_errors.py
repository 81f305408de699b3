"""What pydantic found wrong in a model.yaml, told to the person who wrote it: where, which value, which rule, what to do.

Knows the form of the schema, not what any key means.
"""

from __future__ import annotations

import difflib
import types
from collections.abc import Collection, Iterator
from typing import Annotated, Any, Final, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from app.catalog.yaml_file import Document, KeyPath

MOST_SHOWN: Final = 5

_EXPECTED: Final = {
    "string_type": "text", "int_type": "a whole number", "float_type": "a number", "bool_type": "true or false", "tuple_type": "a list",
    "list_type": "a list", "dict_type": "keys with values", "model_type": "keys with values", "model_attributes_type": "keys with values",
    "finite_number": "a finite number", "int_from_float": "a whole number", "int_parsing": "a whole number", "float_parsing": "a number",
}  # fmt: skip


def explain(error: ValidationError, document: Document, schema: type[BaseModel]) -> str:
    """All problems of one file, one a line, each as FILE:LINE: KEY: what, rule, remedy."""
    problems = list(
        dict.fromkeys(_problem(found, document, schema) for found in _without_union_noise(error.errors(include_url=False), schema))
    )
    more = len(problems) - MOST_SHOWN
    return "\n".join(problems[:MOST_SHOWN] + ([f"and {more} more"] if more > 0 else []))


def unknown_value(document: Document, key: KeyPath, value: str, known: Collection[str]) -> str:
    """A value that is none of the known names."""
    return f"{document.where(key)}: {dotted(key)} = {value!r} is not known{_nearest(value, known)}; known: {', '.join(sorted(known))}"


def dotted(key: KeyPath) -> str:
    """objective.p95_ms, postprocess.labels[3]."""
    text = ""
    for part in key:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else str(part)
    return text


def sections(schema: type[BaseModel], at: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], type[BaseModel]]]:
    """Every section of `schema` with its path, the top one first."""
    yield at, schema
    for name, field in schema.model_fields.items():
        for inner in _models_in(field.annotation):
            yield from sections(inner, (*at, name))


def _problem(found: ErrorDetails, document: Document, schema: type[BaseModel]) -> str:
    key = _key(found["loc"], schema)
    where, name, value, kind = document.where(key), dotted(key), found["input"], found["type"]
    if kind == "extra_forbidden":
        return f"{where}: {name} is not a key of model.yaml{_advice(key, schema)}"
    if kind == "missing":
        return f"{where}: {name} is missing; {dotted(key[:-1]) or 'model.yaml'} needs it"
    if kind == "literal_error" or kind == "enum":
        choices = str(found["ctx"]["expected"]).replace("'", "").replace(" or ", ", ").split(", ")
        return f"{where}: {name} = {_shown(value)} must be {' or '.join(choices)}{_nearest(str(value), choices)}"
    if kind in _EXPECTED:
        return f"{where}: {name} = {_shown(value)} must be {_EXPECTED[kind]}, not {_kind(value)}{_remedy(kind, value)}"
    text = found["msg"].removeprefix("Value error, ")
    if kind == "value_error":
        return f"{where}: {name or 'model.yaml'}: {text}" if isinstance(value, dict) else f"{where}: {name} = {_shown(value)}: {text}"
    return f"{where}: {name} = {_shown(value)} is refused: {text[:1].lower()}{text[1:].replace('Input should', 'it should')}".replace(
        "input should", "it must"
    )


def _without_union_noise(errors: list[ErrorDetails], schema: type[BaseModel]) -> list[ErrorDetails]:
    """Of a union's branches that all failed, keep one complaint on the key: that of the branch whose type the value has, if any."""
    kept: dict[KeyPath, ErrorDetails] = {}
    for found in errors:
        key = _key(found["loc"], schema)
        if key not in kept or (kept[key]["type"] in _EXPECTED and found["type"] not in _EXPECTED):
            kept[key] = found
    return list(kept.values())


def _key(loc: tuple[int | str, ...], schema: type[BaseModel]) -> KeyPath:
    """`loc` without the names of union branches, which pydantic puts between the keys."""
    key: list[int | str] = []
    current: type[BaseModel] | None = schema
    for position, part in enumerate(loc):
        if isinstance(part, int):
            key.append(part)
            continue
        field = current.model_fields.get(part) if current is not None else None
        if current is None or (field is None and position != len(loc) - 1):
            continue
        key.append(part)
        current = next(iter(_models_in(field.annotation)), None) if field is not None else None
    return tuple(key)


def _advice(key: KeyPath, schema: type[BaseModel]) -> str:
    """The nearest valid key here, or the section where a key of that name belongs."""
    name, path = str(key[-1]), tuple(str(part) for part in key[:-1])
    all_sections = dict(sections(schema))
    here = list(all_sections[path].model_fields) if path in all_sections else []
    elsewhere = [".".join((*at, name)) for at, section in all_sections.items() if at != path and name in section.model_fields]
    near = difflib.get_close_matches(name.lower().replace("-", "_"), here, 1, 0.75)
    if near:
        return f"; did you mean {near[0]!r}?"
    if elsewhere:
        return f"; it belongs to {' or '.join(elsewhere)}"
    far = difflib.get_close_matches(name.lower().replace("-", "_"), here, 1, 0.5)
    hint = f"; did you mean {far[0]!r}?" if far else ""
    return f"{hint}{'' if hint else ';'} valid here: {', '.join(here)}"


def _nearest(value: str, known: Collection[str]) -> str:
    near = difflib.get_close_matches(value.lower(), list(known), 1)
    return f"; did you mean {near[0]!r}?" if near and near[0] != value else ""


def _remedy(kind: str, value: object) -> str:
    if kind == "string_type":
        return "; put it in quotes"
    if isinstance(value, str) and kind in {"int_type", "float_type"}:
        return "; write it without quotes and without a unit"
    if value is None:
        return "; give a value, or leave the key out"
    return ""


def _shown(value: object) -> str:
    text = {True: "true", False: "false"}[value] if isinstance(value, bool) else "nothing" if value is None else repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _kind(value: object) -> str:
    if value is None:
        return "empty"
    names = {bool: "true or false", int: "a whole number", float: "a number", str: "text", list: "a list", dict: "keys with values"}
    return names.get(type(value), type(value).__name__)


def _models_in(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    elif get_origin(annotation) in {Annotated, Union, types.UnionType}:
        for part in get_args(annotation):
            yield from _models_in(part)
