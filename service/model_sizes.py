"""The sizes of the models that a spec names."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from cliprd_core.locations import ForbiddenLocationError, Locations
from cliprd_core.model_size import ModelSize, UnknownSizeError, size_of_config, size_of_known_model
from cliprd_core.spec import StudentSpec, TeacherSpec, check_model_config
from service.model_config_check import model_config_problems
from service.model_names import LOCAL_DIR_PREFIX

MAX_CONFIG_BYTES = 1_000_000


@dataclass(frozen=True)
class Unknown:
    """A size that can't be told."""

    reason: str


def size_of_model(spec: StudentSpec | TeacherSpec, locations: Locations | None) -> ModelSize | Unknown:
    """The size of the model that a resolved spec names by name, config or folder.

    `locations`: from where its config may be read; None: no file is looked at.
    """
    try:
        if spec.config is not None:
            return size_of_config(spec.config)
        assert spec.model is not None, "a teacher that is a job's result comes as that job's student"
        if spec.model.startswith(LOCAL_DIR_PREFIX):
            return size_of_config(_config_in(Path(spec.model.removeprefix(LOCAL_DIR_PREFIX)), locations))
        return size_of_known_model(spec.model)
    except UnknownSizeError as error:
        return Unknown(str(error))
    except OverflowError:
        return Unknown("its config has numbers that no model can have")


def size_of_trained(student: dict[str, Any], locations: Locations | None) -> ModelSize | Unknown:
    """The size of what a job trains, or trained, by its stored `student`."""
    try:
        return size_of_model(StudentSpec.model_validate(student), locations)
    except ValidationError:
        return Unknown("the job that trained it was submitted to another version")


def _config_in(folder: Path, locations: Locations | None) -> dict[str, Any]:
    """The model config of a `local-dir:` folder, checked as one in a spec is."""
    if locations is None:
        raise UnknownSizeError("this service doesn't see the workers' files")
    file = folder / "open_clip_config.json"
    try:
        locations.check_path(file)
        with file.open("rb") as opened:
            config: dict[str, Any] = json.loads(opened.read(MAX_CONFIG_BYTES))["model_cfg"]
        check_model_config(config)
        problems = model_config_problems("model_cfg", config)
    except (ForbiddenLocationError, OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UnknownSizeError("its open_clip_config.json can't be read") from error
    if problems:
        raise UnknownSizeError(f"its open_clip_config.json has a fault: `{problems[0].field}` {problems[0].problem}")
    return config
