"""One YAML file as bounded, plain data, with the line of every key. Knows nothing of what the keys mean.

Refused: files over a bound, deep nesting, aliases that unfold without end, keys given twice, numbers without end, and tags, which build
objects or fail in ways of their own.
"""

from __future__ import annotations

import re
from collections.abc import Hashable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, TypeAlias

import yaml

from app.errors import ModelRejected

MAX_BYTES: Final = 1 << 20
MAX_DEPTH: Final = 16
MAX_NODES: Final = 50_000
MAX_NUMBER: Final = 64
"""Characters of a number. Python reads hexadecimal and sexagesimal ones (1:30:00) of any length, and cannot print what comes of it."""
_TEXT: Final = "tag:yaml.org,2002:str"
_NUMBERS: Final = frozenset({"tag:yaml.org,2002:int", "tag:yaml.org,2002:float"})

KeyPath: TypeAlias = tuple[str | int, ...]

_Loader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


class _BoundedLoader(_Loader):  # type: ignore[misc]
    """The safe loader that reads 1e-3 as the number it is (YAML 1.1 wants a dot) and leaves dates as text."""


_BoundedLoader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:timestamp"]
    for first, resolvers in _Loader.yaml_implicit_resolvers.items()
}
_BoundedLoader.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(r"[-+]?[0-9]+[eE][-+]?[0-9]+$"), list("-+0123456789"))


@dataclass(frozen=True)
class Document:
    """`data` is the whole mapping; `lines` tells where (from 1) each key or list item stands."""

    path: Path
    data: dict[str, Any]
    lines: dict[KeyPath, int] = field(default_factory=dict)

    def where(self, key: KeyPath) -> str:
        """file:line of `key`, or of the nearest key above it that stands in the file."""
        while key and key not in self.lines:
            key = key[:-1]
        return f"{self.path}:{self.lines.get(key, 1)}"


def parse(text: str, path: Path) -> Document:
    """Read `text` as one mapping; `path` is for messages only. Raises ModelRejected with file, line, rule and remedy."""
    if len(text) > MAX_BYTES:
        raise ModelRejected(f"{path}: {len(text)} characters; at most {MAX_BYTES} are read")
    try:
        _check_events(text, path)
        loader = _BoundedLoader(text)
        try:
            root = loader.get_single_node()
            if root is None:
                return Document(path, {})
            _check_nodes(root, path)
            data = loader.construct_document(root)
        finally:
            loader.dispose()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = mark.line + 1 if mark else 1
        raise ModelRejected(f"{path}:{line}: not valid YAML: {error.problem or error.context}{_tab_hint(text, line)}") from None
    except (yaml.YAMLError, ValueError) as error:
        raise ModelRejected(f"{path}: not valid YAML: {str(error).splitlines()[0]}") from None
    if not isinstance(data, dict):
        raise ModelRejected(f"{path}:1: holds {_article(data)}; a mapping of keys to values is expected, such as 'task: classification'")
    return Document(path, data, dict(_lines(root, ())))


def _check_events(text: str, path: Path) -> None:
    """Bound nesting and size before anything recursive runs."""
    depth = documents = 0
    for count, event in enumerate(yaml.parse(text, Loader=_BoundedLoader)):
        if isinstance(event, yaml.CollectionStartEvent):
            depth += 1
        elif isinstance(event, yaml.CollectionEndEvent):
            depth -= 1
        elif isinstance(event, yaml.DocumentStartEvent):
            documents += 1
        line = event.start_mark.line + 1 if event.start_mark else 1
        tag = getattr(event, "tag", None)
        if tag not in (None, _TEXT):
            raise ModelRejected(f"{path}:{line}: the tag {tag[:80]!r} is not taken; write the value as it is, without a tag")
        if depth > MAX_DEPTH:
            raise ModelRejected(f"{path}:{line}: nested deeper than {MAX_DEPTH} levels")
        if count > 2 * MAX_NODES:
            raise ModelRejected(f"{path}:{line}: more than {MAX_NODES} values; put long lists into a file of their own")
        if documents > 1:
            raise ModelRejected(f"{path}:{line}: a second document begins ('---'); one is expected")


def _check_nodes(root: Any, path: Path) -> None:
    """Bound what aliases unfold to, and refuse keys that are given twice or are no text."""
    left = MAX_NODES
    stack: list[tuple[Any, int]] = [(root, 0)]
    while stack:
        node, depth = stack.pop()
        left -= 1
        line = node.start_mark.line + 1
        if left < 0 or depth > MAX_DEPTH:
            raise ModelRejected(
                f"{path}:{line}: aliases unfold to more than {MAX_NODES} values or {MAX_DEPTH} levels; write the values out"
            )
        if isinstance(node, yaml.SequenceNode):
            stack.extend((item, depth + 1) for item in node.value)
        elif node.tag in _NUMBERS and len(node.value) > MAX_NUMBER:
            raise ModelRejected(
                f"{path}:{line}: a number of {len(node.value)} characters; at most {MAX_NUMBER} are read (text goes in quotes)"
            )
        elif isinstance(node, yaml.MappingNode):
            _check_keys(node, path)
            stack.extend((value, depth + 1) for _, value in node.value)


def _check_keys(node: Any, path: Path) -> None:
    seen: dict[Hashable, int] = {}
    for key, _ in node.value:
        line = key.start_mark.line + 1
        if not isinstance(key, yaml.ScalarNode):
            raise ModelRejected(f"{path}:{line}: a key must be plain text, not a list or mapping")
        if key.value in seen:
            raise ModelRejected(f"{path}:{line}: key {key.value!r} is given twice (first in line {seen[key.value]}); keep one")
        seen[key.value] = line
        if key.tag != "tag:yaml.org,2002:merge":
            key.tag = _TEXT


def _lines(node: Any, at: KeyPath) -> Iterator[tuple[KeyPath, int]]:
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            yield (*at, key.value), key.start_mark.line + 1
            yield from _lines(value, (*at, key.value))
    elif isinstance(node, yaml.SequenceNode):
        for index, value in enumerate(node.value):
            yield (*at, index), value.start_mark.line + 1
            yield from _lines(value, (*at, index))


def _tab_hint(text: str, line: int) -> str:
    lines = text.splitlines()
    begin = lines[line - 1] if line <= len(lines) else ""
    return "; indent with blanks, not with tabs" if "\t" in begin[: len(begin) - len(begin.lstrip())] else ""


def _article(value: object) -> str:
    return {list: "a list", str: "only text", int: "only a number", float: "only a number", bool: "only true or false"}.get(
        type(value), f"a {type(value).__name__}"
    )
