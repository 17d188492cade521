"""The OpenAPI of all routes: FastAPI's own, and what it can't know: the shape of errors, keys, and where an answer leads to."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi

from service.auth import OPEN_PATHS
from service.errors import Problem, problem_responses

DESCRIPTION = (
    "Every error is a problem (RFC 9457, `application/problem+json`) that names each field, what is wrong with it and what to do. Query"
    " parameters that a route does not list, and repeated ones that are no lists, are refused (422), as unknown fields of a body are."
)

KEY_DESCRIPTION = (
    "An API key, made by `cliprd keys create`. Reading needs scope `read`, submitting and cancelling `submit`, deleting `admin`; each"
    " includes those before it. While no key was ever made, this machine's own requests pass without one (unless the service was told to"
    " need keys always), and no others do."
)

RETRY_AFTER = {"Retry-After": {"description": "Seconds to wait before the next try.", "schema": {"type": "integer"}}}

LINKS: dict[str, dict[str, dict[str, str]]] = {
    "JobList": {"read_job": {"job_id": "$response.body#/jobs/0/id"}, "list_jobs": {"cursor": "$response.body#/next_cursor"}},
    "ArtifactList": {"download_artifact": {"artifact_id": "$response.body#/artifacts/0/id"}},
    "TeacherStoreList": {"delete_teacher_store": {"key": "$response.body#/teacher_stores/0/key"}},
}
"""By the schema of an answer: the operations that it leads to, and where their parameters are in it. A job leads to all about one job."""


def openapi_of(app: FastAPI) -> dict[str, Any]:
    """The description of the app's routes, made once."""
    if app.openapi_schema is None:
        schema = get_openapi(title=app.title, version=app.version, summary=app.summary, description=app.description, routes=app.routes)
        components = schema["components"]
        for unused in ("HTTPValidationError", "ValidationError"):
            components["schemas"].pop(unused, None)
        problem = Problem.model_json_schema(ref_template="#/components/schemas/{model}")
        components["schemas"] |= {**problem.pop("$defs"), "Problem": problem}
        components["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer", "description": KEY_DESCRIPTION}}
        operations = [(path, one) for path, methods in schema["paths"].items() for one in methods.values()]
        of_jobs = {one["operationId"]: {"job_id": "$response.body#/id"} for path, one in operations if "{job_id}" in path}
        links = LINKS | {"JobView": of_jobs}
        components["links"] = {
            _link_name(answer, operation): {"operationId": operation, "parameters": parameters}
            for answer, targets in links.items()
            for operation, parameters in targets.items()
        }
        for path, operation in operations:
            _complete(operation, links, is_open=path in OPEN_PATHS)
        app.openapi_schema = schema
    return app.openapi_schema


def _complete(operation: dict[str, Any], links: Mapping[str, Iterable[str]], *, is_open: bool) -> None:
    """Add the refusals that any operation may answer with, in place of FastAPI's own, and the links of its answers."""
    refusals = problem_responses(422, 431)
    refusals[422]["description"] += ": fields to correct, or query parameters that are unknown here or given more than once"
    if "requestBody" in operation:
        refusals |= problem_responses(400, 413)
    if not is_open:
        operation["security"] = [{"key": []}, {}]
        refusals |= problem_responses(401, 403, 503)  # whether a key is good is in the database
        refusals[503]["headers"] = RETRY_AFTER
    answers = operation["responses"] | {str(status): answer for status, answer in refusals.items()}
    operation["responses"] = dict(sorted(answers.items()))
    for answer in answers.values():
        name = answer.get("content", {}).get("application/json", {}).get("schema", {}).get("$ref", "").rpartition("/")[2]
        if name in links:
            answer["links"] = {target: {"$ref": f"#/components/links/{_link_name(name, target)}"} for target in links[name]}


def _link_name(answer: str, operation: str) -> str:
    return f"{answer}.{operation}"
