"""What can be known of a spec when it is submitted, beyond its types: do the files exist, are the names known, do the numbers fit?

It needs pydantic, braceexpand and the standard library. All problems are collected, so that a user corrects them in one go.
"""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Concatenate, ParamSpec, TypeVar

from pydantic_core import PydanticSerializationError

from cliprd_core.evaluation_spec import EvaluationSet
from cliprd_core.locations import Locations
from cliprd_core.spec import DataSource, JobSpec, StudentSpec, TeacherSpec, WebDatasetSource
from service import data_files, evaluation_files, model_names, places
from service.file_walk import FileWalk, TooMuchToWalkError
from service.looks import Looks
from service.model_config_check import model_config_problems
from service.pair_counts import at_most_num_pairs, known_num_pairs, num_steps_of
from service.problems import FieldProblem, SpecError
from service.spec_parts import SpecPart, valid_parts

MAX_CONFIG_DEPTH = 16
MAX_PATH_DEPTH = 64
WALK_LESS = "Name shards by ranges such as {00000..00007}, start globs in smaller folders, and keep other files elsewhere."
MAX_NAMES = 200_000
"""Shards that all patterns of a spec name together: each is looked at, while the submission waits."""

CONFIGS: dict[str, set[str] | dict[str, set[str]]] = {"student": {"config"}, "teacher": {"config"}, "teachers": {"__all__": {"config"}}}
"""Of models: the only fields of a spec that may hold anything."""

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")
ModelSpec = TypeVar("ModelSpec", StudentSpec, TeacherSpec)


def check_spec(
    spec: JobSpec, *, data_root: Path, locations: Locations | None = None, check_files: bool = True, looks: Looks | None = None
) -> JobSpec:
    """The resolved spec: relative paths made absolute from `data_root`, so that a worker can take them as they are.

    Args:
        spec: as it was submitted.
        data_root: where its relative paths start.
        locations: where its data and checkpoints may lie. Left out: anywhere.
        check_files: False where this machine doesn't see the files; names and numbers are checked all the same.
        looks: shared by specs that are checked at one time. Left out: its own.

    Raises:
        SpecError: with every problem that was found.
    """
    check = _Check(data_root.absolute(), locations or Locations(), check_files, looks)
    resolved = check.resolve(spec)
    if check.problems:
        raise SpecError(check.problems)
    return resolved


def check_parts(
    body: Mapping[str, Any], *, data_root: Path, locations: Locations | None = None, check_files: bool = True
) -> list[FieldProblem]:
    """As `check_spec`, of a body that is no spec as a whole: what is wrong with those of its models, sources and evaluation sets that are
    valid each by itself."""
    check = _Check(data_root.absolute(), locations or Locations(), check_files)
    for field, part in valid_parts(body):
        check.part(field, part)
    return check.problems


def check_values(spec: JobSpec) -> None:
    """Refuse what neither JSON nor the database can hold, wherever it is in the spec; of its meaning nothing is checked.

    Raises:
        SpecError: with every such value.
    """
    check = _Check(Path(), Locations(), check_files=False)
    check.values(spec)
    if check.problems:
        raise SpecError(check.problems)


