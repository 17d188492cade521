"""Where a job may read from: folders and remote hosts that the operator allows, since a spec comes over the network.

The API looks when a spec is submitted, and the trainer looks again at each file it opens: between the two a link may have been changed,
and a table's rows and a glob's matches are known only then. Links count as what they lead to. The standard library only.
"""

from __future__ import annotations

import ipaddress
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

DATA_ROOTS_VARIABLE = "CLIPRD_DATA_ROOTS"
"""Environment variable: folders that jobs may read, separated by `:`. Unset, in the trainer: any."""

REMOTE_HOSTS_VARIABLE = "CLIPRD_REMOTE_HOSTS"
"""Environment variable: what jobs may read from elsewhere: `HOST`, `HOST:PORT` or `s3://BUCKET`, separated by commas; `*`: anything."""

HOME_VARIABLE = "CLIPRD_HOME"
"""Environment variable: folder of the service's own files, of which jobs read nothing, also where it lies in a folder they may read."""

ANY_HOST = "*"

_NAT64 = ipaddress.IPv6Network("64:ff9b::/96")
"""RFC 6052: the last 32 bits are the IPv4 address that is reached."""

_LOCAL_NAT64 = ipaddress.IPv6Network("64:ff9b:1::/48")
"""RFC 8215: a network's own translators, which reach what their owner likes, at places in the address that the owner chose."""

_DEFAULT_PORTS = {"http": 80, "https": 443}


class ForbiddenLocationError(ValueError):
    """A job may not read from there; the message says from where it may."""


class ServiceFileError(ForbiddenLocationError):
    """It belongs to the service itself: its broker's password, its database, other jobs' files."""


@dataclass(frozen=True)
class Locations:
    """Where a job may read from."""

    roots: tuple[str, ...] | None = None
    """Folders, as real paths. None: any."""
    hosts: tuple[str, ...] | None = None
    """Lower-case entries as in REMOTE_HOSTS_VARIABLE. None: any."""
    home: str | None = None
    """The service's own folder, as a real path: inside a root it is none of it, but a root inside it is one. None: there is none."""

    @classmethod
    def of(cls, roots: Iterable[str | Path], hosts: Iterable[str], *, home: str | Path | None = None) -> Locations:
        """From what an operator writes; relative folders start in the current directory."""
        real_home = None if home is None else os.path.realpath(home)
        return cls(tuple(os.path.realpath(root) for root in roots), tuple(host.lower() for host in hosts), real_home)

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] = os.environ) -> Locations:
        """What the worker tells its trainer; anywhere, where nobody says anything."""
        roots, hosts = environment.get(DATA_ROOTS_VARIABLE), environment.get(REMOTE_HOSTS_VARIABLE)
        home = environment.get(HOME_VARIABLE)
        return cls(
            None if roots is None else tuple(os.path.realpath(root) for root in split_roots(roots)),
            None if hosts is None else split_hosts(hosts),
            os.path.realpath(home) if home else None,
        )

    def environment(self) -> dict[str, str]:
        """The same for a child process."""
        return {
            **({} if self.roots is None else {DATA_ROOTS_VARIABLE: os.pathsep.join(self.roots)}),
            **({} if self.hosts is None else {REMOTE_HOSTS_VARIABLE: ",".join(self.hosts)}),
            **({} if self.home is None else {HOME_VARIABLE: self.home}),
        }

    def check_path(self, path: str | Path) -> None:
        """
        Raises:
            ForbiddenLocationError: what it leads to is under no root.
            ServiceFileError: it is the service's own.
        """
        if self.roots is not None:
            self._check_real(self.roots, str(path), os.path.realpath(path))

    def check_paths(self, paths: Iterable[str]) -> None:
        """As `check_path` for each in turn; folders that many of them share are followed once.

        Raises:
            ForbiddenLocationError: what one of them leads to is under no root.
            ServiceFileError: one of them is the service's own.
        """
        if self.roots is None:
            return
        real_folders: dict[str, str] = {}
        for path in paths:
            folder, name = os.path.split(path)
            if folder not in real_folders:
                real_folders[folder] = os.path.realpath(folder)
            real = os.path.join(real_folders[folder], name)  # noqa: PTH118  many
            if name in ("", os.curdir, os.pardir) or os.path.islink(real):  # noqa: PTH114
                real = os.path.realpath(path)
            self._check_real(self.roots, path, real)

    def _check_real(self, roots: tuple[str, ...], path: str, real: str) -> None:
        leads = "" if real == os.path.normpath(path) else f" (it leads to {real})"
        found = [root for root in roots if _holds(root, real)]
        if not found:
            raise ForbiddenLocationError(f"{path}{leads} is outside the folders that jobs may read: {', '.join(roots) or 'none'}")
        if self.home is not None and _holds(self.home, real) and not any(_holds(self.home, root) and root != self.home for root in found):
            raise ServiceFileError(f"{path}{leads} is in {self.home}, where the service keeps its own files, which no job may read as data")

    def check_url(self, url: str) -> None:
        """
        Raises:
            ForbiddenLocationError: its host or bucket is not allowed.
            ValueError: it is no URL.
        """
        if self.hosts is None or ANY_HOST in self.hosts or self._lists(url):
            return
        allowed = ", ".join(self.hosts) or "none"
        raise ForbiddenLocationError(f"{_names(url)[0]} is none of the remote hosts that jobs may read from: {allowed}")

    def check_redirect(self, origin: str, target: str, addresses: Sequence[str] = ()) -> None:
        """Whether a request for the allowed URL `origin` may go to `target`: always to the same host and port, and to what is listed; where
        any host may be read from, to others at public addresses only. The server's word alone leads nobody into a private network.

        Args:
            addresses: what the target's name resolves to, once that is known.

        Raises:
            ForbiddenLocationError: it may not.
        """
        if _names(target) == _names(origin) or self._lists(target):
            return
        try:
            self.check_url(target)
        except ForbiddenLocationError as error:
            raise ForbiddenLocationError(f"its server redirects to another one, and {error}") from None
        name = _names(target)[0]
        for address in filter(_is_address, [name, *addresses]):
            if not _is_public(address):
                what = name if address == name else f"{name} ({address})"
                raise ForbiddenLocationError(
                    f"its server redirects to {what}, which is no public address; list {name} in {REMOTE_HOSTS_VARIABLE} to allow it"
                )

    def _lists(self, url: str) -> bool:
        return self.hosts is not None and not set(_names(url)).isdisjoint(self.hosts)


