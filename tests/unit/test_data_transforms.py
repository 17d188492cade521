"""Decoding, crops and normalising, against torchvision and open_clip where these set the standard."""

import io
import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from open_clip.transform import image_transform
from PIL import Image
from torchvision.transforms import InterpolationMode, RandomResizedCrop
from torchvision.transforms import functional as tvf

from cliprd_core.data.batch import Preprocess
from cliprd_core.data.errors import CorruptSampleError
from cliprd_core.data.hashing import CROP_STREAM, permutation, stream_key, uniforms
from cliprd_core.data.transforms import (
    DRAWS_PER_CROP,
    Box,
    Normalise,
    center_crop,
    check_preprocess,
    decode_for_crop,
    decode_rgb,
    open_image,
    random_crop_box,
    resize_crop,
)
from tests.data_files import image_bytes

PREPROCESS = Preprocess(24, (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))


def many_draws(count: int) -> list[list[float]]:
    drawn: list[list[float]] = uniforms(stream_key(CROP_STREAM, 0, 0), np.arange(count), DRAWS_PER_CROP).tolist()
    return drawn


class TestDecode:
    @pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "LA", "P", "1", "I;16"])
    def test_every_mode_becomes_rgb(self, mode: str) -> None:
        decoded = decode_rgb("key", image_bytes(3, mode=mode))
        assert (decoded.mode, decoded.size) == ("RGB", (20, 16))

    def test_grey_is_the_same_in_all_channels_and_alpha_is_dropped(self) -> None:
        grey = np.asarray(decode_rgb("key", image_bytes(3, mode="L")))
        assert (grey == grey[..., :1]).all()
        assert grey.std() > 10
        image = Image.new("RGBA", (4, 4), (10, 20, 30, 0))
        buffer = io.BytesIO()
        image.save(buffer, format="PNG")
        assert (np.asarray(decode_rgb("key", buffer.getvalue())) == (10, 20, 30)).all()

    def test_palette_with_transparency_raises_no_warning(self) -> None:
        image = Image.new("P", (4, 4), 1)
        image.putpalette([0, 0, 0, 200, 100, 50])
        buffer = io.BytesIO()
        image.save(buffer, format="PNG", transparency=bytes([0, 128]))
        assert (np.asarray(decode_rgb("key", buffer.getvalue())) == (200, 100, 50)).all()

    @pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
    def test_damaged_images_are_corrupt(self, kind: str) -> None:
        whole = image_bytes(1, size=(64, 64), kind=kind)
        for content in (b"", b"nonsense", whole[:20], whole[: len(whole) // 2]):
            with pytest.raises(CorruptSampleError, match=r"some\.tar:key: cannot decode"):
                decode_rgb("some.tar:key", content)

    def test_formats_outside_the_list_are_not_decoded(self) -> None:
        buffer = io.BytesIO()
        Image.new("RGB", (4, 4)).save(buffer, format="EPS")
        with pytest.raises(CorruptSampleError):
            decode_rgb("key", buffer.getvalue())


class TestRandomCrop:
    @given(width=st.integers(1, 400), height=st.integers(1, 400), number=st.integers(0, 2**40), low=st.floats(0.05, 1.0))
    def test_box_lies_in_the_image(self, width: int, height: int, number: int, low: float) -> None:
        draws = uniforms(stream_key(CROP_STREAM, 5, 1), np.array([number]), DRAWS_PER_CROP)[0].tolist()
        left, top, right, bottom = random_crop_box(width, height, (low, 1.0), draws)
        assert 0 <= left < right <= width
        assert 0 <= top < bottom <= height

    def test_same_distribution_as_torchvision(self) -> None:
        """Mean and spread of area, ratio and position of 4,000 boxes of either, on an image that makes some attempts fail."""
        width, height, scale = 200, 150, (0.5, 1.0)
        ours = np.array([random_crop_box(width, height, scale, draws) for draws in many_draws(4000)], dtype=float)
        torch.manual_seed(0)
        blank = Image.new("RGB", (width, height))
        theirs = np.array([RandomResizedCrop.get_params(blank, list(scale), [3 / 4, 4 / 3]) for _ in range(4000)], dtype=float)
        tops, lefts, heights, widths = theirs.T
        for mine, reference in (
            (ours[:, 0], lefts),
            (ours[:, 1], tops),
            ((ours[:, 2] - ours[:, 0]) * (ours[:, 3] - ours[:, 1]), widths * heights),
            ((ours[:, 2] - ours[:, 0]) / (ours[:, 3] - ours[:, 1]), widths / heights),
        ):
            error = reference.std() * math.sqrt(2 / 4000)
            assert abs(mine.mean() - reference.mean()) < 5 * error
            assert abs(mine.std() / reference.std() - 1) < 0.1

    @pytest.mark.parametrize("size", [(300, 100), (100, 300), (100, 100)])
    def test_fallback_is_torchvisions(self, size: tuple[int, int]) -> None:
        """At scale 1 no crop of the ratios fits an oblong image, so both fall back to the central box."""
        box = random_crop_box(*size, (1.0, 1.0), [0.999] * DRAWS_PER_CROP)
        top, left, height, width = RandomResizedCrop.get_params(Image.new("RGB", size), [10.0, 10.0], [3 / 4, 4 / 3])
        assert box == (left, top, left + width, top + height)

    def test_pixels_are_torchvisions(self) -> None:
        image = decode_rgb("key", image_bytes(2, size=(50, 40)))
        theirs = tvf.resized_crop(image, 3, 5, 30, 33, [24, 24], InterpolationMode.BICUBIC)
        ours = resize_crop(image, (5, 3, 38, 33), PREPROCESS)
        assert np.abs(ours.astype(int) - np.asarray(theirs)).max() <= 2  # torch's resizing against Pillow's


def photo(width: int, height: int, kind: str = "JPEG", **options: Any) -> bytes:
    """A smooth colourful picture with soft edges, as JPEG compresses them well."""
    y, x = np.mgrid[0:height, 0:width].astype(np.float64)
    waves = [np.sin(x / 41 + y / 67), np.sin(x / 23) * np.cos(y / 31), np.tanh(np.sin(x / 90 - y / 70) * 6)]
    pixels = np.stack([128 + 100 * wave for wave in waves], axis=-1).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format=kind, **options)
    return buffer.getvalue()


class TestReducedDecoding:
    @pytest.mark.parametrize(
        ("box", "size", "reduction"),
        [
            ((0, 0, 601, 399), 24, 8),
            ((10, 20, 202, 300), 24, 8),  # 192 pixels: just enough
            ((10, 20, 201, 300), 24, 4),
            ((10, 20, 106, 116), 48, 2),
            ((10, 20, 105, 116), 48, 1),
        ],
    )
    def test_as_small_as_the_crop_allows(self, box: Box, size: int, reduction: int) -> None:
        image, in_image = decode_for_crop("key", open_image("key", photo(601, 399)), box, size)
        assert image.size == (math.ceil(601 / reduction), math.ceil(399 / reduction))
        assert in_image == tuple(edge / reduction for edge in box)

    @pytest.mark.parametrize("size", [(601, 399), (600, 400), (607, 393)])
    @pytest.mark.parametrize("options", [{"quality": 90}, {"quality": 90, "progressive": True}, {"quality": 95, "subsampling": 0}])
    @pytest.mark.parametrize("box", [(13, 7, 590, 380), (101, 3, 347, 391), (5, 9, 210, 214)])
    def test_crop_is_that_of_the_whole_image(self, size: tuple[int, int], options: dict[str, Any], box: Box) -> None:
        """A crop that is off by one original pixel would differ by several times as much."""
        content = photo(*size, **options)
        preprocess = Preprocess(48, PREPROCESS.mean, PREPROCESS.std)
        reduced, in_reduced = decode_for_crop("key", open_image("key", content), box, 48)
        assert reduced.width < size[0]
        ours = resize_crop(reduced, in_reduced, preprocess).astype(int)
        full = decode_rgb("key", content)
        theirs = resize_crop(full, box, preprocess)
        shifted = resize_crop(full, (box[0] + 1, box[1] + 1, box[2] + 1, box[3] + 1), preprocess)
        difference = np.abs(ours - theirs)
        assert difference.mean() < 1
        assert difference.max() <= 24
        assert difference.mean() < 0.5 * np.abs(ours - shifted).mean()

    def test_only_jpegs_are_reduced(self) -> None:
        image, box = decode_for_crop("key", open_image("key", photo(600, 400, "PNG")), (0, 0, 600, 400), 24)
        assert (image.size, box) == ((600, 400), (0, 0, 600, 400))

    @pytest.mark.parametrize("mode", ["L", "CMYK"])
    def test_other_colour_spaces_become_rgb(self, mode: str) -> None:
        content = image_bytes(3, mode=mode, size=(200, 200), kind="JPEG")
        image, _ = decode_for_crop("key", open_image("key", content), (0, 0, 200, 200), 24)
        assert (image.mode, image.size) == ("RGB", (25, 25))

    def test_cut_off_jpeg_is_corrupt(self) -> None:
        content = photo(600, 400)
        encoded = open_image("some.tar:key", content[: len(content) // 2])
        with pytest.raises(CorruptSampleError, match=r"some\.tar:key: cannot decode"):
            decode_for_crop("some.tar:key", encoded, (0, 0, 600, 400), 24)


class TestCenterCrop:
    @pytest.mark.parametrize("size", [(24, 24), (50, 37), (37, 50), (10, 13), (25, 24), (24, 27), (301, 24)])
    @pytest.mark.parametrize("mode", ["shortest", "squash"])
    @pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
    def test_same_as_open_clips_evaluation_transform(self, size: tuple[int, int], mode: str, interpolation: str) -> None:
        preprocess = Preprocess(24, PREPROCESS.mean, PREPROCESS.std, interpolation, mode)
        image = decode_rgb("key", image_bytes(5, size=size))
        ours = Normalise(preprocess)(torch.from_numpy(np.stack([center_crop(image, preprocess)])))[0]
        theirs = image_transform(24, False, preprocess.mean, preprocess.std, resize_mode=mode, interpolation=interpolation)(image)
        assert torch.equal(ours, theirs)

    def test_unknown_modes_name_the_choices(self) -> None:
        with pytest.raises(ValueError, match=r"resize_mode.*'longest'.*squash"):
            check_preprocess(Preprocess(24, PREPROCESS.mean, PREPROCESS.std, resize_mode="longest"))
        with pytest.raises(ValueError, match=r"interpolation.*'nearest'.*bicubic"):
            check_preprocess(Preprocess(24, PREPROCESS.mean, PREPROCESS.std, interpolation="nearest"))
        check_preprocess(PREPROCESS)


class TestHashing:
    def test_values_are_fixed_for_ever(self) -> None:
        """A resumed run must see the order and crops that it began with, whatever release it is resumed with."""
        assert permutation(7, 3, 10).tolist() == [9, 7, 4, 0, 2, 1, 3, 5, 8, 6]
        assert uniforms(stream_key(CROP_STREAM, 7, 3), np.array([11]), 3)[0].tolist() == [
            0.9262831305886066,
            0.5731894269901034,
            0.16387781638940224,
        ]

    def test_uniforms_are_uniform_and_independent(self) -> None:
        drawn = uniforms(stream_key(CROP_STREAM, 0, 0), np.arange(20_000), 4)
        assert 0 <= drawn.min() < drawn.max() < 1
        histogram = np.histogram(drawn, bins=20, range=(0, 1))[0]
        expected = drawn.size / 20
        assert ((histogram - expected) ** 2 / expected).sum() < 60  # chi-square, 19 degrees of freedom: far beyond the 0.1 % point
        correlations = np.corrcoef(np.concatenate([drawn, np.roll(drawn, 1, axis=0)], axis=1).T) - np.eye(8)
        assert np.abs(correlations).max() < 0.04

    def test_seed_and_epoch_and_stream_all_matter(self) -> None:
        streams = [(1, 0, 0), (1, 0, 1), (1, 1, 0), (2, 0, 0), (1, 1, 1)]
        first = [uniforms(stream_key(*stream), np.array([0]), 1)[0, 0] for stream in streams]
        assert len(set(first)) == len(streams)
