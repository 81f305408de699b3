"""How a module differs from what its factory makes: sizes of layers that lost channels or heads, layers replaced by cheaper ones.

The difference is kept as JSON inside the weights file (safetensors metadata), so that file and factory together are the whole model and
steps compose. It is data, never code: sizes are set, and layers are replaced by the few kinds that REPLACED_BY names.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from typing import Any, Final

from torch import nn

from optimizers.base import NotApplicable
from optimizers.torch_layers import REPLACED_BY, StandIn

KEY: Final = "hone.structure"
"""Name of the metadata entry of a .safetensors file."""
Size = int | tuple[int, ...]


@dataclass(frozen=True)
class Structure:
    """`sizes`: module to its changed integer attributes. `shapes`: parameter or buffer to its changed shape. `replaced`: module to kind and sizes."""

    sizes: dict[str, dict[str, Any]] = field(default_factory=dict)
    shapes: dict[str, list[int]] = field(default_factory=dict)
    replaced: dict[str, dict[str, Any]] = field(default_factory=dict)

    def to_json(self) -> str:
        return json.dumps(asdict(self), sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> Structure:
        return cls(**json.loads(text)) if text else cls()


def structure_of(module: nn.Module, fresh: nn.Module) -> Structure:
    """What must be done to `fresh`, which the factory made, to give it the form of `module`; `fresh` is changed on the way."""
    replaced = {name: layer.described() for name, layer in module.named_modules() if isinstance(layer, StandIn)}
    for name, how in replaced.items():
        _replace(fresh, name, how)
    own, theirs = dict(module.named_modules()), dict(fresh.named_modules())
    if own.keys() != theirs.keys():
        raise NotApplicable(f"the module has other layers than its factory makes: {', '.join(sorted(own.keys() ^ theirs.keys())[:5])}")
    sizes = {name: changed for name, layer in own.items() if (changed := _changed(_sizes(layer), _sizes(theirs[name])))}
    before, after = fresh.state_dict(keep_vars=True), module.state_dict(keep_vars=True)
    shapes = {name: list(value.shape) for name, value in after.items() if name not in before or value.shape != before[name].shape}
    if tied := [name for name in shapes if name in before and _is_tied(before, name)]:
        raise NotApplicable(f"{tied[0]} shares its memory with another weight, so its size cannot change")
    return Structure(sizes, shapes, replaced)


def apply(structure: Structure, fresh: nn.Module) -> nn.Module:
    """`fresh` in the form of `structure`; weights whose shape changes have no values yet. Raises NotApplicable where they do not fit."""
    for name, how in structure.replaced.items():
        _replace(fresh, name, how)
    modules = dict(fresh.named_modules())
    for name, values in structure.sizes.items():
        for attribute, value in values.items():
            if name not in modules or attribute not in _sizes(modules[name]):
                raise NotApplicable(f"the weights file changes {name}.{attribute}, which the module of this factory does not have")
            setattr(modules[name], attribute, tuple(value) if isinstance(value, list) else value)
    for name, shape in structure.shapes.items():
        owner, _, leaf = name.rpartition(".")
        old = getattr(modules.get(owner), leaf, None)
        if old is None:
            raise NotApplicable(f"the weights file changes the shape of {name}, which the module of this factory does not have")
        empty = old.data.new_zeros(shape)
        setattr(modules[owner], leaf, nn.Parameter(empty, requires_grad=old.requires_grad) if isinstance(old, nn.Parameter) else empty)
    return fresh


def replace_layer(module: nn.Module, name: str, layer: nn.Module) -> None:
    """Put `layer` in the place called `name`."""
    owner, _, leaf = name.rpartition(".")
    setattr(module.get_submodule(owner), leaf, layer)


def _replace(module: nn.Module, name: str, how: dict[str, Any]) -> None:
    kind = REPLACED_BY.get(str(how.get("kind")))
    if kind is None:
        raise NotApplicable(f"the weights file replaces {name} by a {how.get('kind')!r}; known are {', '.join(REPLACED_BY)}")
    replace_layer(module, name, kind.empty(**{key: value for key, value in how.items() if key != "kind"}))


def _sizes(module: nn.Module) -> dict[str, Size]:
    """Public attributes that are whole numbers, or tuples of them."""
    return {
        name: value
        for name, value in vars(module).items()
        if not name.startswith("_") and (_whole(value) or (isinstance(value, tuple) and value and all(map(_whole, value))))
    }


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _changed(now: dict[str, Size], before: dict[str, Size]) -> dict[str, Any]:
    return {name: value for name, value in now.items() if before.get(name) != value}


def _is_tied(values: dict[str, Any], name: str) -> bool:
    place = values[name].data_ptr()
    return bool(place) and sum(other.data_ptr() == place and other.shape == values[name].shape for other in values.values()) > 1
