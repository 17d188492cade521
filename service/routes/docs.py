"""The API's description: `/openapi.json`, and `/docs`, which shows it: without a key or another server; a package brings Swagger UI."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path as FilePath
from typing import Any

from fastapi import APIRouter, HTTPException, Request
from fastapi.responses import FileResponse, JSONResponse, RedirectResponse, Response

from service.strict_query import StrictRoute

PAGE_HEADERS = {
    # Swagger UI makes `style` attributes and `data:` images of its own.
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self' 'unsafe-inline'; img-src 'self' data:;"
    " connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "Referrer-Policy": "no-referrer",
}
ASSET_HEADERS = {"Cache-Control": "public, max-age=3600"}

SWAGGER_UI, PAGE = ("fastapi_swagger", "resources"), ("service", "docs_page")
ASSETS = {"swagger-ui-bundle.js": SWAGGER_UI, "swagger-ui.css": SWAGGER_UI, "favicon-32x32.png": SWAGGER_UI, "start.js": PAGE}
"""Files of the page, and the packages and folders that they lie in."""

DOCS_PATHS = frozenset({"/", "/openapi.json", "/docs", *(f"/docs/{name}" for name in ASSETS)})

router = APIRouter(include_in_schema=False, route_class=StrictRoute)


@router.get("/openapi.json")
def openapi(request: Request) -> JSONResponse:
    """The OpenAPI of all routes, with where a proxy has mounted them."""
    root_path = str(request.scope.get("root_path", "")).rstrip("/")
    schema: dict[str, Any] = request.app.openapi()
    return JSONResponse({**schema, "servers": [{"url": root_path}]} if root_path else schema)


@router.get("/")
def start() -> Response:
    """Who opens the service in a browser wants to see what it is."""
    return RedirectResponse("docs")


@router.get("/docs")
def docs() -> Response:
    """The page for people. Its links are relative, so that it works wherever a proxy has mounted it."""
    return FileResponse(_file(PAGE, "index.html"), headers=PAGE_HEADERS)


@router.get("/docs/{name}")
def docs_asset(name: str) -> Response:
    """A file that the page loads."""
    if name not in ASSETS:
        raise HTTPException(404)
    return FileResponse(_file(ASSETS[name], name), headers=ASSET_HEADERS)


def _file(folder: tuple[str, str], name: str) -> FilePath:
    return FilePath(str(files(folder[0]).joinpath(folder[1], name)))
