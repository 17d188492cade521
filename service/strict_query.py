"""Every query parameter is one that the route has, given once: a misspelt filter must not silently list everything."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Coroutine, Mapping
from typing import Any

from fastapi import Request, Response
from fastapi.concurrency import run_in_threadpool
from fastapi.routing import APIRoute

from service.problems import FieldProblem, closest

MAX_METRIC_NAMES = 256
MAX_NAMED = 20
"""As many faults are told; finding what was meant takes time for each."""


class QueryError(ValueError):
    """A query has parameters that its route does not take so. `problems` holds the first of them."""

    def __init__(self, problems: list[FieldProblem]) -> None:
        super().__init__(", ".join(one.field for one in problems))
        self.problems = problems


def metric_names(given: list[str]) -> list[str]:
    """The names or prefixes of `names`, separated by commas or repeated.

    Raises:
        QueryError: they are too many.
    """
    names = [name.strip() for one in given for name in one.split(",")]
    if len(names) > MAX_METRIC_NAMES:
        remedy = f"Ask for {MAX_METRIC_NAMES} at most, or for a prefix that ends in `*`."
        raise QueryError([FieldProblem(field="names", problem=f"holds {len(names)} names", remedy=remedy)])
    return names


class StrictRoute(APIRoute):
    """A route that refuses what the OpenAPI does not list for it, and lists of what is single-valued. All of ours are of this class.

    Not a dependency, which every request would pay for; and only a query takes a thread: a request without one, such as a probe, is served
    also while all threads wait for the database.
    """

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()

        async def strictly(request: Request) -> Response:
            """
            Raises:
                QueryError: there are other parameters.
            """
            if request.scope["query_string"]:
                await run_in_threadpool(_refuse_others, request)
            return await handle(request)

        return strictly


def _refuse_others(request: Request) -> None:
    given = Counter(name for name, _ in request.query_params.multi_items())
    path = request.scope["route"].path_format
    operation = request.app.openapi()["paths"].get(path, {}).get("get" if request.method == "HEAD" else request.method.lower(), {})
    parameters = {one["name"]: one["schema"] for one in operation.get("parameters", []) if one["in"] == "query"}
    problems = [_unknown(name, list(parameters)) for name in [*given][:MAX_NAMED] if name not in parameters]
    problems += [
        FieldProblem(field=name, problem=f"is given {count} times", remedy="Give it once.")
        for name, count in given.items()
        if count > 1 and name in parameters and not _is_list(parameters[name])
    ]
    if problems:
        raise QueryError(problems[:MAX_NAMED])


def _unknown(name: str, known: list[str]) -> FieldProblem:
    near = closest(name, known, count=1)
    if near:
        remedy = f"Did you mean `{near[0]}`? Otherwise remove it."
    else:
        remedy = f"Remove it. The parameters here are: {', '.join(known)}." if known else "Remove it; there are none here."
    return FieldProblem(field=name[:80], problem="there is no such query parameter", remedy=remedy)


def _is_list(schema: Mapping[str, Any]) -> bool:
    return schema.get("type") == "array"
