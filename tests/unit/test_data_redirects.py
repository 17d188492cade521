"""Servers that redirect: shards come from where a job may read, whatever a server says. All servers are real ones on this machine."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from cliprd_core.data import remote
from cliprd_core.data.errors import CorruptSampleError, InvalidDataError
from cliprd_core.data.http_client import ClientFactory
from cliprd_core.data.sources import PairSource, open_sources
from cliprd_core.locations import REMOTE_HOSTS_VARIABLE, ForbiddenLocationError, Locations
from cliprd_core.spec import WebDatasetSource
from tests.data_files import pair_members, write_tar
from tests.http_server import FileServer, serve


@pytest.fixture
def target(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FileServer]:
    """Holds `0.tar`; it listens on 127.0.0.1, which `localhost` resolves to as well."""
    monkeypatch.setattr(remote, "PAUSES_SECONDS", (0.0, 0.0, 0.0))
    write_tar(tmp_path / "target/0.tar", pair_members(range(4)))
    with serve(tmp_path / "target") as server:
        yield server


@pytest.fixture
def server(tmp_path: Path, target: FileServer) -> Iterator[FileServer]:
    """Redirects `/0.tar` to the target."""
    with serve(tmp_path / "server") as server:
        server.redirects["/0.tar"] = f"{target.url}/0.tar"
        yield server


def host_of(server: FileServer) -> str:
    return urlsplit(server.url).netloc


def renamed(server: FileServer, name: str) -> str:
    """The server's URL under another name of this machine."""
    return server.url.replace("127.0.0.1", name)


def opened(server: FileServer, cache: Path, name: str = "0.tar") -> PairSource:
    return open_sources([WebDatasetSource(type="webdataset", shards=f"{server.url}/{name}")], cache)


