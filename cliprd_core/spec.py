"""The job spec: everything a distillation run needs to know, typed, frozen and validated.

This module is one of the project's three contracts. It imports pydantic only, because the API and the worker read specs too and
neither may load torch. Every field states its unit and its default here, those of its larger parts in `objective_spec`,
`training_spec` and `evaluation_spec`, and nowhere else. A recipe (``recipes/*.json``) holds only what it changes against these defaults,
which are the CLIP-RD paper's (arXiv 2603.25383, section 4).
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from enum import StrEnum
from functools import cache
from importlib.resources import files
from typing import Annotated, Any, Literal, Self

from pydantic import Field, StrictFloat, StrictInt, field_validator, model_validator

from cliprd_core.evaluation_spec import EvaluationSpec
from cliprd_core.objective_spec import ObjectiveSpec
from cliprd_core.retention import RETRIEVAL_METRICS, ZERO_SHOT_METRICS
from cliprd_core.spec_model import MAX_COUNT, MAX_LIST_LENGTH, Fraction, Path, SpecModel
from cliprd_core.training_spec import Precision, TrainingSpec

JOB_ID_PATTERN = r"^[0-9a-z-]{8,64}$"
JobId = Annotated[str, Field(pattern=JOB_ID_PATTERN)]

NAMED_ELSEWHERE = (("vision_cfg", "timm_model_name"), ("text_cfg", "hf_model_name"), ("text_cfg", "hf_tokenizer_name"))
"""Keys of model configs that timm and Hugging Face's libraries look up, and which those also take as folders of the machine."""

PLAIN_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")

LabelName = Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]{1,64}$")]
LabelValue = Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]{0,128}$")]

MAX_TEACHERS = 8


class Recipe(StrEnum):
    """Named sets of defaults."""

    CLIP = "clip"
    """Plain contrastive training, no teacher (arXiv 2103.00020)."""
    CLIP_KD = "clip_kd"
    """CLIP-KD's best combination: feature, interactive-contrastive and relational (HRD) distillation (arXiv 2307.12732)."""
    CLIP_RD = "clip_rd"
    """CLIP-KD plus vertical and cross relational distillation (arXiv 2603.25383)."""


class StudentSpec(SpecModel):
    """The model to train: an open_clip model name, or an open_clip config object."""

    model: str | None = Field(
        default=None,
        min_length=1,
        max_length=512,
        description="open_clip model name (`ViT-T-16`, `RN50`, …) or `local-dir:PATH`.",
        examples=["ViT-T-16"],
    )
    config: dict[str, Any] | None = Field(default=None, description="open_clip model config: `embed_dim`, `vision_cfg`, `text_cfg`.")
    pretrained: str | None = Field(
        default=None, max_length=4096, description="open_clip tag or checkpoint file to start from. Null: random weights."
    )

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if (self.model is None) == (self.config is None):
            what = "names no model" if self.model is None else "names a model twice"
            raise ValueError(f"{what}; give exactly one of `model` (an open_clip name) and `config` (an open_clip config object)")
        if self.config is not None:
            check_model_config(self.config)
        return self


class TeacherSpec(SpecModel):
    """The frozen model to learn from: by name and weights, by config and weights, or an earlier result of this service."""

    model: str | None = Field(
        default=None,
        min_length=1,
        max_length=512,
        description="open_clip model name, or `local-dir:PATH` (then no `pretrained`).",
        examples=["ViT-B-16"],
    )
    config: dict[str, Any] | None = Field(default=None, description="open_clip model config object; needs `pretrained`.")
    pretrained: str | None = Field(
        default=None, max_length=4096, description="open_clip tag or checkpoint file.", examples=["laion400m_e32"]
    )
    job: JobId | None = Field(default=None, description="Id of a job of this service whose exported model is the teacher.")
    artifact: JobId | None = Field(default=None, description="Id of a `model` artifact of this service.")

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        given = [name for name in ("model", "config", "job", "artifact") if getattr(self, name) is not None]
        if len(given) != 1:
            what = f"is given by {' and '.join(f'`{name}`' for name in given)} at once" if given else "names no model"
            raise ValueError(f"{what}; give exactly one of `model`, `config`, `job` and `artifact`")
        is_local_dir = self.model is not None and self.model.startswith("local-dir:")
        carries_weights = given[0] in ("job", "artifact") or is_local_dir
        if carries_weights and self.pretrained is not None:
            raise ValueError(f"`{given[0]}` carries its weights already; remove `pretrained`")
        if not carries_weights and self.pretrained is None:
            raise ValueError("a teacher needs trained weights: set `pretrained` to an open_clip tag or a checkpoint file")
        if self.config is not None:
            check_model_config(self.config)
        return self


REMOTE_SCHEMES = ("s3://", "http://", "https://")
"""Where shards are read from beside the local disk."""


