"""`evaluation` of the job spec: what is measured, and when. Imports pydantic only, as `spec` does."""

from __future__ import annotations

from typing import Annotated, Any, Self

from pydantic import BeforeValidator, Field, StrictInt, model_validator

from cliprd_core.spec_model import MAX_LIST_LENGTH, Path, SpecModel


class EvaluationSet(SpecModel):
    """One data set in clip_benchmark's webdataset layout (`classnames.txt`, `SPLIT/nshards.txt`, `SPLIT/0.tar`, …)."""

    path: Path = Field(description="Folder of the data set.")
    split: str = Field(default="test", pattern=r"^[A-Za-z0-9_-]{1,64}$")
    name: str = Field(default="", max_length=128, description="Name in metrics and tables. Empty: the folder's name.")

    @model_validator(mode="before")
    @classmethod
    def _name_from_folder(cls, value: Any) -> Any:
        if isinstance(value, dict) and not value.get("name") and isinstance(value.get("path"), str):
            return {**value, "name": value["path"].rstrip("/").rsplit("/", 1)[-1]}
        return value


def _path_only(value: Any) -> Any:
    return {"path": value} if isinstance(value, str) else value


EvaluationSetOrPath = Annotated[EvaluationSet, BeforeValidator(_path_only, json_schema_input_type=EvaluationSet | str)]


class EvaluationSpec(SpecModel):
    """What is measured, and when. The last epoch is always evaluated."""

    every_epochs: StrictInt = Field(default=1, ge=1, le=10_000, description="Epochs between evaluations.")
    zero_shot: list[EvaluationSetOrPath] = Field(
        default=[], max_length=MAX_LIST_LENGTH, description="Classification sets; a bare path will do."
    )
    retrieval: list[EvaluationSetOrPath] = Field(default=[], max_length=MAX_LIST_LENGTH, description="Retrieval sets; a bare path will do.")

    @model_validator(mode="after")
    def _unique_names(self) -> Self:
        for kind, sets in (("zero_shot", self.zero_shot), ("retrieval", self.retrieval)):
            names = [one.name for one in sets]
            for name in names:
                if names.count(name) > 1:
                    raise ValueError(f"two sets of `{kind}` are named {name!r}; give each its own `name`")
        return self
