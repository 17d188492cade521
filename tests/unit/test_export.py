"""The export must be plain open_clip's: same weights, same features, same tokens, same preprocessing."""

from __future__ import annotations

import hashlib
import io
from pathlib import Path

import open_clip
import pytest
import torch
from PIL import Image

from cliprd_core.export import export_model
from cliprd_core.models import LoadedModel, load_student, load_teacher
from cliprd_core.spec import StudentSpec, TeacherSpec
from tests.tiny import tiny_config, tiny_pair, write_teacher

CAPTIONS = ["A red circle, on blue.", "two GREEN squares"]


def exported(loaded: LoadedModel, folder: Path) -> str:
    names = ["open_clip_config.json", "open_clip_model.safetensors"]
    assert export_model(loaded, folder) == {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in names}
    return f"local-dir:{folder}"


@pytest.mark.parametrize("kind", ["config", "custom_tokenizer", "custom_text"])
def test_plain_open_clip_gives_the_same_features(tmp_path: Path, kind: str) -> None:
    config = tiny_config(image_size=48, context_length=20)
    if kind == "custom_tokenizer":
        config["text_cfg"]["tokenizer_kwargs"] = {"clean": "canonicalize"}
    if kind == "custom_text":
        config["custom_text"] = True
    loaded = load_student(StudentSpec(config=config), seed=7)
    loaded.model.eval()
    name = exported(loaded, tmp_path / "export")

    model, _, transform = open_clip.create_model_and_transforms(name)
    model.eval()
    tokenizer = open_clip.get_tokenizer(name)
    ours, theirs = loaded.model.state_dict(), model.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) and ours[key].dtype == theirs[key].dtype for key in ours)

    tokens = tokenizer(CAPTIONS)
    assert torch.equal(tokens, loaded.tokenizer(CAPTIONS))
    images = torch.stack([transform(Image.open(io.BytesIO(tiny_pair(index)[0]))) for index in range(2)])
    assert images.shape[-1] == loaded.preprocess.image_size
    with torch.no_grad():
        for normalize in (False, True):
            torch.testing.assert_close(
                model.encode_image(images, normalize), loaded.model.encode_image(images, normalize), atol=1e-6, rtol=0
            )
            torch.testing.assert_close(model.encode_text(tokens, normalize), loaded.model.encode_text(tokens, normalize), atol=1e-6, rtol=0)


def test_preprocessing_travels_along(tmp_path: Path) -> None:
    preprocess = {"mean": [0.5, 0.4, 0.3], "std": [0.2, 0.25, 0.3], "interpolation": "bilinear", "resize_mode": "squash"}
    loaded = load_student(StudentSpec(model=write_teacher(tmp_path / "first", preprocess=preprocess)), seed=0)
    model = open_clip.create_model(exported(loaded, tmp_path / "second"))
    written = open_clip.get_model_preprocess_cfg(model)
    assert {key: list(value) if isinstance(value, tuple) else value for key, value in written.items() if key in preprocess} == preprocess


def test_an_export_is_a_teacher_for_the_next_run(tmp_path: Path) -> None:
    student = load_student(StudentSpec(config=tiny_config()), seed=3)
    teacher = load_teacher(TeacherSpec(model=exported(student, tmp_path / "export")))
    assert teacher.preprocess == student.preprocess
    assert all(torch.equal(value, teacher.model.state_dict()[key]) for key, value in student.model.state_dict().items())


def test_an_old_export_is_replaced_whole(tmp_path: Path) -> None:
    folder = tmp_path / "export"
    folder.mkdir()
    (folder / "stale.bin").write_bytes(b"old")
    (tmp_path / ".export.tmp").mkdir()  # left by a crash
    exported(load_student(StudentSpec(config=tiny_config()), seed=3), folder)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["export"]
    assert not (folder / "stale.bin").exists()
