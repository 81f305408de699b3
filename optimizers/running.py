"""Calls to ONNX Runtime with its errors sorted: out of memory, or refused by the model with a short reason."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, Final

import onnxruntime.capi.onnxruntime_pybind11_state as ort_state

from optimizers.session import Feeds, call, runnable
from optimizers.task_child import is_out_of_memory

_NOISE: Final = re.compile(r"\[ONNXRuntimeError\] : \d+ : \w+ : |/onnxruntime_src/\S+:\d+ ")
Run = Callable[[Feeds], list[Any]]
ORT_ERRORS: Final = (
    ort_state.Fail, ort_state.InvalidArgument, ort_state.InvalidGraph, ort_state.InvalidProtobuf, ort_state.NoSuchFile,
    ort_state.NotImplemented, ort_state.RuntimeException, ort_state.EPFail, ort_state.NoModel, RuntimeError, ValueError, IndexError, TypeError,
)  # fmt: skip


class RunRefused(RuntimeError):
    """The model does not take these inputs; the text is the runtime's, shortened."""


def runner(session: Any) -> Run:
    """A function that runs `session`; it raises RunRefused, or MemoryError."""

    def run(feeds: Feeds) -> list[Any]:
        try:
            return call(session, runnable(feeds))
        except ORT_ERRORS as error:
            raise_if_memory(error)
            raise RunRefused(brief(error)) from None

    return run


def raise_if_memory(error: BaseException) -> None:
    if is_out_of_memory(error):
        raise MemoryError(brief(error)) from None


def brief(error: BaseException | None) -> str:
    """The error on one line, without the runtime's source paths and codes."""
    text = " ".join(_NOISE.sub("", str(error)).split())
    return text[:400] + ("…" if len(text) > 400 else "")
