"""The list of known models against the open_clip that is installed."""

from __future__ import annotations

from typing import Any

import open_clip
import pytest

from scripts.write_known_models import KEYS_TARGET, TARGET, known_config_keys, known_models, render, render_keys
from service import model_names
from service.model_config_check import model_config_problems


def test_the_list_is_what_the_installed_open_clip_says() -> None:
    assert TARGET.read_text() == render(known_models()), "run scripts/write_known_models.py"


def test_the_keys_are_what_the_installed_open_clip_says() -> None:
    assert KEYS_TARGET.read_text() == render_keys(known_config_keys()), "run scripts/write_known_models.py"


def test_every_config_of_open_clip_is_accepted() -> None:
    for name in open_clip.list_models():
        assert model_config_problems("student.config", open_clip.get_model_config(name)) == [], name


@pytest.mark.parametrize(
    ("tower", "changes", "field", "words"),
    [
        ("vision_cfg", {"widht": 64}, "widht", "Did you mean `width`?"),
        ("vision_cfg", {"width": "64"}, "width", "integer"),
        ("vision_cfg", {"layers": True}, "layers", "integer or list"),
        ("vision_cfg", {"width": 100, "head_width": 64}, "width", "`head_width`"),
        ("vision_cfg", {"image_size": [32, 0]}, "image_size", "1 or more"),
        ("vision_cfg", {"patch_size": 0}, "patch_size", "1 or more"),
        ("text_cfg", {"context_length": -1}, "context_length", "1 or more"),
        ("text_cfg", {"heads": 3}, "width", "`heads`"),
    ],
)
def test_impossible_configs_are_refused(tower: str, changes: dict[str, Any], field: str, words: str) -> None:
    config: dict[str, Any] = {"embed_dim": 8, "vision_cfg": {}, "text_cfg": {}, tower: changes}
    (problem,) = model_config_problems("student.config", config)
    assert problem.field == f"student.config.{tower}.{field}"
    assert words in problem.remedy


@pytest.mark.parametrize("name", ["ViT-B-32", "ViT-B/32", "RN50", "ViT-T-16"])
def test_known_names(name: str) -> None:
    assert model_names.check_model_name("student.model", name) == []


def test_an_unknown_name_suggests_the_nearest() -> None:
    (problem,) = model_names.check_model_name("student.model", "vit-b16")
    assert "`vit-b16`" in problem.problem
    assert "`ViT-B-16`" in problem.remedy


def test_tags() -> None:
    assert model_names.check_pretrained_tag("teacher.pretrained", "ViT-B/16", "LAION400M-E32") == []
    (problem,) = model_names.check_pretrained_tag("teacher.pretrained", "ViT-B-16", "laion400m_e23")
    assert "`laion400m_e32`" in problem.remedy
    (problem,) = model_names.check_pretrained_tag("student.pretrained", "ViT-T-16", "openai")
    assert "no weights to download" in problem.remedy
