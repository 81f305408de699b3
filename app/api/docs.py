"""The API's page for people at /docs, and its document at /openapi.json. Everything comes from this server, so it works without internet.

Swagger UI's files lie in the package fastapi-swagger, of whose code nothing is used. Knows no model and no state.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any, Final

import orjson
from starlette.requests import Request
from starlette.responses import FileResponse, Response
from starlette.routing import Route

from app.errors import NotFound, Unsupported

OWN: Final = Path(__file__).parent / "static"
PACKAGE: Final = "fastapi_swagger"
FILES: Final = {
    "swagger-ui-bundle.js": "text/javascript",
    "swagger-ui.css": "text/css",
    "favicon-32x32.png": "image/png",
    "docs.js": "text/javascript",
    "docs.css": "text/css",
}
HEADERS: Final = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self' 'unsafe-inline'; img-src 'self' data: blob:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}


def docs_routes(document: dict[str, Any]) -> list[Route]:
    """GET /openapi.json, /docs and the files of the page."""
    body = orjson.dumps(document)

    async def openapi(request: Request) -> Response:
        return Response(body, media_type="application/json", headers={"Cache-Control": "no-cache"})

    async def page(request: Request) -> Response:
        return FileResponse(OWN / "docs.html", media_type="text/html", headers=HEADERS)

    async def file(request: Request) -> Response:
        name = request.path_params["name"]
        if name not in FILES:
            raise NotFound(f"the page has no file {name!r}")
        return FileResponse(_find(name), media_type=FILES[name], headers=HEADERS)

    return [Route("/openapi.json", openapi), Route("/docs", page), Route("/docs/{name}", file)]


def _find(name: str) -> Path:
    """Ours, or the package's; the package is found without being imported."""
    if (OWN / name).is_file():
        return OWN / name
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise Unsupported("the page's files are missing: pip install fastapi-swagger; the document itself is at /openapi.json")
    return Path(spec.submodule_search_locations[0]) / "resources" / name
