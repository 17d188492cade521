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


def evaluate_zero_shot(evaluator: Evaluator, dataset: ClassificationSet, name: str) -> EvaluationResult:
    """Accuracy at 1 and 5 and mean per-class recall of one set."""
    num_classes = len(dataset.classnames)
    embeddings = class_embeddings(evaluator, dataset.classnames, dataset.templates)
    ranks: list[Tensor] = []
    targets: list[int] = []
    for features, labels in evaluator.image_features(dataset.images, name):
        relevant = F.one_hot(torch.tensor(labels, device=features.device), num_classes).bool()
        ranks.append(relevant_ranks(features @ embeddings.T, relevant).cpu())
        targets += labels
    all_ranks = torch.cat(ranks)
    metrics = {f"zero_shot_top{k}": hit_rate(all_ranks, k) for k in KS}
    chance = {f"zero_shot_top{k}": chance_hit_rate([1], num_classes, k) for k in KS}
    metrics["zero_shot_mean_per_class_recall"] = mean_per_class_recall(all_ranks, torch.tensor(targets))
    chance["zero_shot_mean_per_class_recall"] = 1 / num_classes
    return EvaluationResult("zero_shot", name, len(targets), metrics, chance)


def class_embeddings(evaluator: Evaluator, classnames: list[str], templates: list[str]) -> Tensor:
    """(C, D): per class the mean over templates of the normalised text features, normalised again."""
    prompts = [template.replace(PLACEHOLDER, classname) for classname in classnames for template in templates]
    features = evaluator.text_features(prompts)
    return F.normalize(features.view(len(classnames), len(templates), -1).mean(dim=1), dim=-1)
