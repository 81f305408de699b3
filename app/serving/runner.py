"""The runner: a process of its own that holds one version's session.

The only serving module that imports onnxruntime; torch comes with a model that needs it (`runner_torch`). It knows nothing of HTTP, queues, or
which requests make up a batch.
Each instance is a thread with its own socket and arena on the one session (`run` releases the GIL), so weights are held once.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import resource
import signal
import socket
import sys
import threading
import time
from collections.abc import Sequence
from typing import Any, Final, NoReturn

import numpy as np
import orjson

from app.domain import BYTES
from app.errors import HoneError, ModelRejected
from app.serving import procfs
from app.serving.runner_loop import MESSAGE_BYTES, Instance, Meter, Model, Named, cleaned, is_memory
from app.serving.runner_tensors import DTYPES, Array
from app.serving.runner_torch import TorchModel
from optimizers.allocator import give_back

_FDS: Final = 4
NICE: Final = 5
"""Below the server: it has little to do and everybody waits for it, also those who only want to hear that the queue is full."""

# ---- ONNX Runtime ---------------------------------------------------------------------------------------------------

_ONNX_TYPES: Final = {
    "tensor(bool)": "BOOL", "tensor(uint8)": "UINT8", "tensor(uint16)": "UINT16", "tensor(uint32)": "UINT32",
    "tensor(uint64)": "UINT64", "tensor(int8)": "INT8", "tensor(int16)": "INT16", "tensor(int32)": "INT32",
    "tensor(int64)": "INT64", "tensor(float16)": "FP16", "tensor(bfloat16)": "BF16", "tensor(float)": "FP32",
    "tensor(double)": "FP64", "tensor(string)": BYTES,
}  # fmt: skip
_BFLOAT16: Final = 16
QUICK_S: Final = 0.1
_LEVELS: Final = {"none": "ORT_DISABLE_ALL", "basic": "ORT_ENABLE_BASIC", "extended": "ORT_ENABLE_EXTENDED", "all": "ORT_ENABLE_ALL"}


class OnnxModel:
    """A session of ONNX Runtime on the CPU. Threads are always explicit: left alone it sizes them to the host, not to the quota."""

    def __init__(self, spec: dict[str, Any]) -> None:
        import onnxruntime as ort

        self._ort = ort
        signature = spec["signature"]
        options = self._options(spec["settings"], signature)
        try:
            self._session = ort.InferenceSession(spec["path"], options, providers=["CPUExecutionProvider"])
        except Exception as error:  # ORT raises a class of its own for each status code, sharing no base but Exception
            raise ModelRejected(f"ONNX Runtime refuses {os.path.basename(spec['path'])}: {cleaned(str(error))}") from error
        known = {output.name: _ONNX_TYPES.get(output.type, output.type) for output in self._session.get_outputs()}
        self._outputs = [output["name"] for output in signature["outputs"]] or list(known)
        for name in self._outputs:
            if name not in known:
                raise ModelRejected(f"output {name!r} is not in the file; it has {', '.join(known)}")
            if known[name] not in DTYPES and known[name] != BYTES:
                raise ModelRejected(f"output {name!r} is a {known[name]}, which the protocol cannot carry; serve its tensors only")
        self._types = known
        self._half = {i.name for i in self._session.get_inputs() if i.type == "tensor(bfloat16)"}
        self._plain = not self._half and "BF16" not in self._types.values()
        self._shrink: Any = None

    def _options(self, settings: dict[str, Any], signature: dict[str, Any]) -> Any:
        options = self._ort.SessionOptions()
        options.intra_op_num_threads = max(1, settings["intra_op_threads"])
        options.inter_op_num_threads = 1
        options.log_severity_level = 4  # what it would log it also raises, and any client can make a model raise
        level = _LEVELS.get(settings["graph_level"])
        if level is None:
            raise ModelRejected(f"graph_level {settings['graph_level']!r} is unknown; it is one of {', '.join(_LEVELS)}")
        options.graph_optimization_level = getattr(self._ort.GraphOptimizationLevel, level)
        spin_us = settings["spin_duration_us"]
        options.add_session_config_entry("session.intra_op.allow_spinning", "1" if spin_us else "0")
        if spin_us:
            options.add_session_config_entry("session.intra_op.spin_duration_us", str(spin_us))
        options.add_session_config_entry("session.use_device_allocator_for_initializers", "1")
        first = 1 if signature["batchable"] else 0
        if any(-1 in spec["shape"][first:] for spec in signature["inputs"]):
            options.enable_mem_pattern = False  # a pattern per shape ever seen would be kept (case 51)
        for key, value in settings["session_options"]:
            options.add_session_config_entry(key, value)
        return options

    def run(self, outputs: Sequence[str] | None, feeds: dict[str, Array]) -> list[Named]:
        names = self._outputs if outputs is None else list(outputs)
        options, self._shrink = self._shrink, None
        if self._plain:
            values = self._session.run(names, feeds, options)
            return [(name, self._types[name], _array(name, value)) for name, value in zip(names, values, strict=True)]
        return self._run_half(names, feeds, options)

    def _run_half(self, names: list[str], feeds: dict[str, Array], options: Any) -> list[Named]:
        """BF16 is no numpy type: it goes in as OrtValue over uint16 and comes out as memory at an address."""
        value_of = self._ort.OrtValue
        given = {
            name: value_of.ortvalue_from_numpy_with_onnx_type(array, _BFLOAT16)
            if name in self._half
            else value_of.ortvalue_from_numpy(array)
            for name, array in feeds.items()
        }
        results = self._session.run_with_ort_values(names, given, options)
        return [(name, self._types[name], _half_array(value)) for name, value in zip(names, results, strict=True)]

    def trim(self) -> None:
        """The next run gives back what the arena does not need: shapes that vary leave it at the size of the largest (case 51)."""
        options = self._ort.RunOptions()
        options.add_run_config_entry("memory.enable_memory_arena_shrinkage", "cpu:0")
        self._shrink = options


def _array(name: str, value: Any) -> Array:
    if not isinstance(value, np.ndarray):
        raise TypeError(f"output {name!r} is a {type(value).__name__}, not a tensor")
    return value


def _half_array(value: Any) -> Array:
    if value.element_type() != _BFLOAT16:
        array: Array = value.numpy()
        return array
    import ctypes

    size = value.tensor_size_in_bytes()
    raw = ctypes.string_at(value.data_ptr(), size) if size else b""
    return np.frombuffer(raw, np.uint16).reshape(value.shape())


# ---- the process ----------------------------------------------------------------------------------------------------


def main(control_fd: int, lifeline_fd: int) -> NoReturn:
    """Serve the control socket until the server closes it. Never returns: the process ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # systemd sends it to all; the server drains first and then ends its runners
    _end_with_server(lifeline_fd)
    control = socket.socket(fileno=control_fd)
    code = 0
    try:
        _report(control, {"hello": os.getpid()})
        _control(control)
    except (BrokenPipeError, ConnectionResetError):
        pass
    except BaseException:  # noqa: BLE001 - the boundary of a process
        sys.excepthook(*sys.exc_info())
        code = 70
    sys.stderr.flush()
    os._exit(code)


