"""Every method there is, from the methods' own declarations: what it needs, gives and takes, and whether it can run here.

A module of this package that registers a function with @method is a family; finding and importing those is the only list there is.
Families are importable without ONNX Runtime and torch, so this is cheap enough for the server.
"""

from __future__ import annotations

import ast
import dataclasses
import difflib
import functools
import importlib
import importlib.util
import inspect
import pkgutil
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from optimizers.base import Config, Outlook, registered

EXTRAS: Final = {"optimize": "torch"}
"""Pip extra to the module whose presence tells that it is installed."""


_resolved: dict[type[Config], dict[str, Any]] = {}


class InvalidStep(ValueError):
    """A step of a recipe names no method, or a field that is unknown or of the wrong type; the text has the nearest right one."""


@dataclass(frozen=True)
class Entry:
    """One method as the planner and the worker see it. `fields`: name to (type, default). `reason` says why it is not available."""

    method: str
    summary: str
    needs: tuple[str, ...]
    gives: tuple[str, ...]
    lossless: bool
    extra: str
    available: bool
    reason: str
    fields: dict[str, tuple[str, Any]]
    search: dict[str, tuple[Any, ...]]
    outlook: Outlook = field(default_factory=Outlook)
    then: tuple[str, ...] = ()
    details: str = ""
    """What its options mean, in words: its own first, then those that it shares with others."""


def catalogue() -> list[Entry]:
    """All methods by name."""
    return [_entry(config) for config in config_types().values()]


def config_types() -> dict[str, type[Config]]:
    """Method name to config type; imports the families on first use."""
    for module in _families():
        importlib.import_module(module)
    return {config.method: config for config in registered()}


def unavailable(config: type[Config] | Config) -> str:
    """Why a method cannot run in this installation, with the remedy; '' where it can."""
    needed = EXTRAS.get(config.extra, "")
    if needed and importlib.util.find_spec(needed) is None:
        return f"{config.method} needs {needed}: pip install 'hone-server[{config.extra}]'"
    return ""


def parse_recipe(steps: Sequence[Mapping[str, Any] | str]) -> tuple[Config, ...]:
    """Configs of a recipe's steps, in order. Raises InvalidStep, naming the step."""
    if not steps:
        raise InvalidStep("a recipe needs at least one step")
    configs: list[Config] = []
    for index, step in enumerate(steps, 1):
        try:
            configs.append(parse_step(step))
        except InvalidStep as error:
            raise InvalidStep(f"step {index}: {error}") from None
    return tuple(configs)


def parse_step(step: Mapping[str, Any] | str) -> Config:
    """The config that `step` describes: a method's name, or {"method": NAME, **fields}. Raises InvalidStep."""
    if isinstance(step, str):
        step = {"method": step}
    if not isinstance(step, Mapping) or not isinstance(step.get("method"), str):
        raise InvalidStep(f"a step is a method's name or an object with 'method', not {step!r}")
    known = config_types()
    name = step["method"]
    if name not in known:
        raise InvalidStep(f"there is no method {name!r}{_nearest(name, known)}; there are {', '.join(known)}")
    config = known[name]
    hints = _field_types(config)
    values: dict[str, Any] = {}
    for key, value in step.items():
        if key == "method":
            continue
        if key not in hints:
            raise InvalidStep(f"{name} has no field {key!r}{_nearest(key, hints)}; it has {', '.join(hints) or 'none'}")
        values[key] = _typed(name, key, value, hints[key])
    try:
        return config(**values)
    except (ValueError, TypeError) as error:
        raise InvalidStep(f"{name}: {error}") from None


@functools.cache
def _families() -> tuple[str, ...]:
    import optimizers

    found = (module for module in pkgutil.walk_packages(optimizers.__path__, "optimizers.") if not module.ispkg)
    return tuple(module.name for module in found if _registers_a_method(module.name))


