"""What API keys allow."""

from __future__ import annotations

from enum import StrEnum


class KeyScope(StrEnum):
    """What an API key allows; each includes those before it."""

    READ = "read"
    """Reading jobs, metrics and artifacts."""
    SUBMIT = "submit"
    """Submitting and steering jobs."""
    ADMIN = "admin"
    """Deleting."""