def _end_with_server(lifeline_fd: int) -> None:
    """Let the kernel end this process when the server's end of the pipe closes, also in the midst of a long run that holds the GIL.

    The server never writes to it, so SIGIO (default action: terminate) means that the server is gone.
    """
    signal.signal(signal.SIGIO, signal.SIG_DFL)
    fcntl.fcntl(lifeline_fd, fcntl.F_SETOWN, os.getpid())
    fcntl.fcntl(lifeline_fd, fcntl.F_SETFL, fcntl.fcntl(lifeline_fd, fcntl.F_GETFL) | os.O_ASYNC | os.O_NONBLOCK)
    try:
        if os.read(lifeline_fd, 1) == b"":
            os._exit(0)
    except BlockingIOError:
        pass


def _control(control: socket.socket) -> None:
    model: Model | None = None
    row: dict[str, Array] | None = None
    spec: dict[str, Any] = {}
    meter = Meter(own_thread=True)
    lone: list[Model] = []
    lone_meter = Meter(own_thread=False)
    while True:
        message, fds, _, _ = socket.recv_fds(control, MESSAGE_BYTES * 16, _FDS)
        if not message:
            return
        order = orjson.loads(message)
        match order["do"]:
            case "open":
                spec = orjson.loads(os.pread(fds[0], order["size"], 0))
                os.close(fds[0])
                meter = Meter(own_thread=spec["settings"]["intra_op_threads"] <= 1)
                model, row = _opened(control, spec)
            case "instance" if model is not None:
                runs, clock = (lone[0], lone_meter) if order["lone"] else (model, meter)
                instance = Instance(runs, socket.socket(fileno=fds[0]), fds[1], clock)
                thread = threading.Thread(target=_serve, args=(instance, control, order["id"]), daemon=True)
                thread.start()
            case "lone":
                threading.Thread(target=_open_lone, args=(control, spec, lone), daemon=True).start()
            case "trim" if model is not None:
                for each in (model, *lone):
                    each.trim()
                    if order["at_rest"] and row is not None:
                        with contextlib.suppress(MemoryError):
                            _tried(each, row)
                give_back()
            case "stop":
                return


def _serve(instance: Instance, control: socket.socket, number: int) -> None:
    _report(control, {"instance": number, "tid": threading.get_native_id()})
    try:
        instance.serve()
    except (BrokenPipeError, ConnectionResetError):
        pass
    except BaseException:  # noqa: BLE001 - the boundary of a process
        sys.excepthook(*sys.exc_info())
        sys.stderr.flush()
        os._exit(70)


def _report(control: socket.socket, report: dict[str, Any]) -> None:
    control.send(orjson.dumps(report))


