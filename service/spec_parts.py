"""Those parts of a submitted body that can be looked at each by itself: models, sources and evaluation sets, whatever else is wrong."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, Field, ValidationError, ValidatorFunctionWrapHandler, WrapValidator

from cliprd_core.evaluation_spec import EvaluationSet, EvaluationSetOrPath
from cliprd_core.spec import MAX_TEACHERS, CsvSource, DataSource, StudentSpec, TeacherSpec, WebDatasetSource
from cliprd_core.spec_model import MAX_LIST_LENGTH

SpecPart = StudentSpec | TeacherSpec | WebDatasetSource | CsvSource | EvaluationSet


def valid_parts(body: Mapping[str, Any]) -> Iterator[tuple[str, SpecPart]]:
    """The parts of a body that are valid by themselves, each with its field; of a list that is too long none."""
    parts = _Parts.model_validate(body)
    data, evaluation = parts.data or _Data(), parts.evaluation or _Evaluation()
    lists: dict[str, list[Any] | None] = {
        "teachers": parts.teachers,
        "data.train": data.train,
        "data.validation": data.validation,
        "evaluation.zero_shot": evaluation.zero_shot,
        "evaluation.retrieval": evaluation.retrieval,
    }
    found = {"student": parts.student, "teacher": parts.teacher}
    found |= {f"{field}.{index}": part for field, listed in lists.items() for index, part in enumerate(listed or [])}
    yield from ((field, part) for field, part in found.items() if part is not None)


def _or_none(value: Any, validate: ValidatorFunctionWrapHandler) -> Any:
    try:
        return validate(value)
    except ValidationError:
        return None


Anything = TypeVar("Anything")
IfValid = Annotated[Anything | None, WrapValidator(_or_none)]
"""What is valid; None in place of what isn't."""


class _Data(BaseModel):
    train: IfValid[Annotated[list[IfValid[DataSource]], Field(max_length=MAX_LIST_LENGTH)]] = None
    validation: IfValid[Annotated[list[IfValid[DataSource]], Field(max_length=MAX_LIST_LENGTH)]] = None


class _Evaluation(BaseModel):
    zero_shot: IfValid[Annotated[list[IfValid[EvaluationSetOrPath]], Field(max_length=MAX_LIST_LENGTH)]] = None
    retrieval: IfValid[Annotated[list[IfValid[EvaluationSetOrPath]], Field(max_length=MAX_LIST_LENGTH)]] = None


class _Parts(BaseModel):
    student: IfValid[StudentSpec] = None
    teacher: IfValid[TeacherSpec] = None
    teachers: IfValid[Annotated[list[IfValid[TeacherSpec]], Field(max_length=MAX_TEACHERS)]] = None
    data: IfValid[_Data] = None
    evaluation: IfValid[_Evaluation] = None
