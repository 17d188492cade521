"""Small data sets that the tests of `cliprd_core.data` and `cliprd_core.evaluation` write: images, tars, model inputs."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Mapping
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from cliprd_core.data.batch import ModelInput, Preprocess

CONTEXT_LENGTH = 8


def image_bytes(number: int = 0, *, mode: str = "RGB", size: tuple[int, int] = (20, 16), kind: str = "PNG") -> bytes:
    """An encoded gradient that differs from number to number."""
    width, height = size
    image = Image.new("RGB", size)
    image.putdata(
        [
            ((x * 9 + number * 37) % 256, (y * 11 + number * 59) % 256, (x * y + number * 83) % 256)
            for y in range(height)
            for x in range(width)
        ]
    )
    buffer = io.BytesIO()
    image.convert(mode).save(buffer, format=kind)
    return buffer.getvalue()


def write_tar(path: Path, members: Mapping[str, bytes]) -> Path:
    """A tar of `members`, in order."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


def pair_members(numbers: range, *, corrupt: frozenset[int] = frozenset()) -> dict[str, bytes]:
    """Pairs `000007.png`, `000007.txt` …; the images of `corrupt` are no images."""
    members: dict[str, bytes] = {}
    for number in numbers:
        members[f"{number:06d}.png"] = b"not an image" if number in corrupt else image_bytes(number)
        members[f"{number:06d}.txt"] = f"caption {number}".encode()
    return members


def character_tokenizer(captions: list[str]) -> Tensor:
    """Token ids are the last characters' code points, padded with 0."""
    ids = torch.zeros(len(captions), CONTEXT_LENGTH, dtype=torch.int64)
    for row, caption in enumerate(captions):
        codes = [ord(character) for character in caption[-CONTEXT_LENGTH:]]
        ids[row, : len(codes)] = torch.tensor(codes)
    return ids


def reversing_tokenizer(captions: list[str]) -> Tensor:
    """Another tokenizer: `character_tokenizer` of the captions backwards."""
    return character_tokenizer([caption[::-1] for caption in captions])


def model_input(*, image_size: int = 12, mean: float = 0.5, tokenizer=character_tokenizer) -> ModelInput:
    return ModelInput(Preprocess(image_size, (mean, mean, mean), (0.25, 0.25, 0.25)), tokenizer, CONTEXT_LENGTH)
