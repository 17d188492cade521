"""The maths of zero-shot classification and retrieval, on matrices of scores. Pure functions that know no model and no file.

Everything rests on one number per query: the rank of its best relevant candidate, that is how many other candidates precede it.
A tie, or a score that is not a number, counts as preceding, so that a model gains nothing by giving everything the same score.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def relevant_ranks(scores: Tensor, relevant: Tensor) -> Tensor:
    """Rank (Q,) of each query's best relevant candidate; 0 is first.

    Args:
        scores: (Q, N), higher is better.
        relevant: (Q, N) bool, at least one per row. Where a query has several relevant candidates any of them counts, so the others
            never stand in the way.
    """
    assert scores.shape == relevant.shape, (scores.shape, relevant.shape)
    assert bool(relevant.any(dim=1).all()), "every query needs a relevant candidate"
    best = scores.masked_fill(~relevant, -torch.inf).amax(dim=1, keepdim=True)  # a NaN among the relevant ones stays NaN
    return (~(scores < best) & ~relevant).sum(dim=1)


def hit_rate(ranks: Tensor, k: int) -> float:
    """Fraction of queries whose rank is below k: accuracy at k, or recall@k where any relevant candidate counts."""
    return float((ranks < k).double().mean())


def mean_per_class_recall(ranks: Tensor, targets: Tensor) -> float:
    """Mean over the classes that occur in `targets` (Q,) of the fraction of the class's images that are classified rightly."""
    hits = (ranks == 0).double()
    counts = torch.bincount(targets)
    per_class = torch.bincount(targets, weights=hits)
    present = counts > 0
    return float((per_class[present] / counts[present]).mean())


def chance_hit_rate(num_relevant: Sequence[int], num_candidates: int, k: int) -> float:
    """What `hit_rate` is expected to be when the candidates are in random order.

    A query with r relevant among n candidates misses with probability C(n - r, k) / C(n, k).

    Args:
        num_relevant: r of each query.
        num_candidates: n.
    """
    k = min(k, num_candidates)
    total = math.comb(num_candidates, k)
    hit_by_count = {count: (total - math.comb(num_candidates - count, k)) / total for count in set(num_relevant)}
    return math.fsum(hit_by_count[count] for count in num_relevant) / len(num_relevant)
