"""The blocked objective's memory: linear in the batch, and what a batch of 32,768 is to take."""

from __future__ import annotations

import torch

from cliprd_core.objective_spec import ObjectiveSpec
from tests.unit.peak_bytes import PeakBytes
from tests.unit.test_objective import PAPER, TERMS, dense_terms, make_features, make_objective


def peak_bytes(num_pairs: int, *, is_dense: bool, weights: ObjectiveSpec = PAPER) -> int:
    features = make_features(num_pairs, 8, 8)
    objective = make_objective(weights, 8, 8, max_block_elements=2**13)
    scale = torch.tensor(10.0, dtype=torch.float64)
    with PeakBytes() as measured:
        if is_dense:
            terms = dense_terms(objective, features, scale)
            loss = sum((terms[name] for name in terms if name in TERMS), torch.zeros(()))
        else:
            loss = objective(**features, student_logit_scale=scale).loss
        loss.backward()
    return measured.peak


def test_peak_memory_is_linear() -> None:
    small, large = (peak_bytes(num_pairs, is_dense=False) for num_pairs in (300, 600))
    assert large < 2.2 * small
    assert large < 600 * 600 * 8 / 2, "not even half of one similarity matrix"
    dense_small, dense_large = (peak_bytes(num_pairs, is_dense=True) for num_pairs in (300, 600))
    assert dense_large > 3.5 * dense_small, "the measure sees quadratic growth where there is some"


def test_peak_memory_is_linear_with_every_term() -> None:
    weights = ObjectiveSpec(**dict.fromkeys(TERMS, 1.0))
    small, large = (peak_bytes(num_pairs, is_dense=False, weights=weights) for num_pairs in (300, 600))
    assert large < 2.2 * small
    assert large < 600 * 600 * 8 / 2, "not even half of one similarity matrix"
