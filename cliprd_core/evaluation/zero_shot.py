"""Zero-shot classification (arXiv 2103.00020, section 3.1): an image belongs to the class whose prompts it is most similar to."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from cliprd_core.evaluation.datasets import PLACEHOLDER, ClassificationSet
from cliprd_core.evaluation.features import Evaluator
from cliprd_core.evaluation.metrics import chance_hit_rate, hit_rate, mean_per_class_recall, relevant_ranks
from cliprd_core.evaluation.result import EvaluationResult

KS = (1, 5)
BLOCK_SIZE = 1024
"""Images scored at once."""


def evaluate_zero_shot(evaluator: Evaluator, dataset: ClassificationSet, name: str) -> EvaluationResult | None:
    """Accuracy at 1 and 5 and mean per-class recall of one set, on the main process; None on the others."""
    num_classes = len(dataset.classnames)
    embeddings = class_embeddings(evaluator, dataset.classnames, dataset.templates)
    images = evaluator.image_features(dataset.images, name)
    if embeddings is None or images is None:
        return None
    features, labels = images
    targets = torch.tensor(labels)
    blocks = zip(torch.split(features, BLOCK_SIZE), torch.split(targets.to(features.device), BLOCK_SIZE), strict=True)
    all_ranks = torch.cat([relevant_ranks(block @ embeddings.T, F.one_hot(own, num_classes).bool()).cpu() for block, own in blocks])
    metrics = {f"zero_shot_top{k}": hit_rate(all_ranks, k) for k in KS}
    chance = {f"zero_shot_top{k}": chance_hit_rate([1], num_classes, k) for k in KS}
    metrics["zero_shot_mean_per_class_recall"] = mean_per_class_recall(all_ranks, targets)
    chance["zero_shot_mean_per_class_recall"] = 1 / num_classes
    return EvaluationResult("zero_shot", name, len(targets), metrics, chance)


def class_embeddings(evaluator: Evaluator, classnames: list[str], templates: list[str]) -> Tensor | None:
    """(C, D): per class the mean over templates of the normalised text features, normalised again. None but on the main process."""
    prompts = [template.replace(PLACEHOLDER, classname) for classname in classnames for template in templates]
    features = evaluator.text_features(prompts)
    if features is None:
        return None
    return F.normalize(features.view(len(classnames), len(templates), -1).mean(dim=1), dim=-1)
