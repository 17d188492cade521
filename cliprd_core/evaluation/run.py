"""Evaluates a model on everything that a job's spec names."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import cast

import torch
from torch import nn

from cliprd_core.control import ControlGroup
from cliprd_core.data.batch import Preprocess, Tokenizer
from cliprd_core.data.sources import PairSource
from cliprd_core.data.transforms import check_preprocess
from cliprd_core.evaluation.datasets import load_classification_set, load_retrieval_set, retrieval_set_of_pairs
from cliprd_core.evaluation.features import ClipModel, Evaluator
from cliprd_core.evaluation.result import EvaluationResult
from cliprd_core.evaluation.retrieval import evaluate_retrieval
from cliprd_core.evaluation.zero_shot import evaluate_zero_shot
from cliprd_core.evaluation_spec import EvaluationSpec
from cliprd_core.training_spec import Precision

VALIDATION = "validation"


def evaluate(
    model: nn.Module,
    *,
    preprocess: Preprocess,
    tokenizer: Tokenizer,
    spec: EvaluationSpec,
    validation: PairSource | None,
    device: torch.device,
    precision: Precision,
    cache_dir: Path | None = None,
    group: ControlGroup | None = None,
) -> list[EvaluationResult]:
    """Zero-shot classification, then retrieval, then retrieval on the held-out pairs, each set in the spec's order.

    With several processes every one must call this: they share the work, and the main one returns the results, the others none.

    Args:
        model: on `device`; has open_clip's `encode_image(x, normalize)` and `encode_text(x, normalize)`. Its mode is put back after.
        validation: held-out pairs, or None.
        precision: of the model's forward passes; features are normalised and compared in fp32.
        cache_dir: folder for the shards' index files; None builds the indices anew.
        group: the processes that share the work. None: this one alone.

    Raises:
        InvalidDataError: a set's files are missing or malformed, or most of its images cannot be read.
        ValueError: the model's preprocessing is of a kind that is not implemented.
    """
    check_preprocess(preprocess)
    with _evaluation_mode(model):
        evaluator = Evaluator(cast(ClipModel, model), preprocess, tokenizer, device, precision, group or ControlGroup())
        results = [evaluate_zero_shot(evaluator, load_classification_set(one, cache_dir), one.name) for one in spec.zero_shot]
        results += [evaluate_retrieval(evaluator, load_retrieval_set(one, cache_dir), one.name) for one in spec.retrieval]
        if validation is not None:
            results.append(evaluate_retrieval(evaluator, retrieval_set_of_pairs(validation), VALIDATION, task="validation"))
    return [result for result in results if result is not None]


def evaluated_sets(spec: EvaluationSpec, *, has_validation: bool) -> set[tuple[str, str]]:
    """Task and name of each result that `evaluate` returns."""
    sets = {("zero_shot", one.name) for one in spec.zero_shot} | {("retrieval", one.name) for one in spec.retrieval}
    return sets | ({("validation", VALIDATION)} if has_validation else set())


def check_evaluation_sets(spec: EvaluationSpec, cache_dir: Path | None = None) -> None:
    """Open every set without evaluating it, so that a missing file shows before the training and not after its first epoch.

    Raises:
        InvalidDataError: a set's files are missing or malformed.
    """
    for one in spec.zero_shot:
        load_classification_set(one, cache_dir)
    for one in spec.retrieval:
        load_retrieval_set(one, cache_dir)


@contextmanager
def _evaluation_mode(model: nn.Module) -> Iterator[None]:
    training = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in training.items():  # module by module: a frozen part may have been in evaluation mode before
            module.training = mode
