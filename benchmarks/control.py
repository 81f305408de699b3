"""The control: the FastAPI and ONNX Runtime app that an engineer writes in an hour, well. One process, uvicorn with uvloop and httptools.

python -m benchmarks.control MODEL PORT. Two forms, each on its routes: the model in the thread pool, so that the event loop goes on
answering, and (`/inline`) on the event loop itself, which is quicker for small models and stops everything else for large ones. ONNX
Runtime's default threads. No batching, no checks, no metrics, no isolation: what it lacks is what a server adds.
"""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
import onnxruntime as ort
import uvicorn
from fastapi import FastAPI, Request, Response
from pydantic import BaseModel
from starlette.concurrency import run_in_threadpool


class Question(BaseModel):
    inputs: list[Any]


def make_app(path: str) -> FastAPI:
    session = ort.InferenceSession(path, providers=["CPUExecutionProvider"])
    name, shape = session.get_inputs()[0].name, session.get_inputs()[0].shape[1:]
    app = FastAPI()

    @app.get("/ready")
    def ready() -> dict[str, bool]:
        return {"ready": True}

    @app.post("/binary")
    async def binary(request: Request) -> Response:
        rows = np.frombuffer(await request.body(), np.float32).reshape(-1, *shape)
        outputs = await run_in_threadpool(session.run, None, {name: rows})
        return Response(outputs[0].tobytes(), media_type="application/octet-stream")

    @app.post("/json")
    def readable(question: Question) -> dict[str, Any]:
        rows = np.asarray(question.inputs, np.float32)
        return {"outputs": session.run(None, {name: rows})[0].tolist()}

    @app.post("/inline/binary")
    async def inline_binary(request: Request) -> Response:
        rows = np.frombuffer(await request.body(), np.float32).reshape(-1, *shape)
        return Response(session.run(None, {name: rows})[0].tobytes(), media_type="application/octet-stream")

    @app.post("/inline/json")
    async def inline_readable(question: Question) -> dict[str, Any]:
        return {"outputs": session.run(None, {name: np.asarray(question.inputs, np.float32)})[0].tolist()}

    return app


if __name__ == "__main__":
    uvicorn.run(make_app(sys.argv[1]), port=int(sys.argv[2]), loop="uvloop", http="httptools", access_log=False, log_level="warning")
