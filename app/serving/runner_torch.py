"""A PyTorch module as a runner's model: an operator's factory and a .safetensors state dict, loaded strictly but for tied weights.

It is handed the torch module and never imports it; it knows nothing of sockets or batches.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from collections.abc import Sequence
from typing import Any

from app.domain import BYTES
from app.errors import InvalidRequest, ModelRejected
from app.serving.runner_loop import Named
from app.serving.runner_tensors import Array


class TorchModel:
    """A module from an operator's factory and a .safetensors state dict. Inputs are passed by position, in the signature's order."""

    def __init__(self, spec: dict[str, Any], torch: Any) -> None:
        self._torch = torch
        torch.set_num_threads(max(1, spec["settings"]["intra_op_threads"]))
        signature = spec["signature"]
        self._inputs: list[tuple[str, str]] = [(i["name"], i["datatype"]) for i in signature["inputs"]]
        self._outputs: list[tuple[str, str]] = [(o["name"], o["datatype"]) for o in signature["outputs"]]
        module = _made(spec["factory"])
        _load_weights(module, spec["path"])
        self._module = module.eval()

    def run(self, outputs: Sequence[str] | None, feeds: dict[str, Array]) -> list[Named]:
        torch = self._torch
        tensors = [self._tensor(feeds[name], datatype) for name, datatype in self._inputs if name in feeds]
        with torch.inference_mode():
            result = self._module(*tensors)
        named = self._named(result)
        wanted = None if outputs is None else set(outputs)
        return [(n, t, self._back(named[n])) for n, t in self._outputs if wanted is None or n in wanted]

    def trim(self) -> None:
        """Nothing: torch frees as it goes on the CPU."""

    def _tensor(self, array: Array, datatype: str) -> Any:
        if datatype == BYTES:
            raise InvalidRequest("PyTorch models take no BYTES inputs")
        tensor = self._torch.from_numpy(array)
        return tensor.view(self._torch.bfloat16) if datatype == "BF16" else tensor

    def _named(self, result: Any) -> dict[str, Any]:
        if isinstance(result, dict):
            return result
        values = result if isinstance(result, tuple | list) else (result,)
        if len(values) < len(self._outputs):
            raise TypeError(f"the module returned {len(values)} outputs, its signature names {len(self._outputs)}")
        return dict(zip((name for name, _ in self._outputs), values, strict=False))

    def _back(self, tensor: Any) -> Array:
        tensor = tensor.detach().contiguous()
        if tensor.dtype == self._torch.bfloat16:
            tensor = tensor.view(self._torch.uint16)
        array: Array = tensor.numpy()
        return array


def _made(factory: str) -> Any:
    """Call 'file.py:function', loaded by path: it need not be importable, and nothing beside it is."""
    path, _, function = factory.rpartition(":")
    spec = importlib.util.spec_from_file_location("hone_factory", path)
    if spec is None or spec.loader is None or not os.path.isfile(path):
        raise ModelRejected(f"factory {factory!r} names no Python file; write it as FILE.py:FUNCTION")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    try:
        spec.loader.exec_module(module)
        return getattr(module, function)()
    except Exception as error:  # an operator's code: anything may come out of it
        raise ModelRejected(f"factory {os.path.basename(path)}:{function} failed: {type(error).__name__}: {error}") from error


def _load_weights(module: Any, path: str) -> None:
    """Load strictly, but let tied weights share one name (safetensors keeps one of two names of the same memory).

    Raises ModelRejected listing the names that are missing and not tied, and those the module does not know.
    """
    load_file = importlib.import_module("safetensors.torch").load_file
    own = module.state_dict(keep_vars=True)
    try:
        result = module.load_state_dict(load_file(path), strict=False)
    except Exception as error:  # torch and safetensors raise many kinds, all of them about this file
        raise ModelRejected(f"{os.path.basename(path)}: {error}") from error
    missing = set(result.missing_keys)
    given = {_place(tensor) for name, tensor in own.items() if name not in missing}
    lacking = sorted(name for name in missing if _place(own[name]) not in given)
    if lacking or result.unexpected_keys:
        parts = [f"misses {', '.join(lacking)}"] if lacking else []
        parts += [f"has {', '.join(sorted(result.unexpected_keys))}, unknown to the module"] if result.unexpected_keys else []
        raise ModelRejected(
            f"{os.path.basename(path)} does not fit its factory: it {' and it '.join(parts)}; save it with safetensors' save_model"
        )


def _place(tensor: Any) -> tuple[int, tuple[int, ...], tuple[int, ...]]:
    return tensor.data_ptr(), tuple(tensor.shape), tuple(tensor.stride())
