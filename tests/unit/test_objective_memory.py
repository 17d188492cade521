"""The blocked objective's memory: linear in the batch, and what a batch of 32,768 is to take."""

from __future__ import annotations

import pytest
import torch

from cliprd_core.objective import Objective
from cliprd_core.objective_spec import BLOCK_ELEMENTS, ObjectiveSpec, default_block_elements
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


def peak_of_paper_terms(num_pairs: int, width: int, max_block_elements: int) -> int:
    """Bytes beside the inputs, in float32."""
    generator = torch.Generator().manual_seed(0)
    image, text, teacher_image, teacher_text = (torch.randn(num_pairs, width, generator=generator) for _ in range(4))
    objective = Objective(PAPER, student_width=width, teacher_width=width, teacher_logit_scale=100.0, max_block_elements=max_block_elements)
    with PeakBytes() as measured:
        objective(
            student_image_features=image.requires_grad_(),
            student_text_features=text.requires_grad_(),
            student_logit_scale=torch.tensor(14.0),
            teacher_image_features=teacher_image,
            teacher_text_features=teacher_text,
        ).loss.backward()
    return measured.peak


def test_a_batch_of_32_768_takes_less_than_half_a_gigabyte() -> None:
    """CLIP-RD's terms at a width of 512, extrapolated from two smaller batches in blocks of the same size."""
    small, large = (peak_of_paper_terms(num_pairs, 512, BLOCK_ELEMENTS) for num_pairs in (2048, 3072))
    at_32768 = small + (large - small) / (3072 - 2048) * (32768 - 2048)
    assert 0.4e9 < at_32768 < 0.5e9


def test_a_gpu_s_larger_blocks_take_no_more_than_a_batch_of_32_768() -> None:
    """Memory is eight blocks and six numbers a pair and feature, or twelve blocks where all rows are one block."""

    def num_bytes(batch_size: int) -> int:
        block = default_block_elements(batch_size, on_gpu=True)
        is_one_block = batch_size**2 <= block
        return 4 * ((12 * batch_size**2 if is_one_block else 8 * block) + 6 * 512 * batch_size)

    sizes = {size: default_block_elements(size, on_gpu=True) for size in (256, 4096, 8192, 16384, 32768, 2**20)}
    assert sizes == {256: 2**23, 4096: 2**23, 8192: 2**23, 16384: 2**22, 32768: 2**21, 2**20: 2**21}
    assert all(num_bytes(batch_size) <= num_bytes(32768) for batch_size in range(2, 32768, 7))
    for num_pairs in (128, 300):  # one block, and several
        width, block = 64, 2**16
        blocks = 12 * num_pairs**2 if num_pairs**2 <= block else 8 * block
        assert peak_of_paper_terms(num_pairs, width, block) / 4 == pytest.approx(blocks + 6 * width * num_pairs, rel=0.05)
    assert {default_block_elements(size, on_gpu=False) for size in sizes} == {2**21}
