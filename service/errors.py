"""Every error the API answers with: one shape (RFC 9457, `application/problem+json`), whatever went wrong and wherever."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from http import HTTPStatus
from typing import Any

from anyio.to_thread import run_sync
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from pydantic import BaseModel, Field
from starlette.exceptions import HTTPException
from starlette.responses import Response
from starlette.routing import Match

from cliprd_core.spec import JobSpec
from cliprd_core.store_dir import StoreInUseError, StoreNotFoundError
from service.problems import BODY, FieldProblem, SpecError, problems_of
from service.store.blobs import BlobsUnreachableError
from service.store.errors import (
    ArtifactNotFoundError,
    IdempotencyConflictError,
    InvalidCursorError,
    JobConflictError,
    JobFinishedError,
    JobNotFoundError,
    TeacherUnavailableError,
)
from service.store.session import OUT_OF_REACH
from service.streams import TooManyStreamsError
from service.strict_query import QueryError
from service.submission import problems_of_parts

logger = logging.getLogger(__name__)

MEDIA_TYPE = "application/problem+json"

_TITLES = {413: "Content Too Large", 416: "Range Not Satisfiable", 422: "Unprocessable Content"}
"""RFC 9110's phrases, where they differ between Python versions."""


_HEADER_REMEDIES = {
    "Idempotency-Key": "Send what no other submission has, such as a UUID: up to 255 letters, digits and signs, without spaces. Or leave"
    " the header out.",
    "Last-Event-ID": "Send the `id` of the last event that arrived from this stream of this job, which is a whole number. Leave the header"
    " out to begin anew.",
}
"""What to do about a header that is refused."""


class Problem(BaseModel):
    """An error (RFC 9457)."""

    type: str = Field(description="Kind of the problem, for programs.", examples=["urn:cliprd:problem:invalid-request"])
    title: str = Field(description="The same for people; always the same for one type.", examples=["Invalid request"])
    status: int = Field(description="HTTP status.", examples=[422])
    detail: str = Field(description="What is wrong this time.", examples=["1 field(s) to correct: training.lr"])
    instance: str = Field(description="Path of the request.", examples=["/jobs"])
    errors: list[FieldProblem] = Field(default=[], description="Every field to correct.")


class NoSuchLabelError(ValueError):
    """A `label` of the query is not `key=value`."""


class NeverIssuedError(ValueError):
    """A `Last-Event-ID` that no event had."""

    def __init__(self, given: int, newest: int) -> None:
        super().__init__(f"is {given}, but the newest event here has the id {newest}")


class NotReadyError(Exception):
    """The service can't work now; `parts` says why not, part by part."""

    def __init__(self, parts: Sequence[FieldProblem]) -> None:
        super().__init__(", ".join(part.field for part in parts))
        self.parts = list(parts)


def problem_response(
    instance: str,
    status: int,
    detail: str,
    *,
    kind: str | None = None,
    title: str | None = None,
    errors: Sequence[FieldProblem] = (),
    headers: Mapping[str, str] | None = None,
) -> Response:
    """The response of one problem; `kind` and `title` default to the status's own phrase."""
    phrase = _phrase(status)
    problem = Problem(
        type=f"urn:cliprd:problem:{kind or phrase.lower().replace(' ', '-')}",
        title=title or phrase,
        status=status,
        detail=detail,
        instance=instance,
        errors=list(errors),
    )
    # Escaped to ASCII, so that whatever a client sent can be quoted back.
    return Response(json.dumps(problem.model_dump(mode="json")), status_code=status, media_type=MEDIA_TYPE, headers=headers)