def _opened(control: socket.socket, spec: dict[str, Any]) -> tuple[Model | None, dict[str, Array] | None]:
    """Open the session and run it once or twice; report what came of it. Also a made-up row that it takes, and takes little time for."""
    started = time.monotonic()
    try:
        _name_and_bound(spec)
        model: Model = TorchModel(spec) if spec["kind"] == "torch" else OnnxModel(spec)
        load_s = time.monotonic() - started
        give_back()  # parsing and packing leave up to twice the weights behind in the allocator: 138 -> 45 MB for 45 MB of weights
        warm, row = _warm_up(model, spec)
        give_back()
    except MemoryError:
        _report(control, {"failed": "ModelRejected", "text": _too_large(spec)})
        return None, None
    except HoneError as error:
        text = _too_large(spec) if is_memory(str(error)) and spec["memory_limit_bytes"] else str(error)
        _report(control, {"failed": type(error).__name__, "text": text})
        return None, None
    _report(control, {"opened": True, "load_s": load_s, "warm_up": warm})
    return model, row if spec["kind"] != "torch" else None


def _open_lone(control: socket.socket, spec: dict[str, Any], lone: list[Model]) -> None:
    """The second session, for calls that are alone, while the first one serves. Where there is no room for it there is none."""
    try:
        model = OnnxModel({**spec, "settings": {**spec["settings"], "intra_op_threads": spec["settings"]["lone_threads"]}})
        give_back()
        _tried(model, _made_up(spec["signature"], 1, 1, spec["signature"]["batchable"]))
    except (HoneError, MemoryError) as error:
        print(f"{spec['model']}:{spec['version']} has no second session for lone calls: {error}", file=sys.stderr, flush=True)
        return
    lone.append(model)
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):
        _report(control, {"lone": True})


def _name_and_bound(spec: dict[str, Any]) -> None:
    """Name the process for ps, set who dies first and who runs first, and bound its private memory where the spec does.

    RLIMIT_DATA counts what is mapped, not what is touched (thread stacks, allocator slack), hence the margin; the server's sampler
    looks at what is touched.
    """
    with open("/proc/self/comm", "w") as comm:
        comm.write("hone-runner")
    procfs.set_oom_score(os.getpid(), spec["oom_score_adj"])
    os.nice(NICE)
    if limit := spec["memory_limit_bytes"]:
        with open("/proc/self/statm") as statm:
            mapped = int(statm.read().split()[5]) * resource.getpagesize()
        bound = mapped + limit + limit // 4 + (256 << 20)
        resource.setrlimit(resource.RLIMIT_DATA, (bound, bound))


def _too_large(spec: dict[str, Any]) -> str:
    return (
        f"{os.path.basename(spec['path'])} needs more memory than the {spec['memory_limit_bytes'] >> 20} MiB it may take here; "
        "give the server more memory (or limits.memory_mb in model.yaml, where that is the bound), or serve a smaller version"
    )


def _warm_up(model: Model, spec: dict[str, Any]) -> tuple[list[dict[str, Any]], dict[str, Array] | None]:
    """Run once at batch 1 and once at the batch limit, on ones (else zeros). Data that a model cannot take is no reason to refuse it;
    outputs that are not as declared are (ModelRejected).

    Also the single row that it took, where that was quick.
    """
    signature = spec["signature"]
    batches = [1]
    if signature["batchable"] and spec["settings"]["batch_limit"] > 1:
        batches.append(spec["settings"]["batch_limit"])
    done: list[dict[str, Any]] = []
    single: dict[str, Array] | None = None
    for rows in batches:
        for value in (1, 0):
            feeds, began = _made_up(signature, rows, value, signature["batchable"]), time.monotonic()
            error = _tried(model, feeds)
            done.append({"rows": rows, "value": value, "error": error})
            if not error:
                single = feeds if rows == 1 and time.monotonic() - began < QUICK_S else single
                break
    return done, single


def _tried(model: Model, feeds: dict[str, Array]) -> str:
    try:
        model.run(None, feeds)
    except ModelRejected:
        raise
    except Exception as error:  # a model's own complaint about made-up data
        if isinstance(error, MemoryError) or is_memory(str(error)):
            raise MemoryError from error
        return cleaned(str(error))
    return ""


def _made_up(signature: dict[str, Any], rows: int, value: int, batchable: bool) -> dict[str, Array]:
    feeds: dict[str, Array] = {}
    for spec in signature["inputs"]:
        if spec["optional"]:
            continue
        shape = [1 if size < 0 else size for size in spec["shape"]]
        if batchable and shape:
            shape[0] = rows
        if spec["datatype"] == BYTES:
            feeds[spec["name"]] = np.full(shape, "a", object)
        elif spec["datatype"] == "BF16":
            feeds[spec["name"]] = np.full(shape, 0x3F80 * value, np.uint16)
        else:
            feeds[spec["name"]] = np.full(shape, value, DTYPES[spec["datatype"]])
    return feeds
