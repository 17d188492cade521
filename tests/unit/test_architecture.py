"""The import rules that keep the API and the worker's supervisor free of torch, checked in fresh interpreters."""

import json
import subprocess
import sys

import pytest

HEAVY = ("torch", "open_clip", "numpy", "PIL")


def modules_after(statement: str) -> set[str]:
    code = f"{statement}\nimport sys, json; print(json.dumps(sorted({{name.split('.')[0] for name in sys.modules}})))"
    printed = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    return set(json.loads(printed))


@pytest.mark.parametrize(
    ("statement", "absent"),
    [
        (
            "import cliprd_core.spec, cliprd_core.run_dir, cliprd_core.store_dir, cliprd_core.store_removal",
            (*HEAVY, "fastapi", "sqlalchemy", "celery"),
        ),
        ("from service.app import create_app", (*HEAVY, "worker")),
        ("import service.cli, service.client, service.embedded", (*HEAVY, "worker")),
        ("import worker.celery_app, worker.tasks, worker.supervisor, worker.reaper", (*HEAVY, "fastapi")),
        ("import worker.health", (*HEAVY, "pydantic", "celery", "sqlalchemy")),
        ("import cliprd_core.train, cliprd_core.trainer", ("service", "worker", "celery", "fastapi", "sqlalchemy")),
    ],
)
def test_package_stays_light(statement: str, absent: tuple[str, ...]) -> None:
    assert not modules_after(statement) & set(absent)
