"""A store of teacher features in memory, for tests of what uses one."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cliprd_core.losses import unit_rows


class MemoryStore:
    """A `FeatureStore` in float16 that remembers in which order rows were written."""

    dtype = torch.float16

    def __init__(self, num_samples: int, width: int, num_views: int) -> None:
        self.images = torch.zeros(num_views, num_samples, width, dtype=self.dtype)
        self.texts = torch.zeros(num_samples, width, dtype=self.dtype)
        self.image_present = torch.zeros(num_views, num_samples, dtype=torch.bool)
        self.text_present = torch.zeros(num_samples, dtype=torch.bool)
        self.written_images: list[tuple[int, int]] = []  # (view, sample)
        self.written_texts: list[int] = []

    def read_images(self, indices: NDArray[np.int64], view: int) -> tuple[Tensor, Tensor]:
        rows = torch.from_numpy(indices)
        return self.images[view, rows], self.image_present[view, rows]

    def read_texts(self, indices: NDArray[np.int64]) -> tuple[Tensor, Tensor]:
        rows = torch.from_numpy(indices)
        return self.texts[rows], self.text_present[rows]

    def close(self) -> None:
        pass

    def rounded(self, features_bD: Tensor) -> Tensor:
        return unit_rows(features_bD).to(self.dtype)

    def write_images(self, indices: NDArray[np.int64], view: int, features_bD: Tensor) -> None:
        assert features_bD.dtype == self.dtype
        self.images[view, indices] = features_bD
        self.image_present[view, indices] = True
        self.written_images += [(view, index) for index in indices.tolist()]

    def write_texts(self, indices: NDArray[np.int64], features_bD: Tensor) -> None:
        assert features_bD.dtype == self.dtype
        self.texts[indices] = features_bD
        self.text_present[indices] = True
        self.written_texts += indices.tolist()
