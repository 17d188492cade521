"""`python -m service`: the API on its own, on the address of its settings."""

from __future__ import annotations

import gc
import os
import sys
import tempfile

import uvicorn
from fastapi import FastAPI

from service.app import create_app
from service.die_with_parent import die_with_parent
from service.exposure import exposure_problem
from service.monitoring import SHARED_FOLDER_VARIABLE
from service.processes import serve
from service.settings import Settings


def main() -> None:
    """Serve until interrupted."""
    settings = Settings()
    if not settings.always_need_key:  # which lets nobody in before there is a key
        _insist_on_a_key(settings)
    if settings.api_processes == 1:
        uvicorn.run(make_app(), host=settings.host, port=settings.port, timeout_graceful_shutdown=settings.shutdown_seconds)
        return
    with tempfile.TemporaryDirectory(prefix="cliprd-api-") as folder:
        os.environ[SHARED_FOLDER_VARIABLE] = folder  # the processes inherit it
        serve(
            "service.__main__:make_child_app",
            host=settings.host,
            port=settings.port,
            processes=settings.api_processes,
            shutdown_seconds=settings.shutdown_seconds,
        )


def make_app() -> FastAPI:
    """The API of a process that serves nothing else."""
    app = create_app()
    gc.freeze()  # what is there now stays, and a busy process would look through it for garbage again and again
    return app


def make_child_app() -> FastAPI:
    """The API of one process of several; it does not outlive the one that started them."""
    die_with_parent(os.getppid())
    return make_app()


def _insist_on_a_key(settings: Settings) -> None:
    problem = exposure_problem(settings.host, database_url=settings.database_url, may_migrate=settings.migrate_on_start)
    if problem is not None:
        sys.exit(
            f"cliprd: CLIPRD_HOST={problem}."
            " Make one with `cliprd keys create --scope admin --name NAME`, leave CLIPRD_HOST at 127.0.0.1,"
            " or set CLIPRD_ALWAYS_NEED_KEY=true to refuse every request until then."
        )


if __name__ == "__main__":
    main()
