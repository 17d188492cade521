"""Byte ranges of a download (RFC 9110, section 14)."""

from __future__ import annotations

import re
from dataclasses import dataclass

from starlette.exceptions import HTTPException

_ONE_RANGE = re.compile(r"bytes\s*=\s*(\d{0,19})\s*-\s*(\d{0,19})\s*", re.IGNORECASE)


@dataclass(frozen=True)
class ByteRange:
    """Bytes `start` to before `end` of `size`."""

    start: int
    end: int
    size: int

    @property
    def num_bytes(self) -> int:
        return self.end - self.start

    @property
    def content_range(self) -> str:
        return f"bytes {self.start}-{self.end - 1}/{self.size}"


def requested_range(header: str | None, if_range: str | None, *, etag: str, size: int) -> ByteRange | None:
    """The range to send; None: all.

    A header that is malformed, asks for several ranges or is bound (`If-Range`) to other bytes is ignored, as the RFC allows or demands.

    Raises:
        HTTPException: 416, the range begins behind the end.
    """
    found = None if header is None else _ONE_RANGE.fullmatch(header.strip())
    if found is None or (if_range is not None and if_range.strip() != etag) or not (found[1] or found[2]):
        return None
    if not found[1]:  # the last so many
        start, end = max(0, size - int(found[2])), size
    else:
        start, end = int(found[1]), min(size, int(found[2]) + 1) if found[2] else size
        if found[2] and int(found[2]) < start:
            return None
    if start >= size:
        raise HTTPException(
            416, f"the range begins behind the last byte; the file has {size} bytes", headers={"Content-Range": f"bytes */{size}"}
        )
    return ByteRange(start, end, size)
