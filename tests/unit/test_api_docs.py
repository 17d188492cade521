"""The API's own description: a page that needs no other server, no key, and nothing that a content security policy would have to allow."""

from __future__ import annotations

import re
from pathlib import Path
from urllib.parse import urljoin

import pytest
from fastapi.testclient import TestClient

from service.app import create_app
from service.settings import Settings
from tests.store_helpers import local_client


def links(page: str) -> list[str]:
    found: list[str] = re.findall(r'(?:src|href)="([^"]+)"', page)
    return found


def test_everything_the_page_loads_comes_from_the_service(client: TestClient) -> None:
    page = client.get("/docs")
    assert page.headers["content-type"].startswith("text/html")
    assert {"openapi.json", "docs/swagger-ui.css", "docs/swagger-ui-bundle.js", "docs/start.js"} <= set(links(page.text))
    for link in links(page.text):
        assert "//" not in link
        answer = client.get(urljoin("/docs", link))
        assert answer.status_code == 200
        assert answer.headers["x-content-type-options"] == "nosniff"
    start = client.get("/docs/start.js").text
    assert '"openapi.json"' in start
    assert "validatorUrl: null" in start
    assert "SwaggerUIBundle" in client.get("/docs/swagger-ui-bundle.js").text


def test_who_opens_the_service_in_a_browser_sees_the_page(client: TestClient) -> None:
    assert client.get("/").url.path == "/docs"
    assert local_client(client.app, root_path="/cliprd").get("/cliprd/").url.path == "/cliprd/docs"  # type: ignore[arg-type]


def test_the_page_may_run_its_files_alone_and_may_not_be_framed(client: TestClient) -> None:
    page = client.get("/docs")
    policy = dict(part.strip().split(" ", 1) for part in page.headers["content-security-policy"].split(";"))
    assert policy["default-src"] == policy["frame-ancestors"] == "'none'"
    assert policy["script-src"] == policy["connect-src"] == "'self'"
    assert "<script>" not in page.text
    assert not re.search(r"\son\w+=", page.text)


@pytest.mark.parametrize("path", ["/jobs", "/healthz", "/nothing", "/openapi.json"])
def test_every_other_answer_may_run_nothing(client: TestClient, path: str) -> None:
    headers = client.get(path).headers
    assert headers["content-security-policy"] == "default-src 'none'; frame-ancestors 'none'"
    assert headers["x-content-type-options"] == "nosniff"


@pytest.mark.parametrize("name", ["index.html", "__init__.py", "..%2Findex.html", "swagger-ui.css.map"])
def test_no_other_files_are_served(client: TestClient, name: str) -> None:
    assert client.get(f"/docs/{name}").status_code == 404


def test_nothing_of_the_surroundings_is_in_the_description(settings: Settings, tmp_path: Path) -> None:
    secret = settings.model_copy(update={"broker_url": "redis://:hunter2@127.0.0.1:1/0"})
    with local_client(create_app(secret)) as client:
        text = client.get("/openapi.json").text + client.get("/docs").text
    assert str(tmp_path) not in text
    assert "hunter2" not in text


def test_behind_a_proxy_requests_go_through_it(settings: Settings) -> None:
    app = create_app(settings)
    assert "servers" not in local_client(app).get("/openapi.json").json()
    mounted = local_client(app, root_path="/cliprd")
    assert mounted.get("/cliprd/openapi.json").json()["servers"] == [{"url": "/cliprd"}]
    assert mounted.get("/cliprd/docs").status_code == 200
