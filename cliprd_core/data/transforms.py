"""From encoded bytes to what a model sees: decoding, the random crop of training, the centre crop of evaluation, normalising.

Images stay 8-bit (H, W, 3) until a whole batch is normalised at once, which is several times faster than image by image.
"""

from __future__ import annotations

import io
import math
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, JpegImagePlugin
from torch import Tensor, nn
from torch.nn import functional

from cliprd_core.data.batch import Preprocess
from cliprd_core.data.errors import CorruptSampleError

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")
"""Decoders that pairs may reach; Pillow has many more, seldom used and seldom tested against hostile files."""

INTERPOLATIONS = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}
RESIZE_MODES = ("shortest", "squash")

CROP_ATTEMPTS = 10
DRAWS_PER_CROP = CROP_ATTEMPTS * 4
"""Uniform numbers that `random_crop_box` may use: area, ratio, top and left of each attempt."""

LOG_RATIO_RANGE = (math.log(3 / 4), math.log(4 / 3))

Box = tuple[int, int, int, int]
"""left, top, right, bottom in pixels."""

FractionalBox = tuple[float, float, float, float]
"""The same, its edges inside pixels."""

JPEG_REDUCTIONS = (8, 4, 2)


def check_preprocess(preprocess: Preprocess) -> None:
    """Refuse what is not implemented, before any image is touched.

    Raises:
        ValueError: naming the field of open_clip's `preprocess_cfg` and its choices.
    """
    for field, value, choices in (
        ("interpolation", preprocess.interpolation, tuple(INTERPOLATIONS)),
        ("resize_mode", preprocess.resize_mode, RESIZE_MODES),
    ):
        if value not in choices:
            raise ValueError(f"`{field}` of the model's preprocessing is {value!r}; use one of {', '.join(choices)}")


def open_image(key: str, image_bytes: bytes) -> Image.Image:
    """The image with its size known and its pixels not yet decoded.

    Raises:
        CorruptSampleError: naming `key`.
    """
    try:
        return Image.open(io.BytesIO(image_bytes), formats=FORMATS)
    except Exception as error:  # Pillow documents no closed set of what a malformed file may raise
        raise _undecodable(key, error) from error


def to_rgb(key: str, image: Image.Image) -> Image.Image:
    """Decode to RGB. Transparency is dropped, as open_clip does; grey and palette images are expanded before any resizing.

    Raises:
        CorruptSampleError: naming `key`.
    """
    try:
        if image.mode == "P" and "transparency" in image.info:
            image = image.convert("RGBA")  # Pillow's way; straight to RGB it warns
        return image.convert("RGB")
    except Exception as error:  # as above
        raise _undecodable(key, error) from error


def decode_rgb(key: str, image_bytes: bytes) -> Image.Image:
    """Both: encoded bytes to an RGB image of full size.

    Raises:
        CorruptSampleError: naming `key`.
    """
    return to_rgb(key, open_image(key, image_bytes))