def install_handlers(app: FastAPI) -> None:
    """Make `app` answer every exception with a problem."""
    app.add_exception_handler(HTTPException, _on_http_error)
    app.add_exception_handler(RequestValidationError, _on_invalid_request)
    app.add_exception_handler(SpecError, _on_refused_field)
    app.add_exception_handler(QueryError, _on_refused_field)
    app.add_exception_handler(TeacherUnavailableError, _on_refused_field)
    app.add_exception_handler(InvalidCursorError, _on_refused_field)
    app.add_exception_handler(NoSuchLabelError, _on_refused_field)
    app.add_exception_handler(NeverIssuedError, _on_refused_field)
    app.add_exception_handler(IdempotencyConflictError, _on_refused_field)
    app.add_exception_handler(JobNotFoundError, _on_not_found)
    app.add_exception_handler(ArtifactNotFoundError, _on_not_found)
    app.add_exception_handler(StoreNotFoundError, _on_not_found)
    app.add_exception_handler(JobFinishedError, _on_job_finished)
    app.add_exception_handler(StoreInUseError, _on_store_in_use)
    app.add_exception_handler(JobConflictError, _on_job_conflict)
    app.add_exception_handler(TooManyStreamsError, _on_too_many_streams)
    app.add_exception_handler(NotReadyError, _on_not_ready)
    for kind in OUT_OF_REACH:
        app.add_exception_handler(kind, _on_database_error)
    app.add_exception_handler(BlobsUnreachableError, _on_blobs_error)
    app.add_exception_handler(Exception, _on_fault)


def _on_http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    headers = dict(error.headers or {})
    detail = str(error.detail)
    if error.status_code == HTTPStatus.METHOD_NOT_ALLOWED:
        allowed = ", ".join(_allowed_methods(request))
        headers["Allow"] = allowed
        detail = f"{request.method} is not possible here; use {allowed}"
    elif error.status_code == HTTPStatus.NOT_FOUND and detail == HTTPStatus.NOT_FOUND.phrase:
        detail = f"there is nothing at {request.url.path}; /docs lists what there is"
    return problem_response(request.url.path, error.status_code, detail, headers=headers)


def _allowed_methods(request: Request) -> list[str]:
    """Methods that some route of this path takes; the framework itself names those of one route only."""
    methods = ("DELETE", "GET", "HEAD", "PATCH", "POST", "PUT")
    scopes = {method: {**request.scope, "method": method} for method in methods}
    found = [method for method, scope in scopes.items() if any(route.matches(scope)[0] is Match.FULL for route in request.app.routes)]
    return sorted({*found, "HEAD"}) if "GET" in found else found


async def _on_invalid_request(request: Request, error: Exception) -> Response:
    looks = request.app.state.services.file_looks if _takes_a_spec(request) else None
    return await run_sync(_describe_invalid, request, error, limiter=looks)


