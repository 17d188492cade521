"""What a user got wrong, as a list of fields, each with what is wrong and what to do.

Turns pydantic's errors into such lists; pydantic, the spec and the standard library only, so the command line can use it too.
"""

from __future__ import annotations

import difflib
import re
import types
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel, ConfigDict, Field, field_validator

from cliprd_core.spec import JOB_ID_PATTERN

BODY = "body"
"""Name of the field that is the whole request body."""


class FieldProblem(BaseModel):
    """One thing to correct."""

    model_config = ConfigDict(frozen=True)

    field: str = Field(description="Dotted path of the field, as `data.train.0.shards`.", examples=["training.lr"])
    problem: str = Field(description="What is wrong with it.", examples=["there is no such field"])
    remedy: str = Field(description="What to do about it.", examples=["Did you mean `training.learning_rate`? Otherwise remove it."])

    @field_validator("*", mode="before")
    @classmethod
    def _printable(cls, value: str) -> str:
        """A client's own names and values are quoted here, and may hold half of a surrogate pair, which can't be sent back."""
        return value.encode("utf-8", "replace").decode()


class SpecError(ValueError):
    """A spec that can't be run as it is. `problems` holds every reason that was found."""

    def __init__(self, problems: Sequence[FieldProblem]) -> None:
        super().__init__("\n".join(f"{one.field}: {one.problem}. {one.remedy}" for one in problems))
        self.problems = list(problems)


def closest(name: str, known: Iterable[str], *, count: int = 3) -> list[str]:
    """The known names most like `name`, best first; upper and lower case count as alike."""
    by_lower = {one.lower(): one for one in known}
    name = name.lower()
    parts = [
        one for one in by_lower if len(name) > 1 and (name in one or _initials(one) == name)
    ]  # `file` of filepath, `lr` of learning_rate
    alike = difflib.get_close_matches(name, by_lower, n=count, cutoff=0.6)
    return [by_lower[match] for match in dict.fromkeys([*parts, *alike])][:count]


def _initials(name: str) -> str:
    return "".join(word[:1] for word in name.split("_"))


def problems_of(errors: Iterable[Mapping[str, Any]], model: type[BaseModel]) -> list[FieldProblem]:
    """pydantic's errors about a `model`, as problems.

    Args:
        errors: `ValidationError.errors()`; each `loc` starts at the model.
        model: what was validated.
    """
    return [_problem_of(error, locate(error["loc"], model), model) for error in errors]


@dataclass
class Location:
    """Where in a model an error lies, without the tags that pydantic puts into its paths."""

    parts: list[str] = field(default_factory=list)
    parent: type[BaseModel] | None = None
    """The model that holds the last part, as far as the path could be followed."""

    @property
    def path(self) -> str:
        return ".".join(self.parts) or BODY


def locate(loc: Sequence[int | str], model: type[BaseModel]) -> Location:
    """Follow an error's `loc` through the annotations; what is no field, index or key is a union's tag and left out."""
    location = Location()
    current: Any = model
    for item in loc:
        current = _without_none(current)
        if _is_union(current):
            current = next((member for member in get_args(current) if item in _tags(member)), Any)
            continue
        if item == "[key]":
            continue
        location.parts.append(str(item))
        location.parent = current if _is_model(current) else None
        current = _below(current, item)
    return location


def _below(current: Any, item: int | str) -> Any:
    """The annotation of field, element or value `item` of `current`."""
    if _is_model(current):
        info = current.model_fields.get(item)
        return Any if info is None else info.annotation
    arguments = get_args(current)
    if get_origin(current) is tuple and isinstance(item, int) and item < len(arguments):
        return arguments[item]
    return arguments[-1] if get_origin(current) in (list, dict) else Any


def _is_model(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)


def _is_union(annotation: Any) -> bool:
    return get_origin(annotation) in (Union, types.UnionType)


def _without_none(annotation: Any) -> Any:
    while True:
        if get_origin(annotation) is Annotated:
            annotation = get_args(annotation)[0]
        elif _is_union(annotation):
            members = [one for one in get_args(annotation) if one is not type(None)]
            if len(members) != 1:
                return annotation
            annotation = members[0]
        else:
            return annotation


def _tags(member: Any) -> tuple[Any, ...]:
    """The values of a union member's `Literal` fields."""
    if not _is_model(member):
        return ()
    literals = (info.annotation for info in member.model_fields.values() if get_origin(info.annotation) is Literal)
    return tuple(value for literal in literals for value in get_args(literal))


def _problem_of(error: Mapping[str, Any], location: Location, model: type[BaseModel]) -> FieldProblem:  # noqa: PLR0911  (one per kind)
    kind, context = error["type"], error.get("ctx", {})
    path = location.path
    if kind == "value_error":
        return _own_problem(str(context["error"]), path, model)
    if kind == "extra_forbidden":
        return FieldProblem(field=path, problem="there is no such field", remedy=_remedy_for_unknown(location, model))
    if path == BODY and (kind == "missing" or isinstance(error.get("input"), bytes)):
        problem = "is missing" if kind == "missing" else "must be a JSON object, but was not sent as JSON"
        return FieldProblem(field=path, problem=problem, remedy=_REMEDIES["model_attributes_type"])
    if kind == "missing":
        info = None if location.parent is None else location.parent.model_fields.get(location.parts[-1])
        meaning = "" if info is None or not info.description else f": {info.description}"
        return FieldProblem(field=path, problem="is missing", remedy=f"Add it{meaning.rstrip('.')}.")
    if kind in ("enum", "literal_error"):
        remedy = f"Use one of: {_quoted(context['expected'].replace(' or ', ', '))}."
        return FieldProblem(field=path, problem=f"is {_shown(error['input'])}, which is none of its choices", remedy=remedy)
    if kind in ("union_tag_invalid", "union_tag_not_found"):
        tag = str(context["discriminator"]).strip("'")
        remedy = f"Set it to one of: {_quoted(context.get('expected_tags', _TAGS))}."
        problem = f"is {_shown(context['tag'])}, which is none of its choices" if "tag" in context else "does not say which kind this is"
        return FieldProblem(field=f"{path}.{tag}", problem=problem, remedy=remedy)
    if kind in ("model_attributes_type", "model_type", "dict_type") and path != BODY:
        return FieldProblem(field=path, problem=f"must be an object, but is {_shown(error['input'])}", remedy="Write it as an object: {…}.")
    return FieldProblem(field=path, problem=_sentence(error), remedy=_remedy(kind, context))


