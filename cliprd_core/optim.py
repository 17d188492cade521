"""The optimiser and its learning rate: AdamW's parameter groups and the schedule as a pure function of the step."""

from __future__ import annotations

import math

import torch
from torch import nn

from cliprd_core.training_spec import Schedule, TrainingSpec


def build_optimizer(module: nn.Module, training: TrainingSpec) -> torch.optim.AdamW:
    """AdamW over the trainable parameters of `module`, set up as in CLIP-RD (arXiv 2603.25383, section 4).

    Weight decay applies to matrices only (two dimensions or more): gains, biases, class tokens, logit scales and the objective's
    scales have fewer. The fused kernel is used, which exists for CPU and CUDA.
    """
    trainable = [parameter for parameter in module.parameters() if parameter.requires_grad]
    groups = [
        {"params": [parameter for parameter in trainable if parameter.ndim >= 2], "weight_decay": training.weight_decay},
        {"params": [parameter for parameter in trainable if parameter.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]], lr=training.learning_rate, betas=training.betas, eps=training.eps, fused=True
    )


def check_schedule(training: TrainingSpec, num_steps: int) -> None:
    """Refuse a warm-up that never ends.

    Raises:
        ValueError: `training.warmup_steps` is not below the `num_steps` of the whole run.
    """
    if training.warmup_steps >= num_steps:
        raise ValueError(
            f"`training.warmup_steps` ({training.warmup_steps}) must be less than the run's {num_steps} steps (`training.epochs` times the"
            f" pairs over `training.global_batch_size`); lower it (about {num_steps // 20} would do) or train longer"
        )


def lr_at(step: int, training: TrainingSpec, num_steps: int) -> float:
    """Learning rate of the update after `step` updates (so the first is `lr_at(0, …)`, the last `lr_at(num_steps - 1, …)`).

    Warm-up: learning_rate · (step + 1) / warmup_steps, so that no update is wasted at 0. Then, with the fraction
    f = (step − warmup_steps) / (num_steps − warmup_steps) of what is left: learning_rate · ½(1 + cos πf), or constant.
    These are the curves of open_clip's trainer, with which the paper's numbers were made.
    """
    assert 0 <= step < num_steps
    if step < training.warmup_steps:
        return training.learning_rate * (step + 1) / training.warmup_steps
    if training.schedule is Schedule.CONSTANT:
        return training.learning_rate
    fraction = (step - training.warmup_steps) / (num_steps - training.warmup_steps)
    return training.learning_rate * 0.5 * (1.0 + math.cos(math.pi * fraction))


def set_learning_rate(optimizer: torch.optim.Optimizer, learning_rate: float) -> None:
    """Set the learning rate of every group."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate
