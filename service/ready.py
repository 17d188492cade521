"""Is the API of this machine ready? `python -m service.ready`, for the health checks of containers.

Exit code 0 if `/readyz` says so, else 1 and a line that says what is wrong. With the standard library alone, because it runs often.
"""

from __future__ import annotations

import http.client
import json
import os
import sys

TIMEOUT_SECONDS = 8.0
"""`/readyz` takes 3 seconds at most to find that something does not answer; a busy process takes longer to say so."""


def complaint(port: int) -> str | None:
    """What keeps the API on this port of the loopback interface from working; None: nothing."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=TIMEOUT_SECONDS)
    try:
        connection.request("GET", "/readyz")
        answer = connection.getresponse()
        body = answer.read()
    except (OSError, http.client.HTTPException) as error:
        return f"the API does not answer on port {port}: {error}"
    finally:
        connection.close()
    if answer.status == http.client.OK:
        return None
    try:
        return "; ".join(f"{one['field']}: {one['problem']}" for one in json.loads(body)["errors"])
    except (ValueError, KeyError, TypeError):
        return f"the API answers with status {answer.status}"


def main() -> int:
    wrong = complaint(int(os.environ.get("CLIPRD_PORT", "8000")))
    print("ready" if wrong is None else wrong)
    return 0 if wrong is None else 1


if __name__ == "__main__":
    sys.exit(main())
