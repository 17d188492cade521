"""Image-text retrieval: recall@k from images to texts and back.

With several captions an image there are two protocols. The usual one (COCO, Flickr30k) has all captions as candidates: an image
hits if any caption of its own is among the first k, and each caption searches its image. In the one-caption protocol only the
first caption of each image takes part, so that both directions are equally hard.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from cliprd_core.evaluation.datasets import ImageSet
from cliprd_core.evaluation.features import Evaluator
from cliprd_core.evaluation.metrics import chance_hit_rate, hit_rate, relevant_ranks
from cliprd_core.evaluation.result import EvaluationResult

KS = (1, 5, 10)
BLOCK_SIZE = 1024
"""Queries scored at once, so that the whole matrix of scores never exists."""

ONE_CAPTION_PREFIX = "one_caption_"


def evaluate_retrieval(
    evaluator: Evaluator, images: ImageSet[list[str]], name: str, task: Literal["retrieval", "validation"] = "retrieval"
) -> EvaluationResult | None:
    """Recall@1, 5 and 10 in both directions; for task `retrieval` also by the one-caption protocol. None but on the main process."""
    found = evaluator.image_features(images, name)
    captions = evaluator.group.broadcast(None if found is None else found[1])
    text_features = evaluator.text_features([caption for one in captions or [] for caption in one])
    if found is None or captions is None or text_features is None:
        return None
    image_features = found[0]
    counts = torch.tensor([len(one) for one in captions], device=image_features.device)
    owners = torch.arange(len(captions), device=image_features.device).repeat_interleave(counts)
    metrics = recall_metrics(image_features, text_features, owners)
    chance = chance_metrics(counts.tolist())
    if task == "retrieval":
        first = counts.cumsum(0) - counts
        one_caption = recall_metrics(image_features, text_features[first], owners[first])
        metrics |= {ONE_CAPTION_PREFIX + key: value for key, value in one_caption.items()}
        chance |= {ONE_CAPTION_PREFIX + key: value for key, value in chance_metrics([1] * len(captions)).items()}
    return EvaluationResult(task, name, len(captions), metrics, chance)


def recall_metrics(image_features: Tensor, text_features: Tensor, owners: Tensor) -> dict[str, float]:
    """Recall@k both ways.

    Args:
        image_features: (N, D), normalised.
        text_features: (M, D), normalised.
        owners: (M,) the image that each text belongs to; every image has one or more.
    """
    images = torch.arange(len(image_features), device=owners.device)
    image_ranks = _ranks(image_features, text_features, images, owners)
    text_ranks = _ranks(text_features, image_features, owners, images)
    return {f"image_to_text_R@{k}": hit_rate(image_ranks, k) for k in KS} | {f"text_to_image_R@{k}": hit_rate(text_ranks, k) for k in KS}


def chance_metrics(num_captions: Sequence[int]) -> dict[str, float]:
    """What `recall_metrics` is expected to be when candidates are in random order; `num_captions` is per image."""
    num_images, num_texts = len(num_captions), sum(num_captions)
    to_text = {f"image_to_text_R@{k}": chance_hit_rate(num_captions, num_texts, k) for k in KS}
    return to_text | {f"text_to_image_R@{k}": chance_hit_rate([1], num_images, k) for k in KS}


def _ranks(queries: Tensor, candidates: Tensor, query_owners: Tensor, candidate_owners: Tensor) -> Tensor:
    """Ranks (Q,) of each query's best candidate with the same owner."""
    blocks = [
        relevant_ranks(block @ candidates.T, block_owners[:, None] == candidate_owners[None, :])
        for block, block_owners in zip(torch.split(queries, BLOCK_SIZE), torch.split(query_owners, BLOCK_SIZE), strict=True)
    ]
    return torch.cat(blocks).cpu()
