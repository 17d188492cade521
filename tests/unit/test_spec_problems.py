"""pydantic's errors as problems: each names the field without noise, and says what to do."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from cliprd_core.spec import JobSpec
from service.problems import FieldProblem, problems_of
from tests.store_helpers import TINY_CONFIG, spec_dict

_TEACHER = {"model": "ViT-B-16", "pretrained": "openai"}


def problems(spec: Any) -> dict[str, FieldProblem]:
    with pytest.raises(ValidationError) as caught:
        JobSpec.model_validate(spec)
    return {one.field: one for one in problems_of(caught.value.errors(), JobSpec)}


@pytest.mark.parametrize(
    ("change", "field", "problem", "remedy"),
    [
        ({"training": {"global_batch_size": 1}}, "training.global_batch_size", "greater than or equal to 2, but is 1", "Use 2 or more."),
        ({"training": {"epochs": 1.5}}, "training.epochs", "but is 1.5", "whole number"),
        ({"training": {"learning_rate": "fast"}}, "training.learning_rate", "`fast`", "Use a number"),
        ({"training": {"schedule": "cosin"}}, "training.schedule", "`cosin`", "`cosine`, `constant`"),
        ({"training": {"learning_rat": 1}}, "training.learning_rat", "no such field", "`training.learning_rate`"),
        ({"epochs": 3}, "epochs", "no such field", "`training.epochs`"),
        ({"teacher": {"job": "nope"}}, "teacher.job", "`nope`", "Give the id of a job"),
        ({"xyzzy": 3}, "xyzzy", "no such field", "The fields here are: name,"),
        ({"recipe": "clip_dk"}, "recipe", "`clip_dk`", "`clip`, `clip_kd`, `clip_rd`"),
        ({"data": {"train": [{"type": "webdataset"}]}}, "data.train.0.shards", "is missing", "Add it: Shards"),
        ({"data": {"train": [{"type": "csv", "path": "x", "sep": ","}]}}, "data.train.0.sep", "no such", "`data.train.0.separator`"),
        ({"data": {"train": [{"type": "zip"}]}}, "data.train.0.type", "is `zip`", "`webdataset`, `csv`"),
        ({"data": {"train": [{}]}}, "data.train.0.type", "which kind", "`webdataset`, `csv`"),
        ({"data": {"train": []}}, "data.train", "is empty", "Give at least 1."),
        ({"data": {"train": "x.tar"}}, "data.train", "valid list", "Write it as a list"),
        ({"data": None}, "data", "but is null", "Write it as an object"),
        ({"labels": {"a b": "c"}}, "labels.a b", "pattern", "pattern"),
        ({"labels": {"a": "ü"}}, "labels.a", "pattern", "pattern"),
        ({"evaluation": {"zero_shot": [3]}}, "evaluation.zero_shot.0", "but is 3", "Write it as an object"),
        ({"evaluation": {"zero_shot": ["a/x", "b/x"]}}, "evaluation", "two sets of `zero_shot`", "Give each its own `name`."),
        ({"recipe": "clip_rd"}, "teacher", "`objective.xrd` need", "use recipe `clip`"),
        ({"objective": {"fd": 2000}}, "teacher", "which `objective.fd` need", "use recipe `clip` with those weights at 0"),
        ({"training": {"epochs": "2"}}, "training.epochs", "integer", "Use a whole number."),
        ({"training": {"epochs": True}}, "training.epochs", "integer", "Use a whole number."),
        ({"training": {"lr": 1e-3}}, "training.lr", "no such field", "`training.learning_rate`"),
        ({"training": None}, "training", "must be an object", "Write it as an object"),
        ({"student": "ViT-T-16"}, "student", "must be an object, but is `ViT-T-16`", "Write it as an object"),
        ({"resources": {"num_processes": 3}}, "training.global_batch_size", "multiple of", "Change one of the two"),
        ({"student": {}}, "student", "names no model", "Give exactly one of"),
        ({"student": {"config": {**TINY_CONFIG, "embed_dim": 0}}}, "student", "`embed_dim`", "Correct"),
        ({"recipe": "clip_kd", "teacher": _TEACHER, "teachers": [_TEACHER]}, "teacher", "both set", "Put all of them into `teachers`"),
        ({"teachers": [_TEACHER]}, "teacher", "recipe `clip` trains without one", "Remove it"),
        ({"recipe": "clip_kd", "teachers": [_TEACHER, {"model": "ViT-B-16"}]}, "teachers.1", "trained weights", "Set `pretrained`"),
        ({"recipe": "clip_kd", "teachers": [_TEACHER] * 9}, "teachers", "at most 8", "8"),
        ({"teacher": {"model": "ViT-B-16"}}, "teacher", "trained weights", "Set `pretrained`"),
    ],
)
def test_problem(change: dict[str, Any], field: str, problem: str, remedy: str) -> None:
    found = problems(spec_dict(**change))
    assert list(found) == [field]
    assert problem in found[field].problem
    assert remedy in found[field].remedy


def test_all_problems_are_named_at_once() -> None:
    found = problems({"student": {"model": "a", "pretrained": 1}, "data": {"train": [{"type": "csv"}]}, "training": {"epochs": 0}})
    assert set(found) == {"name", "student.pretrained", "data.train.0.path", "training.epochs"}


def test_fields_of_a_union_member_named_like_its_tag_are_not_taken_for_the_tag() -> None:
    source = {"type": "webdataset", "shards": "x.tar", "webdataset": 1}
    assert list(problems(spec_dict(data={"train": [source]}))) == ["data.train.0.webdataset"]


def test_long_values_are_cut() -> None:
    found = problems(spec_dict(name="x" * 10_000))
    assert len(found["name"].problem) < 200
    assert found["name"].remedy == "Shorten it to 128 characters."