class _Check:
    """Walks a spec once: makes its paths absolute and collects problems on the way."""

    def __init__(self, data_root: Path, locations: Locations, check_files: bool, looks: Looks | None = None) -> None:
        self.data_root = data_root
        self.locations = locations
        self.check_files = check_files
        self.look = looks or Looks()
        self.walk = FileWalk()
        self.problems: list[FieldProblem] = []
        self._num_names = 0

    def values(self, spec: JobSpec) -> None:
        if not _is_plain(spec):
            self._check_values("", spec.model_dump(exclude=CONFIGS))
        self._check_values("student.config", spec.student.config)
        for field, teacher in spec.teacher_fields.items():
            self._check_values(f"{field}.config", teacher.config)

    def part(self, field: str, part: SpecPart) -> None:
        """One part by itself: its values, and if these are sound, what they name."""
        num_problems = len(self.problems)
        self._check_values(field, part.model_dump(exclude={"config"}))
        if isinstance(part, StudentSpec | TeacherSpec):
            self._check_values(f"{field}.config", part.config)
        if len(self.problems) > num_problems:
            return  # a NUL character would trip the look at the files
        match part:
            case StudentSpec():
                self._model(field, part)
            case TeacherSpec():
                self._model(field, part)
            case EvaluationSet():
                self._evaluation_set(field, part)
            case _:
                self._source(field, part)

    def resolve(self, spec: JobSpec) -> JobSpec:
        self.values(spec)
        if self.problems:
            return spec  # a NUL character would trip the look at the files
        resolved = spec.model_copy(
            update={
                "student": self._model("student", spec.student),
                "data": spec.data.model_copy(
                    update={
                        "train": self._sources("data.train", spec.data.train),
                        "validation": self._sources("data.validation", spec.data.validation),
                    }
                ),
                "evaluation": spec.evaluation.model_copy(
                    update={
                        "zero_shot": self._evaluation_sets("zero_shot", spec.evaluation.zero_shot),
                        "retrieval": self._evaluation_sets("retrieval", spec.evaluation.retrieval),
                    }
                ),
            }
        )
        resolved = resolved.with_teachers({field: self._model(field, teacher) for field, teacher in spec.teacher_fields.items()})
        self._check_num_steps(resolved)
        return resolved

    def _absolute(self, path: str) -> str:
        return os.path.normpath(os.path.join(self.data_root, path))  # noqa: PTH118  a tenth of a Path's time

    def _check_values(self, path: str, value: Any) -> None:
        """Refuse what neither JSON nor the database can hold, wherever it is in the spec."""
        pending: list[tuple[str, Any, int]] = [(path, value, 0)]
        while pending:
            path, value, depth = pending.pop()
            if depth > MAX_CONFIG_DEPTH:
                self._add(path, f"is nested more than {MAX_CONFIG_DEPTH} levels deep", "Flatten it.")
            elif isinstance(value, dict):
                pending += [(f"{path}.{key}".lstrip("."), inner, depth + 1) for key, inner in value.items()]
                pending += [(path, key, depth + 1) for key in value]
            elif isinstance(value, list | tuple):
                pending += [(f"{path}.{index}", inner, depth + 1) for index, inner in enumerate(value)]
            elif isinstance(value, str) and "\0" in value:
                self._add(path.replace("\0", "?"), "holds a NUL character", "Remove it.")
            elif isinstance(value, str) and not _is_unicode(value):
                self._add(path, "holds half of a surrogate pair, which is no character", "Remove it.")
            elif isinstance(value, str) and value.count("/") > MAX_PATH_DEPTH:
                self._add(path, f"is a path of more than {MAX_PATH_DEPTH} folders", "Shorten it, or move the files up.")
            elif isinstance(value, float) and not math.isfinite(value):
                self._add(path, f"is {value}, which is no number of JSON", "Use a finite number.")

    def _model(self, role: str, spec: ModelSpec) -> ModelSpec:
        update: dict[str, str] = {}
        if spec.config is not None:
            self.problems += model_config_problems(f"{role}.config", spec.config)
        if spec.model is not None and spec.model.startswith(model_names.LOCAL_DIR_PREFIX):
            folder = self._absolute(spec.model.removeprefix(model_names.LOCAL_DIR_PREFIX))
            update["model"] = f"{model_names.LOCAL_DIR_PREFIX}{folder}"
            self._add_files(f"{role}.model", data_files.local_dir_problem, folder, data_files.local_dir_files(folder))
        elif spec.model is not None:
            self.problems += model_names.check_model_name(f"{role}.model", spec.model)
        if spec.pretrained is not None:
            is_file = spec.config is not None or model_names.is_checkpoint_file(spec.pretrained, self.data_root)
            if is_file:
                update["pretrained"] = self._absolute(spec.pretrained)
                self._add_files(f"{role}.pretrained", data_files.checkpoint_problem, update["pretrained"])
            elif spec.model is not None and model_names.is_known(spec.model):
                self.problems += model_names.check_pretrained_tag(f"{role}.pretrained", spec.model, spec.pretrained)
        return spec.model_copy(update=update)

    def _sources(self, field: str, sources: Sequence[DataSource]) -> list[DataSource]:
        return [self._source(f"{field}.{index}", source) for index, source in enumerate(sources)]

    def _source(self, field: str, source: DataSource) -> DataSource:
        if isinstance(source, WebDatasetSource):
            if source.is_remote:
                self._add_shards(f"{field}.shards", source.shards, data_files.remote_problem, places.remote_problem)
                return source
            shards = source.model_copy(update={"shards": self._absolute(source.shards)})
            self._add_shards(
                f"{field}.shards", shards.shards, data_files.pattern_problem, places.local_place_problem, around=places.local_problem
            )
            return shards
        image_root = None if source.image_root is None else self._absolute(source.image_root)
        table = source.model_copy(update={"path": self._absolute(source.path), "image_root": image_root})
        is_allowed = self._is_allowed(f"{field}.path", [table.path])
        if image_root is not None:
            is_allowed &= self._is_allowed(f"{field}.image_root", [image_root])
        if self.check_files and is_allowed:
            self.problems += self.look(data_files.table_problems, field, table)
        return table

    def _evaluation_sets(self, kind: str, sets: Sequence[EvaluationSet]) -> list[EvaluationSet]:
        return [self._evaluation_set(f"evaluation.{kind}.{index}", one) for index, one in enumerate(sets)]

    def _evaluation_set(self, field: str, one: EvaluationSet) -> EvaluationSet:
        resolved = one.model_copy(update={"path": self._absolute(one.path)})
        found = self._look_around(f"{field}.path", places.evaluation_problem, self.locations, resolved.path, resolved.split)
        if found is not None:
            self._add(f"{field}.path", *found)
        elif self.check_files:
            kind = field.split(".")[1]
            problems = self._look_around(f"{field}.path", evaluation_files.evaluation_problems, kind, resolved.path, resolved.split)
            for name, problem, remedy in problems or []:
                self._add(f"{field}.{name}", problem, remedy)
        return resolved

    def _check_num_steps(self, spec: JobSpec) -> None:
        """Batch and warm-up against the number of pairs, as far as that is known without reading the data."""
        if not self.check_files or self.problems:
            return
        try:
            num_pairs = known_num_pairs(spec, lambda source: self.look.around(at_most_num_pairs, self.walk, source))
        except TooMuchToWalkError:
            return
        if num_pairs is None:
            return
        training = spec.training
        num_steps = num_steps_of(spec, num_pairs)
        if num_steps == 0:
            self._add(
                "training.global_batch_size",
                f"is {training.global_batch_size}, but there are only {num_pairs} training pairs, which fill no batch",
                f"Use {num_pairs} or less, or give more data.",
            )
        elif training.warmup_steps >= num_steps:
            self._add(
                "training.warmup_steps",
                f"is {training.warmup_steps}, but the whole run has only {num_steps} steps"
                f" ({num_pairs} pairs, {training.global_batch_size} a step, {training.epochs} epochs)",
                f"Use less than {num_steps}; about {num_steps // 20} would do.",
            )

    def _add(self, field: str, problem: str, remedy: str) -> None:
        self.problems.append(FieldProblem(field=field, problem=problem, remedy=remedy))

    def _add_files(self, field: str, look: data_files.Look, path: str, files: Iterable[str] = ()) -> None:
        """What `look` finds, if `path`, and the `files` it stands for, lie where they may."""
        is_allowed = self._is_allowed(field, itertools.chain([path], files))
        found = self.look(look, path) if is_allowed and self.check_files else None
        if found is not None:
            self._add(field, *found)

    def _look_around(
        self,
        field: str,
        look: Callable[Concatenate[FileWalk, Arguments], Result | None],
        *args: Arguments.args,
        **kwargs: Arguments.kwargs,
    ) -> Result | None:
        """What `look` finds; nothing if the spec leads to more looks than one may, which is a problem of the first field that does."""
        if self.walk.is_used_up:
            return None
        try:
            return self.look.around(look, self.walk, *args, **kwargs)
        except TooMuchToWalkError as error:
            self._add(field, str(error), WALK_LESS)
            return None

    def _add_shards(
        self,
        field: str,
        pattern: str,
        check: data_files.Look,
        look: Callable[[Locations, str], data_files.Found],
        *,
        around: Callable[[FileWalk, Locations, str], data_files.Found] | None = None,
    ) -> None:
        """What `check` finds wrong with a pattern itself, `look` with where it leads, or `around` with the files there."""
        found = self.look(check, pattern)
        if found is None:
            self._num_names += self.look(data_files.count_names, pattern)
            if self._num_names > MAX_NAMES:
                found = f"makes the spec's shards more than {MAX_NAMES}", "Use fewer and larger shards, or `*` in place of braces."
        found = found or self.look(look, self.locations, pattern)
        if found is None and around is not None and self.check_files:
            found = self._look_around(field, around, self.locations, pattern)
        if found is not None:
            self._add(field, *found)

    def _is_allowed(self, field: str, paths: Iterable[str]) -> bool:
        found = self.look(places.paths_problem, self.locations, tuple(paths))
        if found is not None:
            self._add(field, *found)
        return found is None


def _is_plain(spec: JobSpec) -> bool:
    """Whether nothing in a spec but its configs, which is nowhere deep, can be amiss: seen in its JSON, in a tenth of a walk's time."""
    try:
        text = spec.model_dump_json(exclude=CONFIGS)
    except PydanticSerializationError:
        return False
    return "\\u" not in text and text.count("/") <= MAX_PATH_DEPTH


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
