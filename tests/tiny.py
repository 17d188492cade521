"""The smallest real inputs of a training run: shards of drawn shapes with captions, model configs, a teacher on disk, a job spec.

Everything here is deterministic. Only `write_teacher` loads torch, so that tests of the service and the worker may use the rest.
"""

from __future__ import annotations

import io
import tarfile
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw

from cliprd_core.spec import JobSpec, merge_over

COLOURS = {
    "red": (220, 40, 40),
    "green": (40, 160, 60),
    "blue": (50, 80, 220),
    "yellow": (235, 205, 40),
    "purple": (140, 60, 180),
    "white": (245, 245, 245),
    "black": (15, 15, 15),
    "orange": (240, 140, 30),
}
SHAPES = ("circle", "square", "triangle", "cross")
MODEL_IMAGE_SIZE = 32
CONTEXT_LENGTH = 16


def tiny_pair(index: int, *, image_size: int = 40) -> tuple[bytes, str]:
    """Pair number `index`: a PNG of one coloured shape on a coloured ground, and the caption that says so."""
    colours = list(COLOURS)
    shape = SHAPES[index % len(SHAPES)]
    colour = colours[(index // len(SHAPES)) % len(colours)]
    ground = colours[(index // len(SHAPES) + 1 + index % (len(colours) - 1)) % len(colours)]
    image = Image.new("RGB", (image_size, image_size), COLOURS[ground])
    draw = ImageDraw.Draw(image)
    low, high = image_size // 5 + index % 3, image_size - image_size // 5 - index % 2
    middle, quarter = image_size // 2, image_size // 10
    if shape == "circle":
        draw.ellipse((low, low, high, high), fill=COLOURS[colour])
    elif shape == "square":
        draw.rectangle((low, low, high, high), fill=COLOURS[colour])
    elif shape == "triangle":
        draw.polygon(((middle, low), (high, high), (low, high)), fill=COLOURS[colour])
    else:
        draw.rectangle((middle - quarter, low, middle + quarter, high), fill=COLOURS[colour])
        draw.rectangle((low, middle - quarter, high, middle + quarter), fill=COLOURS[colour])
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return buffer.getvalue(), f"A {colour} {shape}, on {ground}."


def write_shards(folder: Path, num_pairs: int, *, num_shards: int = 1, image_size: int = 40) -> str:
    """Write `num_pairs` pairs as tar shards `00000.tar` … into `folder`; returns what a spec's `shards` should say."""
    folder.mkdir(parents=True, exist_ok=True)
    for shard in range(num_shards):
        with tarfile.open(folder / f"{shard:05d}.tar", "w") as archive:
            for index in range(shard * num_pairs // num_shards, (shard + 1) * num_pairs // num_shards):
                image, caption = tiny_pair(index, image_size=image_size)
                for suffix, content in (("png", image), ("txt", caption.encode())):
                    member = tarfile.TarInfo(f"{index:06d}.{suffix}")
                    member.size = len(content)
                    archive.addfile(member, io.BytesIO(content))
    return str(folder / (f"{{00000..{num_shards - 1:05d}}}.tar" if num_shards > 1 else "00000.tar"))


def tiny_config(
    *, width: int = 32, embed_dim: int = 32, image_size: int = MODEL_IMAGE_SIZE, context_length: int = CONTEXT_LENGTH, layers: int = 1
) -> dict[str, Any]:
    """An open_clip model config of about 1.6 million parameters (nearly all of them token embeddings) at `width` 32."""
    return {
        "embed_dim": embed_dim,
        "vision_cfg": {"image_size": image_size, "layers": layers, "width": width, "head_width": 16, "patch_size": 8},
        "text_cfg": {"context_length": context_length, "vocab_size": 49408, "width": width, "heads": 2, "layers": layers},
    }


def write_teacher(folder: Path, config: dict[str, Any] | None = None, *, seed: int = 1, preprocess: dict[str, Any] | None = None) -> str:
    """Write a randomly initialised model in open_clip's `local-dir:` layout; returns the model name that a spec gives."""
    import json

    from safetensors.torch import save_file

    from cliprd_core.models import load_student
    from cliprd_core.spec import StudentSpec

    loaded = load_student(StudentSpec(config=config or tiny_config()), seed=seed)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(loaded.model.state_dict(), folder / "open_clip_model.safetensors")
    content = {"model_cfg": loaded.config, "preprocess_cfg": preprocess or {}}
    (folder / "open_clip_config.json").write_text(json.dumps(content))
    return f"local-dir:{folder}"


def tiny_spec(shards: str, *, teacher: str | None = None, **changes: Any) -> JobSpec:
    """A job of 4 steps an epoch at 32 pairs, 2 epochs; `changes` are merged in, object by object. No `teacher`: recipe `clip`."""
    spec: dict[str, Any] = {
        "name": "tiny",
        "recipe": "clip" if teacher is None else "clip_rd",
        "teacher": None if teacher is None else {"model": teacher},
        "student": {"config": tiny_config()},
        "data": {"train": [{"type": "webdataset", "shards": shards}]},
        "training": {
            "epochs": 2,
            "global_batch_size": 8,
            "warmup_steps": 2,
            "precision": "fp32",
            "checkpoint_every_steps": 2,
            "log_every_steps": 1,
            "num_data_workers": 0,
        },
        "resources": {"device": "cpu"},
    }
    return JobSpec.model_validate(merge_over(spec, changes))
