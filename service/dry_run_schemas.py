"""What a dry run answers: the job that a spec would become, and what it would take."""

from __future__ import annotations

from pydantic import Field

from service.schemas import StoredSpec, View
from service.store.states import JobState


class ModelSizeView(View):
    """A model's parameters. All numbers are null where the size can't be told, and `reason` says why."""

    field: str = Field(description="Where the spec names it.", examples=["student", "teachers.1"])
    image_parameters: int | None
    text_parameters: int | None
    other_parameters: int | None = Field(description="Of neither tower: scales, biases, a captioning decoder.")
    total_parameters: int | None
    reason: str | None = Field(description="Why its size is not known.")


class MemoryView(View):
    """An estimate of device memory, in bytes of each training process. All numbers are null where it can't be made."""

    weights_bytes: int | None = Field(description="Student, teachers and what the objective learns, in fp32; autocast's copies.")
    gradients_bytes: int | None
    optimizer_bytes: int | None = Field(description="AdamW's two moments.")
    activations_bytes: int | None = Field(description="Of the pairs that go through a model at once, with their images.")
    objective_bytes: int | None = Field(description="Features, their gradients, blocks of similarities.")
    total_bytes: int | None
    least_bytes: int | None = Field(
        description="What is surely needed: student and moments, with gradients or the images' saved activations."
    )
    assumptions: list[str] = Field(description="What the estimate takes for granted.")
    reason: str | None = Field(description="Why there is none.")


class SpeedView(View):
    """How fast jobs like this one trained on one kind of device, as they recorded it."""

    device: str = Field(description="`cpu`, or the GPU's name.")
    samples_per_second: float = Field(description="Pairs a second over all processes: the median job's.")
    slowest_samples_per_second: float
    fastest_samples_per_second: float
    training_seconds: float | None = Field(description="All steps at `samples_per_second`. Null: the number of steps is unknown.")
    job_ids: list[str] = Field(description="The jobs that recorded it.")


class TimeView(View):
    """An estimate of the training time, from recorded speeds alone."""

    by_device: list[SpeedView] = Field(description="One for each kind of device that such jobs ran on. Empty: none has recorded a speed.")
    assumptions: list[str] = Field(description="What the estimate takes for granted.")
    reason: str | None = Field(description="Why there is none, or no time.")


class FoundFilesView(View):
    """The files that one field of a spec stands for."""

    field: str
    num_files: int
    num_bytes: int | None = Field(description="Of all of them. Null: they are remote.")
    first: str = Field(description="The first of them.")


class DryRunView(View):
    """What a spec would become as a job, and what it would take. No job was made."""

    state_if_submitted: JobState = Field(
        description="What the job would be at first: `queued`, or `waiting` for a teacher that is a job under way."
    )
    spec: StoredSpec = Field(description="As it would run: recipe applied, paths absolute.")
    num_pairs: int | None = Field(description="Training pairs, unreadable ones among them. Null: unknown without much reading.")
    num_steps: int | None = Field(description="Optimiser updates of the whole run. Null: unknown.")
    teacher_job_ids: list[str] = Field(description="The jobs whose results are teachers.")
    models: list[ModelSizeView] = Field(description="The student, then the teachers.")
    memory: MemoryView
    time: TimeView
    warnings: list[str] = Field(description="What will keep the job from running as things stand, with what to do. It can be submitted.")
    files: list[FoundFilesView] | None = Field(description="What the spec's paths stand for. Null: this service doesn't see the files.")
