"""A PostgreSQL that has gone without a word is noticed: by what the kernel was asked to watch for, since no silence can be made here."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest
from sqlalchemy.engine import make_url

from service.store.session import make_engine
from tests.chaos.proxy import Proxy


@pytest.mark.parametrize(("query", "user_timeout"), [({}, 25_000), ({"tcp_user_timeout": "7000"}, 7_000)])
def test_connections_are_watched_and_the_url_may_say_how(postgres_url: str, query: dict[str, str], user_timeout: int) -> None:
    url = make_url(postgres_url)
    folder = url.query["host"]
    assert isinstance(folder, str)
    with Proxy(next(Path(folder).glob(".s.PGSQL.*[0-9]"))) as proxy:
        over_tcp = url.set(host="127.0.0.1", port=proxy.port, query=query)
        engine = make_engine(over_tcp.render_as_string(hide_password=False))
        with engine.connect() as connection:
            driver = connection.connection.driver_connection
            assert driver is not None
            with socket.socket(fileno=os.dup(driver.fileno())) as opened:
                options = (socket.TCP_KEEPIDLE, socket.TCP_KEEPINTVL, socket.TCP_KEEPCNT, socket.TCP_USER_TIMEOUT)
                assert opened.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1
                assert [opened.getsockopt(socket.IPPROTO_TCP, option) for option in options] == [10, 5, 3, user_timeout]
        engine.dispose()
