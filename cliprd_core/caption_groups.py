"""Which captions of a batch go through the text tower together, and cut to how many tokens.

Captions are short and the context is long, so most of a text tower's work is padding. One long caption in a batch is enough to make
cutting all to the longest useless; so a batch goes through in a few groups of similar length. How many is a trade between padding and
what each further group costs, and is solved exactly. Nothing here knows of models or devices.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class CaptionGroup:
    """Captions that go through the tower together."""

    rows: NDArray[np.int64]  # (b,) their places in the batch
    length: int  # tokens that each is cut, or padded, to


def plan_groups(lengths: NDArray[np.int64], context_length: int, *, group_cost: int, multiple: int = 1) -> list[CaptionGroup]:
    """The groups of least cost, where a group costs its captions times its length, in tokens, and `group_cost`.

    An optimal group is a run of the captions in order of length, so this is the shortest path over the distinct lengths, at most
    `context_length` of them (dynamic programming, quadratic in their number).

    Args:
        lengths: (B,) tokens that each caption needs, from 1 to `context_length`; at least one caption.
        context_length: tokens; no group is longer.
        group_cost: what a further group costs beside its tokens, in tokens.
        multiple: a group's length is a multiple of this, or `context_length`.
    """
    assert len(lengths) > 0
    assert 1 <= lengths.min() <= lengths.max() <= context_length, (lengths, context_length)
    order = np.argsort(lengths, kind="stable")
    rounded = np.minimum(-(-lengths // multiple) * multiple, context_length)
    distinct, counts = np.unique(rounded, return_counts=True)
    ends = np.concatenate([[0], np.cumsum(counts)])  # ends[k]: captions of the first k distinct lengths
    costs = np.zeros(len(ends), dtype=np.int64)  # of the best plan for these
    previous = np.zeros(len(ends), dtype=np.int64)  # where its last group begins
    for k in range(1, len(ends)):
        candidates = costs[:k] + group_cost + distinct[k - 1] * (ends[k] - ends[:k])
        previous[k] = candidates.argmin()
        costs[k] = candidates[previous[k]]
    groups: list[CaptionGroup] = []
    k = len(distinct)
    while k > 0:
        groups.append(CaptionGroup(order[ends[previous[k]] : ends[k]], int(distinct[k - 1])))
        k = int(previous[k])
    return groups[::-1]
