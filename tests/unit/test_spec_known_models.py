"""The list of known models against the open_clip that is installed."""

from __future__ import annotations

import pytest

from scripts.write_known_models import TARGET, known_models, render
from service import model_names


def test_the_list_is_what_the_installed_open_clip_says() -> None:
    assert TARGET.read_text() == render(known_models()), "run scripts/write_known_models.py"


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
