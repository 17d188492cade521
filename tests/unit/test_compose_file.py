"""What can be known of the compose stack without an engine; `make compose-test` starts it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

REPOSITORY = Path(__file__).parents[2]
TEXT = (REPOSITORY / "docker-compose.yml").read_text()
SERVICES: dict[str, dict[str, Any]] = yaml.safe_load(TEXT)["services"]


def default(value: str) -> str:
    """Of `${VARIABLE:-default}`; anything else is itself."""
    found = re.fullmatch(r"\$\{\w+:-(.*)\}", value)
    return found[1] if found else value


@pytest.mark.parametrize("name", SERVICES)
def test_every_service_is_hardened_and_bounded(name: str) -> None:
    service = SERVICES[name]
    assert (service["init"], service["read_only"], service["cap_drop"]) == (True, True, ["ALL"])
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert {"max-size", "max-file"} <= set(service["logging"]["options"])
    assert {"mem_limit", "pids_limit", "restart"} <= set(service)
    assert service.get("user", "10001") not in ("root", "0")
    assert "privileged" not in service


def test_data_and_passwords_are_mounted_read_only_and_the_api_alone_is_published() -> None:
    mounts = {name: [str(mount) for mount in service.get("volumes", ())] for name, service in SERVICES.items()}
    for name in ("api", "worker"):
        assert [mount for mount in mounts[name] if ":/data/" in mount and not mount.endswith(":ro")] == []
        assert len([mount for mount in mounts[name] if ":/data/" in mount]) == 2
    assert [name for name, all_of_it in mounts.items() if any("secrets:" in one and not one.endswith(":ro") for one in all_of_it)] == [
        "secrets"
    ]
    assert {name: service["ports"] for name, service in SERVICES.items() if "ports" in service} == {
        "api": ["${CLIPRD_LISTEN:-127.0.0.1:8000}:8000"]
    }


def test_a_worker_is_killed_later_than_its_job() -> None:
    worker = SERVICES["worker"]
    grace = float(default(worker["environment"]["CLIPRD_GRACE_SECONDS"]))
    assert float(default(worker["stop_grace_period"]).removesuffix("s")) >= grace + 60


def test_both_images_run_as_one_fixed_user() -> None:
    for part in ("service", "worker"):
        lines = (REPOSITORY / part / "Dockerfile").read_text().splitlines()
        assert [line for line in lines if line.startswith("USER")] == ["USER 10001:10001"]
        assert not any(line.startswith("# syntax") for line in lines)


def test_every_variable_of_the_file_is_documented() -> None:
    documented = (REPOSITORY / "docs" / "deploy.md").read_text()
    variables = set(re.findall(r"\$\{(CLIPRD_\w+)", TEXT))
    assert "CLIPRD_LISTEN" in variables
    assert [name for name in sorted(variables) if f"`{name}`" not in documented] == []