def _registers_a_method(module: str) -> bool:
    """Whether the source decorates a top-level function with @method(...); the module is not imported for that."""
    file = Path(__file__).parent.joinpath(*module.split(".")[1:]).with_suffix(".py")
    text = file.read_text() if file.exists() else ""
    if "@method(" not in text:
        return False
    return any(
        isinstance(decorator, ast.Call) and isinstance(decorator.func, ast.Name) and decorator.func.id == "method"
        for node in ast.parse(text).body
        if isinstance(node, ast.FunctionDef)
        for decorator in node.decorator_list
    )


def _entry(config: type[Config]) -> Entry:
    reason = unavailable(config)
    hints = _field_types(config)
    defaults = {field.name: _default(field) for field in dataclasses.fields(config)}
    return Entry(
        config.method, config.summary, tuple(sorted(config.needs)), tuple(sorted(config.gives)), config.lossless, config.extra, not reason, reason,
        {name: (_told(hint), defaults[name]) for name, hint in hints.items()}, {name: tuple(values) for name, values in config.search.items()},
        config.outlook, config.then, "\n\n".join(_own_words(config)),
    )  # fmt: skip


def _own_words(config: type[Config]) -> Iterator[str]:
    """Docstrings of a config and of those it derives from; a dataclass without one gets its signature for it, which says nothing."""
    for part in config.__mro__[: config.__mro__.index(Config)]:
        text = vars(part).get("__doc__") or ""
        if text and not text.startswith(f"{part.__name__}("):
            yield inspect.cleandoc(text)


def _default(field: dataclasses.Field[Any]) -> Any:
    return field.default_factory() if field.default_factory is not dataclasses.MISSING else field.default


def _field_types(config: type[Config]) -> dict[str, Any]:
    """Name to type; resolved once, for that takes longer than all else here."""
    found = _resolved.get(config)
    if found is None:
        hints = typing.get_type_hints(config)
        found = _resolved[config] = {field.name: hints[field.name] for field in dataclasses.fields(config)}
    return found


def _typed(method: str, key: str, value: Any, hint: Any) -> Any:
    """`value` as a field of type `hint` has it: JSON's lists become tuples, integers floats; anything else must fit as it is."""
    try:
        return _fit(value, hint)
    except (TypeError, OverflowError):
        raise InvalidStep(f"{method}: {key} must be {_told(hint)}, not {value!r}") from None


def _fit(value: Any, hint: Any) -> Any:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return value
    if origin in {typing.Union, types.UnionType}:
        for option in arguments:
            try:
                return _fit(value, option)
            except TypeError:
                continue
        raise TypeError
    if origin is typing.Literal:
        if value in arguments:
            return value
        raise TypeError
    if origin is tuple and isinstance(value, list | tuple):
        kinds = [arguments[0]] * len(value) if arguments[-1] is Ellipsis else list(arguments)
        if len(kinds) != len(value):
            raise TypeError
        return tuple(_fit(item, kind) for item, kind in zip(value, kinds, strict=True))
    if origin in {dict, Mapping} and isinstance(value, Mapping):
        return {_fit(key, arguments[0]): _fit(item, arguments[1]) for key, item in value.items()}
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if hint is type(None) and value is None:
        return None
    if isinstance(hint, type) and isinstance(value, hint) and not (hint is int and isinstance(value, bool)):
        return value
    if isinstance(hint, type) and issubclass(hint, str) and isinstance(value, str):
        return _member(hint, value)
    raise TypeError


def _member(kind: type[str], value: str) -> Any:
    try:
        return kind(value)
    except ValueError:
        raise TypeError from None


def _told(hint: Any) -> str:
    """A type in the words of JSON."""
    names = {int: "an integer", float: "a number", str: "a string", bool: "true or false", type(None): "null"}
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if hint in names:
        return names[hint]
    if origin in {typing.Union, types.UnionType}:
        return " or ".join(map(_told, arguments))
    if origin is typing.Literal:
        return "one of " + ", ".join(map(repr, arguments))
    if origin is tuple:
        return f"a list (each {_told(arguments[0])})"
    return str(getattr(hint, "__name__", hint))


def _nearest(name: str, known: Mapping[str, Any]) -> str:
    close = difflib.get_close_matches(name, known, 1, 0.5)
    return f"; did you mean {close[0]!r}?" if close else ""
