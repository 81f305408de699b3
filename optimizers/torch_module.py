"""A PyTorch module as something to run: an operator's factory and a .safetensors state dict, loaded strictly but for tied weights, called with arrays.

Shared by the runner that serves such a model and the arm that times one, so that both load and call it alike. torch is imported where a module
is opened, never before: who only names one stays without it. Which factories are allowed is the caller's to check.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

Place = tuple[int, tuple[int, ...], tuple[int, ...]]
DATATYPES = {
    "bool": "BOOL", "uint8": "UINT8", "uint16": "UINT16", "uint32": "UINT32", "uint64": "UINT64", "int8": "INT8", "int16": "INT16",
    "int32": "INT32", "int64": "INT64", "float16": "FP16", "bfloat16": "BF16", "float32": "FP32", "float64": "FP64",
}  # fmt: skip
"""torch's names of what a tensor may hold, as the Open Inference Protocol names them."""


class NotLoadable(ValueError):
    """A factory or its weights cannot be used; the text names the file and what is wrong with it."""


class Misdeclared(TypeError):
    """forward() returns something else than its source says; the text names the output, what came and what was declared."""


class TorchMissing(ImportError):
    """torch is not installed here; the text says what to install."""


@dataclass(frozen=True)
class TorchSource:
    """What a .safetensors file lacks to be run: FILE.py:FUNCTION (an absolute path), and what forward() takes and returns.

    `inputs` and `outputs` are (name, datatype of the Open Inference Protocol), in the order of its arguments and results. Their shapes, -1 for
    any size, are needed only by who compares what two versions take.
    """

    factory: str
    inputs: tuple[tuple[str, str], ...]
    outputs: tuple[tuple[str, str], ...]
    input_shapes: tuple[tuple[int, ...], ...] = ()
    output_shapes: tuple[tuple[int, ...], ...] = ()

    @classmethod
    def from_json(cls, data: Mapping[str, Any] | None) -> Self | None:
        """None for None; a shape may follow on name and datatype. Raises TypeError, ValueError or KeyError where it is no such thing."""
        if data is None:
            return None
        inputs, outputs = (tuple((str(name), str(datatype)) for name, datatype, *_ in data[key]) for key in ("inputs", "outputs"))
        shapes = (tuple(tuple(int(size) for size in shape) for _, _, *rest in data[key] for shape in rest) for key in ("inputs", "outputs"))
        return cls(str(data["factory"]), inputs, outputs, *shapes)


class TorchModule:
    """One module in eval mode on `threads` threads, loaded from `source` and the .safetensors file `weights`.

    Raises TorchMissing, or NotLoadable with the reason.
    """

    def __init__(self, source: TorchSource, weights: str, threads: int) -> None:
        self._torch = import_torch()
        self._inputs, self._outputs = source.inputs, source.outputs
        self._torch.set_num_threads(max(1, threads))
        module = make(source.factory)
        load_weights(module, weights)
        self._torch.set_num_threads(max(1, threads))  # a factory may have chosen its own number
        self._module = module.eval()

    def run(self, feeds: Mapping[str, NDArray[Any]], outputs: Sequence[str] | None = None) -> dict[str, NDArray[Any]]:
        """The wanted outputs (None: all) in the order of the source's. BF16 comes out as uint16, which numpy has.

        Raises what the module raises, and Misdeclared.
        """
        tensors = [self._tensor(feeds[name], datatype) for name, datatype in self._inputs if name in feeds]
        with self._torch.inference_mode():
            result = self._module(*tensors)
        named = self._named(result)
        return {name: self._back(name, datatype, named[name]) for name, datatype in self._outputs if outputs is None or name in outputs}

    def _tensor(self, array: NDArray[Any], datatype: str) -> Any:
        tensor = self._torch.from_numpy(array)
        if datatype != "BF16":
            return tensor
        return tensor.view(self._torch.bfloat16) if array.dtype == np.uint16 else tensor.to(self._torch.bfloat16)

    def _named(self, result: Any) -> Mapping[str, Any]:
        if isinstance(result, dict):
            for name, _ in self._outputs:
                if name not in result:
                    raise Misdeclared(f"forward() returns no output {name!r}, only {', '.join(map(repr, result))[:500]}")
            return result
        values = result if isinstance(result, tuple | list) else (result,)
        if len(values) < len(self._outputs):
            raise Misdeclared(f"forward() returns {len(values)} outputs, of which {len(self._outputs)} are declared")
        return dict(zip((name for name, _ in self._outputs), values, strict=False))

    def _back(self, name: str, datatype: str, tensor: Any) -> NDArray[Any]:
        if not isinstance(tensor, self._torch.Tensor):
            raise Misdeclared(f"output {name!r} is a {type(tensor).__name__}, not a tensor")
        kind = str(tensor.dtype).removeprefix("torch.")
        if DATATYPES.get(kind) != datatype:
            raise Misdeclared(f"output {name!r} is {DATATYPES.get(kind, kind)}, but declared as {datatype}")
        tensor = tensor.detach().contiguous()
        if datatype == "BF16":
            tensor = tensor.view(self._torch.uint16)
        array: NDArray[Any] = tensor.numpy()
        return array


def import_torch() -> Any:
    """The torch module. Raises TorchMissing."""
    try:
        return importlib.import_module("torch")
    except ImportError:
        raise TorchMissing("this version is a PyTorch model and torch is not installed: pip install hone-server[optimize]") from None


def make(factory: str) -> Any:
    """Call 'file.py:function', loaded by path: it need not be importable, and nothing beside it is. Raises NotLoadable, or TorchMissing."""
    path, _, function = factory.rpartition(":")
    spec = importlib.util.spec_from_file_location("hone_factory", path) if os.path.isfile(path) else None
    if spec is None or spec.loader is None:
        raise NotLoadable(f"factory {factory!r} names no Python file; write it as FILE.py:FUNCTION")
    file = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = file
    try:
        spec.loader.exec_module(file)
        made = getattr(file, function)()
    except Exception as error:  # an operator's code: anything may come out of it
        raise NotLoadable(f"factory {os.path.basename(path)}:{function} failed: {type(error).__name__}: {error}") from error
    if not isinstance(made, import_torch().nn.Module):
        raise NotLoadable(f"factory {os.path.basename(path)}:{function} made a {type(made).__name__}, not a torch.nn.Module")
    return made


def load_weights(module: Any, path: str) -> None:
    """Load strictly, but let tied weights share one name (safetensors keeps one of two names of the same memory).

    Raises NotLoadable listing the names that are missing and not tied, and those the module does not know.
    """
    load_file = importlib.import_module("safetensors.torch").load_file
    own = module.state_dict(keep_vars=True)
    try:
        result = module.load_state_dict(load_file(path), strict=False)
    except Exception as error:  # torch and safetensors raise many kinds, all of them about this file
        raise NotLoadable(f"{os.path.basename(path)}: {error}") from error
    missing = set(result.missing_keys)
    given = {_place(tensor) for name, tensor in own.items() if name not in missing}
    lacking = sorted(name for name in missing if _place(own[name]) not in given)
    if lacking or result.unexpected_keys:
        parts = [f"misses {', '.join(lacking)}"] if lacking else []
        parts += [f"has {', '.join(sorted(result.unexpected_keys))}, unknown to the module"] if result.unexpected_keys else []
        raise NotLoadable(
            f"{os.path.basename(path)} does not fit its factory: it {' and it '.join(parts)}; save it with safetensors' save_model"
        )


def _place(tensor: Any) -> Place:
    return tensor.data_ptr(), tuple(tensor.shape), tuple(tensor.stride())
