"""`python -m service`: the API on its own, on the address of its settings."""

from __future__ import annotations

import uvicorn

from service.app import create_app
from service.settings import Settings


def main() -> None:
    """Serve until interrupted."""
    settings = Settings()
    uvicorn.run(create_app(settings), host=settings.host, port=settings.port, timeout_graceful_shutdown=settings.shutdown_seconds)


if __name__ == "__main__":
    main()