def test_a_redirect_to_what_is_listed_is_followed(
    server: FileServer, target: FileServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(REMOTE_HOSTS_VARIABLE, f"{host_of(server)},{host_of(target)}")
    assert opened(server, tmp_path / "cache").read(3).caption == "caption 3"


def test_a_redirect_on_the_same_server_is_followed(server: FileServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_tar(server.folder / "moved.tar", pair_members(range(4)))
    server.redirects["/old.tar"] = "/moved.tar"
    for hosts in (host_of(server), "*"):
        monkeypatch.setenv(REMOTE_HOSTS_VARIABLE, hosts)
        assert len(opened(server, tmp_path / hosts, "old.tar")) == 4


@pytest.mark.parametrize("name", ["127.0.0.1", "localhost", "127.0.0.2", "[::ffff:127.0.0.1]", "user:secret@localhost"])
@pytest.mark.parametrize("hosts", ["{server}", "*", None])
def test_a_redirect_to_a_private_address_that_is_not_listed_is_refused_before_it_is_asked(
    *, server: FileServer, target: FileServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, hosts: str | None
) -> None:
    if hosts is not None:
        monkeypatch.setenv(REMOTE_HOSTS_VARIABLE, hosts.format(server=host_of(server)))
    server.redirects["/0.tar"] = f"{renamed(target, name)}/0.tar?token=secret"
    with pytest.raises(InvalidDataError, match=r"cannot read shard .*: its server redirects to ") as caught:
        opened(server, tmp_path / "cache")
    message = str(caught.value)
    assert ("none of the remote hosts that jobs may read from" in message) == (hosts == "{server}")
    assert ("no public address" in message) == (hosts != "{server}")
    assert "CLIPRD_REMOTE_HOSTS" in message or "jobs may read from: 127.0.0.1" in message
    assert "secret" not in message
    assert not target.num_asked
    assert sum(server.num_asked.values()) <= 2  # it is not tried again


def test_a_listed_host_may_be_private_and_be_redirected_to_where_any_may_be_read_from(
    server: FileServer, target: FileServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(REMOTE_HOSTS_VARIABLE, "*,localhost")
    server.redirects["/0.tar"] = f"{renamed(target, 'localhost')}/0.tar"
    assert len(opened(server, tmp_path / "cache")) == 4


def test_every_step_of_a_chain_is_looked_at(
    server: FileServer, target: FileServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(REMOTE_HOSTS_VARIABLE, host_of(server))
    server.redirects |= {"/first.tar": "/second.tar", "/second.tar": f"{target.url}/0.tar"}
    with pytest.raises(InvalidDataError, match="redirects to"):
        opened(server, tmp_path / "cache", "first.tar")
    assert not target.num_asked


def test_a_server_that_begins_to_redirect_during_the_run_is_not_followed(
    server: FileServer, target: FileServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(REMOTE_HOSTS_VARIABLE, host_of(server))
    write_tar(server.folder / "1.tar", pair_members(range(4)))
    source = opened(server, tmp_path / "cache", "1.tar")
    for copy in (tmp_path / "cache/shards").glob("*.tar"):
        copy.unlink()
    server.redirects["/1.tar"] = f"{target.url}/0.tar"
    with pytest.raises(CorruptSampleError, match="redirects to"):
        source.read(0)
    assert not target.num_asked


@pytest.mark.parametrize(
    ("hosts", "target", "addresses"),
    [
        (None, "https://elsewhere.example/0.tar", ["93.184.215.14", "2606:2800:21f:cb07:6820:80da:af6b:8b2c"]),
        (("*",), "http://elsewhere.example:8080/0.tar", ["93.184.215.14"]),
        (("*",), "http://93.184.215.14/0.tar", []),
        (("*",), "http://elsewhere.example/0.tar", ["64:ff9b::5db8:d70e", "2002:5db8:d70e::1", "::ffff:93.184.215.14"]),
        (("*", "nas"), "http://nas/0.tar", ["10.0.0.7"]),
        (("data.example", "cdn.example:443"), "https://cdn.example/0.tar", ["10.0.0.7"]),
        (("data.example",), "http://DATA.example:8080/0.tar", ["10.0.0.7"]),
    ],
)
def test_redirects_that_are_followed(hosts: tuple[str, ...] | None, target: str, addresses: list[str]) -> None:
    Locations(hosts=hosts).check_redirect("https://data.example", target, addresses)


@pytest.mark.parametrize(
    ("hosts", "target", "addresses"),
    [
        (("data.example",), "https://cdn.example/0.tar", []),
        (("data.example:443",), "http://data.example/0.tar", []),
        (("data.example",), "http://data.example.evil/0.tar", []),
        (("*",), "http://evil.example/", ["93.184.215.14", "169.254.169.254"]),
        (("*",), "http://evil.example/", ["fd00::1"]),
        (("*",), "http://evil.example/", ["fe80::1%2"]),
        (("*",), "http://evil.example/", ["::ffff:10.0.0.1"]),
        (("*",), "http://evil.example/", ["64:ff9b::a9fe:a9fe"]),  # NAT64 of 169.254.169.254
        (("*",), "http://evil.example/", ["64:ff9b:1:a9fe:a9:fe00::"]),  # a network's own NAT64
        (("*",), "http://[64:ff9b:1::808:808]/", []),
        (("*",), "http://[2002:7f00:1::]/", []),  # 6to4 of 127.0.0.1
        (("*",), "http://evil.example/", ["::127.0.0.1"]),
        (("*",), "http://240.0.0.1/", []),
        (("*",), "http://169.254.169.254/latest/meta-data", []),
        (("*",), "http://100.64.0.1/", []),
        (("*",), "http://0.0.0.0/", []),
        (("*",), "http://[::1]:6379/", []),
        (("*",), "http://192.168.1.1/", []),
        (("*",), "http://224.0.0.1/", []),
        (None, "http://10.0.0.1/", []),
    ],
)
def test_redirects_that_are_not(hosts: tuple[str, ...] | None, target: str, addresses: list[str]) -> None:
    with pytest.raises(ForbiddenLocationError, match="its server redirects to"):
        Locations(hosts=hosts).check_redirect("https://data.example", target, addresses)


def test_sessions_are_shared_by_the_shards_of_a_server() -> None:
    first, second = (remote._filesystem(f"http://user@host/{name}.tar")[0] for name in ("0", "1"))
    assert first is second
    assert first.get_client == ClientFactory("http://host", Locations())
