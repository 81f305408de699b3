"""The table of docs/model-yaml.md, made from the schema: `python -m app.catalog.config_docs` renews it in place. Not part of serving."""

from __future__ import annotations

import ast
import inspect
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from pydantic import BaseModel

from app.catalog.config_errors import dotted, sections
from app.catalog.model_config import ModelConfig

BEGIN: Final = "<!-- table: made by python -m app.catalog.config_docs -->\n"
END: Final = "<!-- end of table -->\n"


def keys() -> Iterator[tuple[str, ...]]:
    """Every key that holds a value, as its path."""
    inner = {at for at, _ in sections(ModelConfig)}
    for at, section in sections(ModelConfig):
        yield from ((*at, name) for name in section.model_fields if (*at, name) not in inner)


def keys_in(data: dict[str, Any], at: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """The paths that stand in a parsed model.yaml, sections and values."""
    for name, value in data.items():
        yield (*at, name)
        if isinstance(value, dict):
            yield from keys_in(value, (*at, name))


def example(page: str) -> str:
    """The YAML of the first code block."""
    return page.split("```yaml\n", 1)[1].split("```", 1)[0]


def table() -> str:
    """One row for each key: values, default, meaning."""
    schema = ModelConfig.model_json_schema()
    rows = ["| key | values | default | meaning |", "|---|---|---|---|"]
    wanted = set(keys())
    for at, section in sections(ModelConfig):
        shape = schema if not at else schema["$defs"][section.__name__]
        told = _docstrings(section)
        for name, field in section.model_fields.items():
            if (*at, name) in wanted:
                meaning = " ".join((field.description or told.get(name, "")).split()).replace("|", "/")
                default = _default(field.get_default(call_default_factory=True), field.is_required())
                rows.append(f"| `{dotted((*at, name))}` | {_values(shape['properties'][name])} | {default} | {meaning} |")
    return "\n".join(rows) + "\n"


def renewed(page: str) -> str:
    """`page` with its table as the schema is now."""
    before, rest = page.split(BEGIN)
    return before + BEGIN + table() + END + rest.split(END)[1]


def _docstrings(section: type[BaseModel]) -> dict[str, str]:
    """The strings that follow the fields in the class's source."""
    body = ast.parse(textwrap.dedent(inspect.getsource(section))).body[0]
    assert isinstance(body, ast.ClassDef)
    told = {}
    for field, text in zip(body.body, body.body[1:], strict=False):
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name) and isinstance(text, ast.Expr):
            told[field.target.id] = str(ast.literal_eval(text.value))
    return told


def _values(schema: dict[str, Any]) -> str:
    """The form of a value in words."""
    if "$ref" in schema:
        return "`auto`, `approve`, `observe`" if schema["$ref"].endswith("/Mode") else "keys"
    if "enum" in schema:
        return ", ".join(f"`{value}`" for value in schema["enum"])
    if "anyOf" in schema:
        return " or ".join(dict.fromkeys(_values(one) for one in schema["anyOf"] if one.get("type") != "null"))
    if schema.get("type") == "array":
        most = schema.get("maxItems")
        inner = _values(schema.get("items") or schema.get("prefixItems", [{}])[0])
        return f"list of {most if most and most == schema.get('minItems') else ''} {inner}".replace("  ", " ")
    word = {"integer": "whole number", "number": "number", "string": "text", "boolean": "`true`, `false`"}.get(
        schema.get("type", ""), "value"
    )
    bounds = [f"{sign} {schema[key]}" for key, sign in _BOUNDS.items() if key in schema]
    return f"{word} {', '.join(bounds)}".strip()


_BOUNDS: Final = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}


def _default(value: Any, required: bool) -> str:
    if required:
        return "must be given"
    if value is None or value == "":
        return "—"
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    return f"`{list(value) if isinstance(value, tuple) else f'{value:g}' if isinstance(value, float) and value < 1e6 else value}`"


def main() -> None:
    path = Path(sys.argv[1] if len(sys.argv) > 1 else "docs/model-yaml.md")
    path.write_text(renewed(path.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