def decode_for_crop(key: str, image: Image.Image, box: Box, size: int) -> tuple[Image.Image, FractionalBox]:
    """Decode no finer than needed: the RGB image, and `box` in its pixels.

    A JPEG can be decoded at a half, a quarter or an eighth of its width and height, which skips most of its inverse transform and
    leaves less to resize. The smallest is taken at which the box still has `size` pixels each way. Pixel k of a reduction by s
    stands for the original's pixels s k to s (k + 1), so the box's edges are divided by s and kept as fractions.

    The crop then differs slightly from one of the full image, since the first step of the shrinking is the decoder's mean over
    squares and not the resizing filter: by less than 1 of 255 on average on photographs, and by 10 at single pixels.

    Args:
        image: as `open_image` gives it.
        box: in the full image's pixels.
        size: the largest image_size that the box will be resized to, pixels.

    Raises:
        CorruptSampleError: naming `key`.
    """
    shorter = min(box[2] - box[0], box[3] - box[1])
    reduction = next((one for one in JPEG_REDUCTIONS if shorter >= size * one), 1)
    if reduction == 1 or not isinstance(image, JpegImagePlugin.JpegImageFile) or image.format != "JPEG":
        return to_rgb(key, image), box
    width, height = image.size
    image.draft(None, (width // reduction, height // reduction))
    if image.size != (-(-width // reduction), -(-height // reduction)):
        return to_rgb(key, image), box  # Pillow left it at its full size
    left, top, right, bottom = (edge / reduction for edge in box)
    return to_rgb(key, image), (left, top, right, bottom)


def _undecodable(key: str, error: Exception) -> CorruptSampleError:
    return CorruptSampleError(key, f"cannot decode its image: {type(error).__name__}: {error}")


def random_crop_box(width: int, height: int, scale: tuple[float, float], draws: Sequence[float]) -> Box:
    """The box of torchvision's RandomResizedCrop (ratio 3/4 to 4/3), from given uniform numbers.

    Args:
        width, height: of the image, pixels.
        scale: range of the crop's area, as fractions of the image's.
        draws: DRAWS_PER_CROP numbers in [0, 1).
    """
    for attempt in range(0, DRAWS_PER_CROP, 4):
        area = width * height * (scale[0] + (scale[1] - scale[0]) * draws[attempt])
        ratio = math.exp(LOG_RATIO_RANGE[0] + (LOG_RATIO_RANGE[1] - LOG_RATIO_RANGE[0]) * draws[attempt + 1])
        crop_width, crop_height = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < crop_width <= width and 0 < crop_height <= height:
            top = int(draws[attempt + 2] * (height - crop_height + 1))
            left = int(draws[attempt + 3] * (width - crop_width + 1))
            return left, top, left + crop_width, top + crop_height
    return _central_crop_box(width, height)


def _central_crop_box(width: int, height: int) -> Box:
    """torchvision's fallback: the largest central box whose ratio is within 3/4 to 4/3."""
    crop_width, crop_height = width, height
    if width / height < 3 / 4:
        crop_height = min(round(width / (3 / 4)), height)
    elif width / height > 4 / 3:
        crop_width = min(round(height * (4 / 3)), width)
    left, top = (width - crop_width) // 2, (height - crop_height) // 2
    return left, top, left + crop_width, top + crop_height


def resize_crop(image: Image.Image, box: FractionalBox, preprocess: Preprocess) -> NDArray[np.uint8]:
    """The box of the image at the model's size: (image_size, image_size, 3).

    torch's antialiased resizing of 8-bit images is Pillow's to within 2 of 255, and several times faster where the processor has AVX2.
    It takes whole pixels only, so boxes with fractions go through Pillow's.
    """
    size = (preprocess.image_size, preprocess.image_size)
    left, top, right, bottom = math.floor(box[0]), math.floor(box[1]), math.ceil(box[2]), math.ceil(box[3])
    # Cropping first, and not `resize(box=…)` alone, keeps pixels outside the box out of the result, as torchvision does.
    crop = image.crop((left, top, right, bottom))
    if (left, top, right, bottom) != box:
        inner = (box[0] - left, box[1] - top, box[2] - left, box[3] - top)
        return np.asarray(crop.resize(size, INTERPOLATIONS[preprocess.interpolation], box=inner))
    # The batch's dimension first, so that torch sees the layout as channels-last: three times faster, and (H, W, 3) comes out as is.
    pixels = torch.from_numpy(np.array(crop)).unsqueeze(0).permute(0, 3, 1, 2)
    resized = functional.interpolate(pixels, size, mode=preprocess.interpolation, antialias=True, align_corners=False)
    array: NDArray[np.uint8] = resized[0].permute(1, 2, 0).numpy()
    return array


def center_crop(image: Image.Image, preprocess: Preprocess) -> NDArray[np.uint8]:
    """open_clip's evaluation transform up to the normalising: (image_size, image_size, 3)."""
    size = preprocess.image_size
    if preprocess.resize_mode == "squash":
        return np.asarray(image.resize((size, size), INTERPOLATIONS[preprocess.interpolation]))
    assert preprocess.resize_mode == "shortest", preprocess.resize_mode
    width, height = image.size
    shorter = min(width, height)
    scaled = image.resize((size * width // shorter, size * height // shorter), INTERPOLATIONS[preprocess.interpolation])
    left, top = round((scaled.width - size) / 2), round((scaled.height - size) / 2)
    return np.asarray(scaled.crop((left, top, left + size, top + size)))


class Normalise(nn.Module):
    """(B, H, W, 3) 8-bit pixels to (B, 3, H, W) float32 on the same device, as one model wants them.

    ((x / 255) - mean) / std, rounded as torchvision's ToTensor and Normalize do.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, preprocess: Preprocess) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(preprocess.mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(preprocess.std).view(1, 3, 1, 1), persistent=False)

    def forward(self, pixels: Tensor) -> Tensor:
        channels_first = pixels.permute(0, 3, 1, 2)
        return channels_first.to(torch.float32, memory_format=torch.contiguous_format).div_(255).sub_(self.mean).div_(self.std)
