"""Which files the paths of a checked spec stand for, and how large they are."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

from cliprd_core.spec import CsvSource, DataSource, JobSpec, StudentSpec, TeacherSpec
from service import data_files
from service.dry_run_schemas import FoundFilesView
from service.file_walk import FileWalk
from service.model_names import LOCAL_DIR_PREFIX


def found_files(walk: FileWalk, spec: JobSpec) -> list[FoundFilesView]:
    """One entry for each field of a resolved and checked spec that names files.

    Raises:
        TooMuchToWalkError: it leads to more looks than a spec may.
    """
    return list(_of_spec(walk, spec))


def _of_spec(walk: FileWalk, spec: JobSpec) -> Iterator[FoundFilesView]:
    yield from _of_model("student", spec.student)
    for field, teacher in spec.teacher_fields.items():
        yield from _of_model(field, teacher)
    for name in ("train", "validation"):
        for index, source in enumerate(getattr(spec.data, name)):
            yield from _of_source(walk, f"data.{name}.{index}", source)
    for name in ("zero_shot", "retrieval"):
        for index, one in enumerate(getattr(spec.evaluation, name)):
            tars = [entry.path for entry in walk.entries(f"{one.path}/{one.split}") if entry.name.endswith(".tar")]
            yield from _of_files(f"evaluation.{name}.{index}.path", map(Path, sorted(tars)))


def _of_model(field: str, model: StudentSpec | TeacherSpec) -> Iterator[FoundFilesView]:
    if model.model is not None and model.model.startswith(LOCAL_DIR_PREFIX):
        yield from _of_files(f"{field}.model", map(Path, data_files.local_dir_files(model.model.removeprefix(LOCAL_DIR_PREFIX))))
    if model.pretrained is not None and Path(model.pretrained).is_absolute():  # resolved: a tag is none
        yield from _of_files(f"{field}.pretrained", [Path(model.pretrained)])


def _of_source(walk: FileWalk, field: str, source: DataSource) -> Iterator[FoundFilesView]:
    if isinstance(source, CsvSource):
        yield from _of_files(f"{field}.path", [Path(source.path)])
    elif source.is_remote:
        urls = list(data_files.expand_remote(source.shards))
        yield FoundFilesView(field=f"{field}.shards", num_files=len(urls), num_bytes=None, first=urls[0])
    else:
        yield from _of_files(f"{field}.shards", data_files.expand_shards(walk, source.shards))


def _of_files(field: str, files: Iterable[Path]) -> Iterator[FoundFilesView]:
    there = [file for file in files if data_files.is_file(file)]
    if there:
        num_bytes = sum(file.stat().st_size for file in there)
        yield FoundFilesView(field=field, num_files=len(there), num_bytes=num_bytes, first=str(there[0]))