class WebDatasetSource(SpecModel):
    """Tar shards holding `KEY.png|jpg|jpeg|webp` and `KEY.txt` of each pair, as `webdataset` and img2dataset write them."""

    type: Literal["webdataset"]
    shards: Path = Field(
        description="Shards: a path, `s3://…`, `http://…` or `https://…`, with brace ranges (`{00000..00007}.tar`); globs, not on HTTP.",
        examples=["examples/emoji/train/{00000..00007}.tar"],
    )
    num_samples: StrictInt | None = Field(default=None, ge=1, le=MAX_COUNT, description="Use only the first this many pairs. Null: all.")

    @property
    def is_remote(self) -> bool:
        return self.shards.startswith(REMOTE_SCHEMES)


class CsvSource(SpecModel):
    """A table of image paths and captions; the defaults read CLIP-KD's and open_clip's CSV files unchanged."""

    type: Literal["csv"]
    path: Path = Field(description="Path of the table, with a header line.")
    image_column: str = Field(default="filepath", min_length=1, max_length=256)
    caption_column: str = Field(default="title", min_length=1, max_length=256)
    separator: str = Field(default="\t", min_length=1, max_length=1, description="One character. The default, a tab, is CLIP-KD's.")
    image_root: str | None = Field(
        default=None, max_length=4096, description="Folder that relative image paths start from. Null: the table's own folder."
    )
    num_samples: StrictInt | None = Field(default=None, ge=1, le=MAX_COUNT, description="Use only the first this many pairs. Null: all.")


DataSource = Annotated[WebDatasetSource | CsvSource, Field(discriminator="type")]


class DataSpec(SpecModel):
    """Where the pairs come from and how images are augmented."""

    train: list[DataSource] = Field(min_length=1, max_length=MAX_LIST_LENGTH, description="Training pairs; several sources are joined.")
    validation: list[DataSource] = Field(
        default=[], max_length=MAX_LIST_LENGTH, description="Held-out pairs: the job reports retrieval on them."
    )
    crop_scale: tuple[Fraction, Fraction] = Field(default=(0.9, 1.0), description="RandomResizedCrop's area range, fractions of the image.")
    teacher_views: StrictInt = Field(
        default=2,
        ge=0,
        le=10_000,
        description="Different crops of each image, which epochs take in turn: the teacher sees each once, and its features are kept"
        " for later epochs, jobs and restarts. 0: a new crop every epoch, and the teacher runs in every step, as in the papers.",
    )

    @field_validator("crop_scale")
    @classmethod
    def _ordered(cls, value: tuple[float, float]) -> tuple[float, float]:
        if value[0] > value[1]:
            raise ValueError("the first number (smallest area) must not exceed the second (largest area)")
        return value


class Device(StrEnum):
    """What the training processes run on."""

    AUTO = "auto"
    """CUDA where the worker has it, else the CPU."""
    CPU = "cpu"
    CUDA = "cuda"


class ResourcesSpec(SpecModel):
    """What the job occupies."""

    num_processes: StrictInt = Field(default=1, ge=1, le=64, description="Training processes on the worker's machine; one per GPU.")
    device: Device = Device.AUTO
    queue: str = Field(
        default="default", pattern=r"^[A-Za-z0-9_.-]{1,64}$", description="Workers subscribe to queues; the job waits in this one."
    )
    priority: StrictInt = Field(
        default=0, ge=-100, le=100, description="Of the jobs in a queue, those of the highest number start first, the oldest of them first."
    )
    max_hours: StrictFloat | None = Field(
        default=None,
        gt=0,
        le=1_000_000,
        description="Hours it may run, over all attempts since it was submitted or last retried; then it saves a checkpoint and fails"
        " (`timeout`). Null: no limit.",
    )


