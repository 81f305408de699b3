"""A PyTorch module as a runner's model: what `optimizers.torch_module` loads and calls, in the runner's terms and with the service's errors.

It knows nothing of sockets or batches, and brings in torch only when a version needs it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from app.domain import BYTES
from app.errors import InvalidRequest, ModelRejected, Unsupported
from app.serving.runner_loop import Named
from app.serving.runner_tensors import Array
from optimizers.torch_module import Misdeclared, NotLoadable, TorchMissing, TorchModule, TorchSource


class TorchModel:
    """A module from an operator's factory and a .safetensors state dict. Inputs are passed by position, in the signature's order.

    Raises ModelRejected with what is wrong with either (`run` too, where outputs are not as declared), or Unsupported where torch is not installed.
    """

    def __init__(self, spec: dict[str, Any]) -> None:
        inputs, outputs = (tuple((one["name"], one["datatype"]) for one in spec["signature"][key]) for key in ("inputs", "outputs"))
        self._texts = {name for name, datatype in inputs if datatype == BYTES}
        self._outputs = [
            (name, datatype, one["shape"]) for (name, datatype), one in zip(outputs, spec["signature"]["outputs"], strict=True)
        ]
        try:
            self._module = TorchModule(TorchSource(spec["factory"], inputs, outputs), spec["path"], spec["settings"]["intra_op_threads"])
        except TorchMissing as error:
            raise Unsupported(str(error)) from None
        except NotLoadable as error:
            raise ModelRejected(str(error)) from error

    def run(self, outputs: Sequence[str] | None, feeds: dict[str, Array]) -> list[Named]:
        if not self._texts.isdisjoint(feeds):
            raise InvalidRequest("PyTorch models take no BYTES inputs")
        try:
            named = self._module.run(feeds, outputs)
            return [(name, datatype, _shaped(name, shape, named[name])) for name, datatype, shape in self._outputs if name in named]
        except Misdeclared as error:
            raise ModelRejected(f"{error}; correct source.outputs in model.yaml, or the factory") from error

    def trim(self) -> None:
        """Nothing: torch frees as it goes on the CPU."""


def _shaped(name: str, declared: Sequence[int], array: Array) -> Array:
    """Raises Misdeclared where the shape is not what was declared (-1: any size)."""
    if len(declared) != array.ndim or any(wanted not in (-1, size) for wanted, size in zip(declared, array.shape, strict=True)):
        raise Misdeclared(f"output {name!r} has shape {list(array.shape)}, but is declared as {list(declared)}")
    return array