def _holds(folder: str, path: str) -> bool:
    """Whether a path is the folder or below it; both are real paths."""
    return path == folder or path.startswith(folder.rstrip("/") + "/")


def _names(url: str) -> tuple[str, ...]:
    """What REMOTE_HOSTS_VARIABLE may call the server of a URL."""
    parts = urlsplit(url)
    if parts.scheme == "s3":
        return (f"s3://{parts.netloc.lower()}",)
    host = (parts.hostname or "").lower()
    return host, f"{host}:{parts.port or _DEFAULT_PORTS.get(parts.scheme)}"


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def _is_public(address: str) -> bool:
    """Whether it is an address of the internet, and so is the IPv4 address that it may stand for on the way through a translator."""
    found = ipaddress.ip_address(address)
    if isinstance(found, ipaddress.IPv6Address):
        if found in _LOCAL_NAT64:
            return False
        found = _ipv4_within(found) or found
    return found.is_global and not found.is_multicast and not found.is_reserved


def _ipv4_within(address: ipaddress.IPv6Address) -> ipaddress.IPv4Address | None:
    if address in _NAT64:
        return ipaddress.IPv4Address(int(address) & 0xFFFF_FFFF)
    return address.ipv4_mapped or address.sixtofour


def split_roots(text: str) -> tuple[str, ...]:
    """The entries of DATA_ROOTS_VARIABLE."""
    return tuple(part.strip() for part in text.split(os.pathsep) if part.strip())


def split_hosts(text: str) -> tuple[str, ...]:
    """The entries of REMOTE_HOSTS_VARIABLE."""
    return tuple(part.strip().lower() for part in text.split(",") if part.strip())