def _describe_invalid(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    problems: list[FieldProblem] = []
    for one in error.errors():
        source, *loc = one["loc"]
        if one["type"] == "json_invalid":
            return _malformed_json(request, str(error.body), int(loc[0]), one["ctx"]["error"])
        found = problems_of([{**one, "loc": loc}], JobSpec if source == "body" else BaseModel)
        problems += (
            [problem.model_copy(update={"remedy": _HEADER_REMEDIES[problem.field]}) for problem in found] if source == "header" else found
        )
    if _takes_a_spec(request):
        problems += problems_of_parts(request.app.state.services, error.body)
    return _invalid(request, problems)


def _takes_a_spec(request: Request) -> bool:
    route = request.scope.get("route")
    return isinstance(route, APIRoute) and route.body_field is not None and route.body_field.field_info.annotation is JobSpec


def _malformed_json(request: Request, document: str, position: int, message: str) -> Response:
    line = document.count("\n", 0, position) + 1
    column = position - (document.rfind("\n", 0, position) + 1) + 1
    problem = FieldProblem(field=BODY, problem=f"is not JSON: {message} at line {line}, column {column}", remedy="Correct it there.")
    return problem_response(
        request.url.path, 400, f"the body {problem.problem}", kind="malformed-json", title="Malformed JSON", errors=[problem]
    )


def _on_refused_field(request: Request, error: Exception) -> Response:
    match error:
        case SpecError() | QueryError():
            return _invalid(request, error.problems)
        case TeacherUnavailableError():
            remedy = "Give a job that is under way or succeeded, or a `model` artifact."
            return _invalid(request, [FieldProblem(field=error.field, problem=error.problem, remedy=remedy)])
        case NoSuchLabelError():
            remedy = "Write it as `label=key=value`; repeat it for several."
            return _invalid(request, [FieldProblem(field="label", problem=str(error), remedy=remedy)])
        case NeverIssuedError():
            problem = FieldProblem(field="Last-Event-ID", problem=str(error), remedy=_HEADER_REMEDIES["Last-Event-ID"])
            return _invalid(request, [problem])
        case IdempotencyConflictError():
            remedy = "Use a new key for each job; repeat one only with the spec it was first sent with, and while its job is there."
            return _invalid(request, [FieldProblem(field="Idempotency-Key", problem=str(error), remedy=remedy)])
        case _:
            remedy = "Leave it out to start at the first page."
            return _invalid(request, [FieldProblem(field="cursor", problem=str(error), remedy=remedy)])


def _invalid(request: Request, problems: Sequence[FieldProblem]) -> Response:
    detail = f"{len(problems)} field(s) to correct: {', '.join(dict.fromkeys(one.field for one in problems))}"
    return problem_response(request.url.path, 422, detail, kind="invalid-request", title="Invalid request", errors=problems)


def _on_not_found(request: Request, error: Exception) -> Response:
    return problem_response(request.url.path, 404, str(error))


def _on_job_finished(request: Request, error: Exception) -> Response:
    return problem_response(request.url.path, 409, str(error), kind="job-finished", title="The job has finished")


def _on_store_in_use(request: Request, error: Exception) -> Response:
    return problem_response(request.url.path, 409, str(error), kind="teacher-store-in-use", title="The teacher store is in use")


def _on_job_conflict(request: Request, error: Exception) -> Response:
    return problem_response(request.url.path, 409, str(error), kind="job-conflict", title="Not possible in the job's state")


def _on_too_many_streams(request: Request, error: Exception) -> Response:  # noqa: ARG001
    detail = "too many event streams are open; close some, try again later, or ask for the list instead"
    return problem_response(request.url.path, 503, detail, kind="too-many-streams", headers={"Retry-After": "5"})


def _on_not_ready(request: Request, error: Exception) -> Response:
    assert isinstance(error, NotReadyError)
    detail = f"not ready: {error}"
    return problem_response(request.url.path, 503, detail, kind="not-ready", title="Not ready", errors=error.parts)


def _on_database_error(request: Request, error: Exception) -> Response:
    return database_problem(request.method, request.url.path, error)


def database_problem(method: str, path: str, error: Exception) -> Response:
    """The answer to a request that the database failed; the log says more."""
    logger.error("the database failed in %s %s", method, path, exc_info=error)
    detail = "the database can't be used now; try again later (GET /readyz says more)"
    return problem_response(path, 503, detail, kind="database-unavailable", headers={"Retry-After": "5"})


def _on_blobs_error(request: Request, error: Exception) -> Response:
    logger.error("the artifact store failed in %s %s", request.method, request.url.path, exc_info=error)
    detail = "the artifact store can't be used now; try again later (GET /readyz says more)"
    return problem_response(request.url.path, 503, detail, kind="artifacts-unavailable", headers={"Retry-After": "5"})


def _on_fault(request: Request, error: Exception) -> Response:  # noqa: ARG001  (the server logs it)
    return problem_response(request.url.path, 500, "a fault of cliprd itself; the service's log has the details")


def problem_responses(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """OpenAPI's description of these error statuses, for a route."""
    content = {MEDIA_TYPE: {"schema": {"$ref": "#/components/schemas/Problem"}}}
    return {status: {"description": _phrase(status), "content": content} for status in statuses}


def _phrase(status: int) -> str:
    return _TITLES.get(status) or HTTPStatus(status).phrase
