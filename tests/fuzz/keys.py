"""What fuzzing expects of requests whose key does not allow them."""

from __future__ import annotations

from service.auth import OPEN_PATHS, needed_scope
from service.store.keys import KeyScope


def expected_refusal(path: str, method: str, scope: KeyScope | None) -> int | None:
    """Status of a request with a key of this scope, `read` or `admin`, or with none; None: it may pass."""
    if path in OPEN_PATHS:
        return None
    if scope is None:
        return 401
    return 403 if scope is KeyScope.READ and needed_scope(method) is not KeyScope.READ else None