class JobSpec(SpecModel):
    """One distillation job."""

    name: str = Field(min_length=1, max_length=128, description="For people; need not be unique.")
    labels: dict[LabelName, LabelValue] = Field(default={}, max_length=64, description="For filtering lists of jobs.")
    recipe: Recipe = Field(default=Recipe.CLIP_RD, description="Gives defaults that any field overrides.")
    teacher: TeacherSpec | None = Field(default=None, description="The one teacher. Null for recipe `clip` and beside `teachers`.")
    teachers: list[TeacherSpec] = Field(
        default=[],
        max_length=MAX_TEACHERS,
        description="Several teachers at once, in place of `teacher`; see `objective.teacher_combination`.",
    )
    student: StudentSpec
    data: DataSpec
    objective: ObjectiveSpec = ObjectiveSpec()
    training: TrainingSpec = TrainingSpec()
    evaluation: EvaluationSpec = EvaluationSpec()
    resources: ResourcesSpec = ResourcesSpec()

    @model_validator(mode="before")
    @classmethod
    def _apply_recipe(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        recipe = value.get("recipe", Recipe.CLIP_RD)
        if recipe not in list(Recipe):
            return value  # the field's own error names the choices
        return merge_over(recipe_defaults(Recipe(recipe)), value)

    @property
    def teacher_fields(self) -> dict[str, TeacherSpec]:
        """All teachers, each by the field that names it: `teacher`, or `teachers.0`, `teachers.1`, …"""
        if self.teacher is not None:
            return {"teacher": self.teacher}
        return {f"teachers.{index}": teacher for index, teacher in enumerate(self.teachers)}

    def with_teachers(self, teachers: Mapping[str, TeacherSpec]) -> Self:
        """The same spec with other teachers in the fields of `teacher_fields`."""
        if self.teacher is not None:
            return self.model_copy(update={"teacher": teachers["teacher"]})
        return self.model_copy(update={"teachers": [teachers[field] for field in self.teacher_fields]})

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.teacher is not None and self.teachers:
            raise ValueError("`teacher` and `teachers` are both set; put all of them into `teachers`, or remove it")
        has_teacher, needs_teacher = bool(self.teacher_fields), self.objective.needs_teacher
        if self.recipe is Recipe.CLIP and has_teacher and not needs_teacher:
            raise ValueError("`teacher` is set, but recipe `clip` trains without one; remove it, or use recipe `clip_kd` or `clip_rd`")
        if needs_teacher and not has_teacher:
            terms = ", ".join(f"`objective.{name}`" for name in self.objective.distillation_terms)
            raise ValueError(f"`teacher` is missing, which {terms} need; set it, or use recipe `clip` with those weights at 0")
        if has_teacher and not needs_teacher:
            raise ValueError("`teacher` would not be used, as every distillation weight in `objective` is 0; remove it or raise a weight")
        if self.training.global_batch_size % self.resources.num_processes:
            raise ValueError(
                f"`training.global_batch_size` ({self.training.global_batch_size}) must be a multiple of"
                f" `resources.num_processes` ({self.resources.num_processes}); change one of the two"
            )
        if self.training.precision is Precision.FP16 and self.resources.device is Device.CPU:
            raise ValueError("`training.precision` fp16 needs a GPU; use bf16 or fp32 with `resources.device` cpu")
        self._check_best_metric()
        return self

    def _check_best_metric(self) -> None:
        best = self.training.keep_checkpoints.best
        measured = [f"{one.name}/{metric}" for one in self.evaluation.zero_shot for metric in ZERO_SHOT_METRICS]
        retrieval = [one.name for one in self.evaluation.retrieval] + (["validation"] if self.data.validation else [])
        measured += [f"{name}/{metric}" for name in retrieval for metric in RETRIEVAL_METRICS]
        if best is not None and best not in measured:
            examples = ", ".join(measured[:4]) or "those of an evaluation, of which there is none"
            raise ValueError(
                f"`training.keep_checkpoints.best` is {best!r}, which this job doesn't measure; use DATASET/METRIC, such as {examples}"
            )


def recipe_defaults(recipe: Recipe) -> dict[str, Any]:
    """The recipe's spec file: what it changes against the field defaults of this module."""
    loaded: dict[str, Any] = json.loads(_recipe_text(recipe))
    return loaded


@cache
def _recipe_text(recipe: Recipe) -> str:
    return files("cliprd_core").joinpath(f"recipes/{recipe.value}.json").read_text()


def merge_over(defaults: dict[str, Any], given: dict[str, Any]) -> dict[str, Any]:
    """`given` over `defaults`, object by object; lists and scalars are replaced whole."""
    merged = dict(defaults)
    for key, value in given.items():
        below = merged.get(key)
        merged[key] = merge_over(below, value) if isinstance(below, dict) and isinstance(value, dict) else value
    return merged


def check_model_config(config: dict[str, Any]) -> None:
    """Refuse what cannot be an open_clip model config, by shape only; open_clip itself checks the rest when it builds it.

    Raises:
        ValueError: naming the missing or malformed key.
    """
    for key, kind in (("embed_dim", int), ("vision_cfg", dict), ("text_cfg", dict)):
        if key not in config:
            raise ValueError(f"the model config lacks `{key}`; it needs `embed_dim`, `vision_cfg` and `text_cfg` as in open_clip's")

        if not isinstance(config[key], kind) or isinstance(config[key], bool):
            raise ValueError(f"`{key}` in the model config must be {'a whole number' if kind is int else 'an object'}")
    if config["embed_dim"] < 1:
        raise ValueError("`embed_dim` in the model config must be at least 1")
    for tower, key in NAMED_ELSEWHERE:
        name = config[tower].get(key)
        if isinstance(name, str) and name and not PLAIN_NAME.fullmatch(name):
            raise ValueError(
                f"`{tower}.{key}` in the model config is {name[:200]!r}; use a plain name, as `NAME` or `OWNER/NAME`, not a path"
            )
