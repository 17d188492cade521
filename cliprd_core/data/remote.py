"""Shards behind `s3://` and `http(s)://`, through fsspec (with s3fs and aiohttp: the extra `remote`).

Credentials, region and endpoint of S3 come from where every AWS tool looks (`AWS_…` variables, profiles, instance roles).
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

from cliprd_core.data.errors import InvalidDataError
from cliprd_core.data.shard_cache import ShardCache
from cliprd_core.data.shard_files import RemoteShard, without_secrets
from cliprd_core.data.shard_index import ShardIndex, load_index
from cliprd_core.locations import ForbiddenLocationError, Locations
from cliprd_core.spec import REMOTE_SCHEMES

log = logging.getLogger(__name__)

PAUSES_SECONDS = (0.5, 1.0, 2.0)
"""Before the second, third and last try to reach a server."""

SILENCE_SECONDS = 60.0  # a server that sends nothing for this long counts as gone; a whole shard may take as long as it likes
NUM_PARALLEL = 8  # shards that are looked at, or fetched to be indexed, at a time

Result = TypeVar("Result")


class RemoteError(OSError):
    """A server could not be reached, or did not give what it said it would."""


def is_remote(name: str) -> bool:
    return name.startswith(REMOTE_SCHEMES)


class RemoteShards:
    """Finds and indexes remote shards, whose copies lie in `cache_dir`."""

    def __init__(self, cache_dir: Path, max_bytes: int) -> None:
        self._cache_dir = cache_dir
        self.cache = ShardCache(cache_dir / "shards", max_bytes, download)

    def indexes(self, urls: Iterable[str]) -> Iterator[ShardIndex]:
        """Their indexes, in order. Shards are downloaded where the cache holds no index of them yet.

        Raises:
            InvalidDataError: one cannot be reached or fetched, or is no tar.
        """
        remaining = iter(urls)
        with ThreadPoolExecutor(NUM_PARALLEL, thread_name_prefix="remote-shard") as pool:
            while chunk := list(islice(remaining, NUM_PARALLEL)):
                yield from pool.map(self._index, chunk)

    def _index(self, url: str) -> ShardIndex:
        try:
            num_bytes, version = _with_retries(url, lambda: _describe(url))
            return load_index(RemoteShard(url, num_bytes, version, self.cache.fetch), self._cache_dir)
        except OSError as error:
            raise InvalidDataError(
                f"cannot read shard {without_secrets(url)}: {error}; check `shards`, the network and the credentials"
            ) from error


def download(shard: RemoteShard, target: Path) -> None:
    """Write the shard to `target`, in a few tries, and see that it is whole and still what it was when the run began.

    Raises:
        RemoteError: it is not, or the server fails on.
    """
    log.info("fetching %s (%.1f MB)", shard, shard.num_bytes / 1e6)
    _with_retries(shard.url, lambda: _download_once(shard, target))


def expand_s3_glob(pattern: str) -> list[str]:
    """The objects that match, sorted.

    Raises:
        InvalidDataError: the bucket cannot be listed.
    """

    def list_matches() -> list[str]:
        filesystem, path = _filesystem(pattern)
        return sorted(str(filesystem.unstrip_protocol(match)) for match in filesystem.glob(path))

    try:
        return _with_retries(pattern, list_matches)
    except OSError as error:
        raise InvalidDataError(f"cannot list {pattern}: {error}; check `shards`, the network and the credentials") from error


def _download_once(shard: RemoteShard, target: Path) -> None:
    filesystem, path = _filesystem(shard.url)
    filesystem.get_file(path, str(target), callback=_limit(shard.num_bytes))
    with target.open("rb+") as file:
        num_bytes = file.seek(0, os.SEEK_END)
        os.fsync(file.fileno())
    if num_bytes != shard.num_bytes:
        raise RemoteError(f"it should have {shard.num_bytes:,} bytes, and {num_bytes:,} came")
    if _describe(shard.url) != (shard.num_bytes, shard.version):
        raise RemoteError("it was changed on the server since the run began")


def _limit(num_bytes: int) -> Any:
    """What fsspec tells how far a download is, and which breaks it off as soon as more comes than the server announced: room was made for
    so much, and the rest would go past the limit of the cache.
    """
    from fsspec.callbacks import Callback

    class Limit(Callback):  # type: ignore[misc]  # fsspec has no types
        def set_size(self, size: int | None) -> None:
            super().set_size(size)
            if size is not None and size > num_bytes:
                raise RemoteError(f"it should have {num_bytes:,} bytes, and {size:,} are to come")

        def relative_update(self, inc: int = 1) -> None:
            super().relative_update(inc)
            if self.value > num_bytes:
                raise RemoteError(f"it should have {num_bytes:,} bytes, and more came")

    return Limit()


def _describe(url: str) -> tuple[int, str]:
    """Size in bytes, and version: the ETag, else the date of the last change, else nothing."""
    filesystem, path = _filesystem(url)
    info = filesystem.info(path)
    if info.get("size") is None:
        raise RemoteError("the server does not tell its size (`Content-Length`)")
    version = next((info[name] for name in ("ETag", "LastModified", "Last-Modified") if info.get(name)), "")
    return int(info["size"]), str(version)


def _filesystem(url: str) -> tuple[Any, str]:
    """fsspec's file system for a URL, and the path in it. Made anew in each process: its event loop does not outlive a fork."""
    from fsspec.core import url_to_fs

    options: dict[str, Any] = {"use_listings_cache": False}
    if url.startswith("http"):
        import aiohttp

        from cliprd_core.data.http_client import ClientFactory

        options["client_kwargs"] = {
            "timeout": aiohttp.ClientTimeout(total=None, sock_connect=SILENCE_SECONDS, sock_read=SILENCE_SECONDS),
            "headers": {"Accept-Encoding": "identity"},
            "auto_decompress": False,  # a server that packs all the same would send more than can be counted before it is written
        }
        origin = urlsplit(url)._replace(path="", query="", fragment="").geturl()
        options["get_client"] = ClientFactory(without_secrets(origin), Locations.from_environment())
    filesystem, path = url_to_fs(url, **options)
    return filesystem, path