def _sentence(error: Mapping[str, Any]) -> str:
    """pydantic's sentence, in our words and with the value that was given."""
    if error["type"] in ("string_too_short", "too_short") and not error.get("input"):
        return "is empty"
    message = re.sub(r"^(Input|List|Dictionary|Tuple|String|Value) should ", "must ", str(error["msg"]))
    message = re.sub(r", unable to (parse|interpret) .*", "", message)
    message = (
        message.replace("must have at most", "may have at most").replace(" after validation", "").replace("1 characters", "1 character")
    )
    if error["type"].startswith("model_"):
        message = "must be a JSON object"
    return message if "must" not in message else f"{message}, but is {_shown(error.get('input'))}"


def _quoted(choices: str) -> str:
    return choices.replace("'", "`")


def _shown(value: Any) -> str:
    if isinstance(value, dict):
        return "an object"
    if isinstance(value, list):
        return f"a list of {len(value)}"
    text = {None: "null", True: "true", False: "false"}.get(value) if isinstance(value, bool | None) else None
    text = text or (f"`{value}`" if isinstance(value, str) else str(value))
    return text if len(text) <= 80 else f"{text[:77]}…"


_TAGS = "'webdataset', 'csv'"

_REMEDIES = {
    "string_pattern_mismatch": "Use only what the pattern {pattern} allows.",
    "greater_than_equal": "Use {ge} or more.",
    "greater_than": "Use more than {gt}.",
    "less_than_equal": "Use {le} or less.",
    "less_than": "Use less than {lt}.",
    "string_too_short": "Use at least {min_length} character(s).",
    "string_too_long": "Shorten it to {max_length} characters.",
    "too_short": "Give at least {min_length}.",
    "too_long": "Give at most {max_length}.",
    "finite_number": "Use a finite number.",
    "int_from_float": "Use a whole number.",
    "int_type": "Use a whole number.",
    "int_parsing": "Use a whole number.",
    "float_type": "Use a number.",
    "float_parsing": "Use a number.",
    "bool_type": "Use true or false.",
    "bool_parsing": "Use true or false.",
    "string_type": "Write it as a string, in quotation marks.",
    "string_unicode": "Use valid Unicode text.",
    "list_type": "Write it as a list: […].",
    "tuple_type": "Write it as a list: […].",
    "dict_type": "Write it as an object: {{…}}.",
    "model_type": "Write it as an object: {{…}}.",
    "model_attributes_type": "Send a JSON object, with the header `Content-Type: application/json`.",
}


_PATTERN_REMEDIES = {JOB_ID_PATTERN: "Give the id of a job, as `GET /jobs` lists them."}


def _remedy(kind: str, context: Mapping[str, Any]) -> str:
    if context.get("pattern") in _PATTERN_REMEDIES:
        return _PATTERN_REMEDIES[context["pattern"]]
    plain = {key: f"{value:g}" if isinstance(value, float) else value for key, value in context.items()}
    return _REMEDIES[kind].format(**plain) if kind in _REMEDIES else "Give a value that fits; the field is described in /docs."


def _remedy_for_unknown(location: Location, model: type[BaseModel]) -> str:
    """Name the field that was probably meant: one beside it, or one of this name elsewhere in the model."""
    name = location.parts[-1]
    beside = list(location.parent.model_fields) if location.parent is not None else []
    prefix = ".".join(location.parts[:-1])
    near = closest(name, beside, count=1)
    if near:
        meant = f"{prefix}.{near[0]}" if prefix else near[0]
        return f"Did you mean `{meant}`? Otherwise remove it."
    elsewhere = [path for path in field_paths(model) if path.rpartition(".")[2] == name]
    if elsewhere:
        return f"Did you mean `{elsewhere[0]}`? Otherwise remove it."
    return f"Remove it. The fields here are: {', '.join(beside)}." if beside else "Remove it."


def field_paths(model: type[BaseModel], prefix: str = "") -> list[str]:
    """Dotted paths of all fields of a model and of the models directly inside it; lists are not entered."""
    paths: list[str] = []
    for name, info in model.model_fields.items():
        paths.append(f"{prefix}{name}")
        inner = _without_none(info.annotation)
        if _is_model(inner):
            paths += field_paths(inner, f"{prefix}{name}.")
    return paths


def _own_problem(message: str, path: str, model: type[BaseModel]) -> FieldProblem:
    """A ValueError of the spec's own validators: `problem; remedy`, or `problem: remedy`, or a demand."""
    if path == BODY:
        known = set(field_paths(model))
        path = next((name for name in re.findall(r"`([a-z_.]+)`", message) if name in known), BODY)
    for separator in ("; ", ": "):
        problem, found, remedy = message.partition(separator)
        if found:
            return FieldProblem(field=path, problem=problem, remedy=f"{remedy[0].upper()}{remedy[1:]}.")
    return FieldProblem(field=path, problem=message, remedy="Correct the value; the field is described in /docs.")
