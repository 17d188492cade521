"""`training` of the job spec: optimisation, precision, checkpoints, data workers. Imports pydantic only, as `spec` does."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, Self

from pydantic import Field, StrictBool, StrictFloat, StrictInt, model_validator

from cliprd_core.retention import CheckpointsToKeep
from cliprd_core.spec_model import MAX_COUNT, SpecModel


class Schedule(StrEnum):
    """Learning rate after the warm-up."""

    COSINE = "cosine"
    """Half a cosine from `learning_rate` to 0 at the last step."""
    CONSTANT = "constant"
    """`learning_rate` to the end."""


class Precision(StrEnum):
    """Arithmetic of the forward and backward passes; master weights and the losses' softmaxes are always fp32."""

    BF16 = "bf16"
    """On a CPU without instructions for it, computed in fp32."""
    FP16 = "fp16"
    """With a gradient scaler; CUDA only."""
    FP32 = "fp32"


class TrainingSpec(SpecModel):
    """Optimisation: AdamW with linear warm-up."""

    epochs: StrictInt = Field(default=32, ge=1, le=10_000, description="Passes over the training pairs.")
    global_batch_size: StrictInt = Field(
        default=1024, ge=2, le=1_048_576, description="Pairs of one step over all processes; also the number of negatives."
    )
    micro_batch_size: StrictInt | None = Field(
        default=None,
        ge=1,
        le=1_048_576,
        description="At most so many pairs per process in one forward and backward pass: less memory and more time, with all negatives of"
        " `global_batch_size`. Need not divide it. Null: the whole batch at once.",
    )
    learning_rate: StrictFloat = Field(default=1e-3, gt=0, le=1, description="Peak learning rate.")
    weight_decay: StrictFloat = Field(default=0.1, ge=0, le=10, description="Decoupled; none on gains, biases, 1-d parameters and scales.")
    betas: tuple[Annotated[StrictFloat, Field(ge=0, lt=1)], Annotated[StrictFloat, Field(ge=0, lt=1)]] = Field(default=(0.9, 0.98))
    eps: StrictFloat = Field(default=1e-6, gt=0, le=1)
    warmup_steps: StrictInt = Field(default=10_000, ge=0, le=MAX_COUNT, description="Steps of linear warm-up from 0 to `learning_rate`.")
    schedule: Schedule = Schedule.COSINE
    grad_clip_norm: StrictFloat | None = Field(
        default=None, gt=0, description="Clip the gradient's global L2 norm to this. Null: no clipping."
    )
    precision: Precision = Precision.BF16
    compile: StrictBool = Field(
        default=False,
        description="Whether the student goes through torch.compile: a minute or more at the start of each attempt, then faster steps.",
    )
    seed: StrictInt = Field(default=0, ge=0, le=2**31 - 1, description="Determines initial weights, order and crops.")
    checkpoint_every_steps: StrictInt = Field(
        default=1000, ge=1, le=MAX_COUNT, description="Steps between checkpoints; one more is saved when the run stops."
    )
    keep_checkpoints: CheckpointsToKeep = CheckpointsToKeep()
    log_every_steps: StrictInt = Field(
        default=10,
        ge=1,
        le=MAX_COUNT,
        description="Steps between metric records. An attempt's first step, and every step that is saved, have one as well.",
    )
    num_data_workers: StrictInt = Field(
        default=2, ge=0, le=256, description="Data-loading processes per training process; 0 loads in the training process."
    )

    @model_validator(mode="after")
    def _kept_are_saved(self) -> Self:
        every = self.keep_checkpoints.every_steps
        if every is not None and every % self.checkpoint_every_steps:
            raise ValueError(
                f"`keep_checkpoints.every_steps` ({every}) must be a multiple of `checkpoint_every_steps` ({self.checkpoint_every_steps}),"
                " or there is nothing to keep at some of them; change one of the two"
            )
        return self