def _with_retries(url: str, action: Callable[[], Result]) -> Result:
    """
    Raises:
        RemoteError: every try failed.
        InvalidDataError: a library is missing.
    """
    for pause in (*PAUSES_SECONDS, None):
        try:
            return action()
        except ImportError as error:
            raise InvalidDataError(f"reading {without_secrets(url)} needs {error.name}: install cliprd with its extra `remote`") from error
        except Exception as error:  # the servers' libraries raise their own kinds, with no common base
            reason = _reason(error)
            if pause is None or _is_final(error):
                raise RemoteError(reason) from error
            log.warning("%s: %s; trying again", without_secrets(url), reason)
            time.sleep(pause)
    raise AssertionError("unreachable")


def _is_final(error: Exception) -> bool:
    """Whether the server answered, and will answer so again: there is no such object, it is not for us, or it is where we may not go."""
    cause = error.__cause__ or error
    if isinstance(cause, ForbiddenLocationError):
        return True
    status = getattr(cause, "status", None)  # aiohttp's; of HTTP
    if isinstance(status, int):
        return 400 <= status < 500 and status not in (408, 429)
    return isinstance(error, PermissionError) or (isinstance(error, FileNotFoundError) and not isinstance(error.__cause__, OSError))


def _reason(error: Exception) -> str:
    """What is wrong, with what caused it: fsspec calls whatever happens on HTTP a missing file."""
    cause = error.__cause__ or error
    return str(cause) if isinstance(cause, RemoteError | ForbiddenLocationError) else f"{type(cause).__name__}: {cause}"
