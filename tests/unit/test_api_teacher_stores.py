"""Teacher stores over the API: the list, and deletion with its refusals."""

from __future__ import annotations

import os
from datetime import UTC, datetime

from fastapi.testclient import TestClient

from cliprd_core.store_dir import add_usage, lock_shared
from service.settings import Settings
from tests.teacher_store_helpers import make_key, make_store


def test_without_stores_the_list_is_empty(client: TestClient, settings: Settings) -> None:
    response = client.get("/teacher-stores")
    assert (response.status_code, response.json()) == (200, {"teacher_stores": []})
    assert not settings.teacher_store_root.exists()


def test_a_store_is_described(client: TestClient, settings: Settings) -> None:
    root = settings.teacher_store_root
    older, newer = make_store(root), make_store(root, seed=1)
    add_usage(root / newer, hits=30, misses=6, filled=(12, 6))
    first, second = client.get("/teacher-stores").json()["teacher_stores"]
    assert (first["key"], second["key"]) == (newer, older)
    assert (first["teacher"], first["data"]) == ("ViT-B-16", "shards/{00..07}.tar")
    assert (first["hits"], first["misses"], first["num_images"], first["num_texts"]) == (30, 6, 12, 6)
    assert first["filled"] == 0.5
    assert second["filled"] == 0
    assert first["in_use"] is False
    assert first["num_bytes"] >= 3 * 12 * (2 * 8 + 4)
    assert first["depends_on"] == make_key(seed=1).model_dump(mode="json")
    for name in ("created_at", "last_used_at"):
        assert abs((datetime.now(UTC) - datetime.fromisoformat(first[name])).total_seconds()) < 60


def test_a_store_whose_description_is_damaged_is_listed_and_deleted(client: TestClient, settings: Settings) -> None:
    key = make_store(settings.teacher_store_root)
    (settings.teacher_store_root / key / "meta.json").write_text("{")
    (store,) = client.get("/teacher-stores").json()["teacher_stores"]
    assert (store["key"], store["teacher"], store["depends_on"], store["filled"]) == (key, None, None, None)
    assert client.delete(f"/teacher-stores/{key}").status_code == 204


def test_deletion(client: TestClient, settings: Settings) -> None:
    key = make_store(settings.teacher_store_root)
    response = client.delete(f"/teacher-stores/{key}")
    assert (response.status_code, response.content) == (204, b"")
    assert list(settings.teacher_store_root.iterdir()) == []
    problem = client.delete(f"/teacher-stores/{key}")
    assert problem.status_code == 404
    assert problem.headers["content-type"] == "application/problem+json"
    assert problem.json()["detail"] == f"there is no teacher store '{key}'"


def test_what_is_no_key_deletes_nothing(client: TestClient, settings: Settings) -> None:
    make_store(settings.teacher_store_root)
    for key in ("..", "%2e%2e", "..%2fartifacts", "A" * 32, "meta.json"):
        assert client.delete(f"/teacher-stores/{key}").status_code in (404, 405)
    assert len(list(settings.teacher_store_root.iterdir())) == 1


def test_a_store_in_use_is_listed_as_such_and_not_deleted(client: TestClient, settings: Settings) -> None:
    key = make_store(settings.teacher_store_root)
    lock = lock_shared(settings.teacher_store_root / key)
    assert lock is not None
    assert client.get("/teacher-stores").json()["teacher_stores"][0]["in_use"] is True
    problem = client.delete(f"/teacher-stores/{key}")
    assert problem.status_code == 409
    assert problem.json()["type"] == "urn:cliprd:problem:teacher-store-in-use"
    assert "cancel them" in problem.json()["detail"]
    os.close(lock)
    assert client.delete(f"/teacher-stores/{key}").status_code == 204
